"""Growth in rows, batch and dimension of what runs beside the model, each measurement in a process of its own.

1. ``sampler``: set-up, first epoch's plan, time a batch and peak memory of ``FalseNegativeAwareBatchSampler`` at 10k,
   100k and 662k rows x 256 dimensions, from made-up clustered guide embeddings with natural conflicts, repeated
   targets and labels and 20 data sets; mixed and homogeneous batches, with and without hard negatives together.
2. ``clusters``: batches of B3 (``cluster_size``) of the same rows, set-up and first plan with the guide's neighbours
   given (kept on disk by a run before), and the share of the rank graph's edges that lie within a global batch,
   beside that of random batches of one data set each.
3. ``loss``: ``HardNegativeInfoNCELoss`` alone, forward and backward, at global batches of 1k, 4k and 16k; its peak
   memory beside what a tensor of (N, 1 + k, D) would take.
4. ``teacher``: ``teacher_embeddings`` on an empty cache beside bare ``encode`` of the same distinct texts.

``python benchmarks/scale.py [sampler] [clusters] [loss] [teacher]`` runs all or some, writes
`benchmarks/results/scale.json`, where sections that were not run stay, and prints tables in Markdown.
"""

from __future__ import annotations

from basics import RESULTS, in_process, keep, kept, machine, parser, peak_above, peak_mb, table

# isort: split
import argparse
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIM = 256
SUBSETS = 20
GLOBAL_BATCH = (8, 8)  # processes, rows a batch on each
CLUSTERED_BATCH, CLUSTER, RANKS = (8, 64), 32, 130
VARIANTS = {
    "mixed": {}, "mixed, hard negatives together": {"hard_negatives_together": 2}, "homogeneous": {"homogeneous": True},
    "homogeneous, hard negatives together": {"homogeneous": True, "hard_negatives_together": 2},
}  # fmt: skip


def write_rows(folder: Path, rows: int) -> None:
    """Guide embeddings (float16) and the numbers that rows are made of.

    Topics of about 50 rows lie in 200 regions; a query and its target lie about one point of a topic, a tenth of the
    targets so far from it that the rest of the topic comes nearer: natural false negatives. A quarter of the rows take
    another row's target, in content and embedding.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    regions = rng.normal(size=(200, DIM)).astype(np.float32)
    topics = max(rows // 50, SUBSETS)
    centres = 0.8 * regions[rng.integers(0, 200, topics)] + 0.8 * rng.normal(size=(topics, DIM)).astype(np.float32)
    topic = rng.integers(0, topics, rows)
    target = np.where(rng.random(rows) < 0.25, rng.integers(0, rows, rows), np.arange(rows))
    target = np.where(topic[target] % SUBSETS == topic % SUBSETS, target, np.arange(rows))  # within its data set
    topic = topic[target]
    weights = np.geomspace(1, 12, SUBSETS)
    subset = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(topics))[topic]
    for name, generator_seed, levels in (("q", 1, (0.3, 0.3)), ("t", 2, (0.3, 1.5))):
        side = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (rows, DIM))
        for start in range(0, rows, 32768):
            part = slice(start, min(rows, start + 32768))
            side[part] = noisy(centres[topic[part]], start, generator_seed, levels)
        if name == "t":
            repeated = np.flatnonzero(target != np.arange(rows))
            side[repeated] = side[target[repeated]]
        side.flush()
    for name, array in (("target", target), ("topic", topic), ("subset", subset)):
        np.save(folder / f"{name}.npy", array)


def noisy(centres: np.ndarray, start: int, seed: int, levels: tuple[float, float]) -> np.ndarray:
    """A point near each centre, the same for query and target, and noise of two levels around it."""
    shared, own = np.random.default_rng([0, start]), np.random.default_rng([seed, start])
    points = centres + 0.5 * shared.standard_normal(centres.shape, dtype=np.float32)
    amount = own.choice(np.asarray(levels, dtype=np.float32), len(centres), p=[0.9, 0.1])[:, None]
    return points + amount * own.standard_normal(centres.shape, dtype=np.float32)


def make_dataset(folder: Path) -> Any:
    import pyarrow as pa
    from datasets import Dataset

    from unime_st.columns import without_subset

    target, topic, subset = (np.load(folder / f"{name}.npy") for name in ("target", "topic", "subset"))
    rows = len(target)

    def items(images: Any, texts: Iterator[str]) -> Any:
        return pa.StructArray.from_arrays([images, pa.array(texts)], names=["image", "text"])

    images = pa.array(f"images/{row}.jpg" for row in range(rows))
    columns = {
        "anchor": items(images, (f"what is {row % 97}" for row in range(rows))),
        "positive": items(pa.nulls(rows, pa.string()), (f"answer {number}" for number in target)),
        "label": pa.array(np.where(np.arange(rows) % 10 == 0, topic, target + len(topic))),
        "subset": pa.array(f"set {number}" for number in subset),
    }
    return Dataset(pa.table(columns)).with_transform(without_subset)


def measure_sampler(folder: str, variant: str) -> dict[str, Any]:
    """Set-up is all up to the length, plan the first epoch's, both from nothing kept."""
    from unime_st.samplers import FalseNegativeAwareBatchSampler

    dataset, (world, batch) = make_dataset(Path(folder)), GLOBAL_BATCH
    before_mb, cpu, marks = peak_mb(), time.process_time(), [time.perf_counter()]
    sampler = FalseNegativeAwareBatchSampler(
        dataset, batch, drop_last=True, valid_label_columns=["label"], world_size=world,
        guide_queries=f"{folder}/q.npy", guide_targets=f"{folder}/t.npy", **VARIANTS[variant],
    )  # fmt: skip
    marks.append(time.perf_counter())
    length = len(sampler)
    marks.append(time.perf_counter())
    batches = iter(sampler)
    drawn = len(next(batches))
    marks.append(time.perf_counter())
    drawn += sum(map(len, batches))
    a_batch = (time.perf_counter() - marks[-1]) / max(1, length - 1)
    found = {"cpu_s": round(time.process_time() - cpu, 2), "peak_mb": peak_mb(), "before_mb": before_mb}
    sampler.set_epoch(1)
    again = time.perf_counter()
    next(iter(sampler))
    found["next_epoch_plan_s"] = round(time.perf_counter() - again, 2)
    names = ("neighbours_s", "set_up_s", "set_up_and_first_plan_s")
    found |= {name: round(mark - marks[0], 2) for name, mark in zip(names, marks[1:], strict=True)}
    return {"rows": len(dataset), "variant": variant, **found} | {
        "batch_us": round(a_batch * 1e6, 1),
        "batches": length,
        "rows_drawn": drawn,
        "conflict_pairs": len(sampler.conflicts.neighbours) // 2,
        "recall": {name: round(value, 4) for name, value in sampler.recall.items()},
        "load_average": round(os.getloadavg()[0], 1),
    }


def run_sampler(sizes: list[int]) -> dict[str, Any]:
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in sizes:
            folder = Path(scratch) / str(rows)
            write_rows(folder, rows)
            found += [measured("measure_sampler", str(folder), variant) for variant in VARIANTS]
            for file in folder.glob("*.npy"):
                file.unlink()
    growth = {variant: growth_exponents([one for one in found if one["variant"] == variant]) for variant in VARIANTS}
    return {"global_batch": GLOBAL_BATCH, "dim": DIM, "measured": found, "growth_in_n_log_n": growth}


def keep_neighbours(folder: str) -> dict[str, Any]:
    """Find the neighbours that :func:`measure_clusters` takes as given: as many hard negatives have the same ones."""
    started = time.perf_counter()
    clustered(make_dataset(Path(folder)), folder, hard_negatives_together=RANKS)
    return {"neighbours_s": round(time.perf_counter() - started, 1)}


def clustered(dataset: Any, folder: str, **options: Any) -> Any:
    from unime_st.samplers import FalseNegativeAwareBatchSampler

    guide = {"guide_queries": f"{folder}/q.npy", "guide_targets": f"{folder}/t.npy", "plan_dir": folder}
    world, batch = CLUSTERED_BATCH
    return FalseNegativeAwareBatchSampler(
        dataset, batch, drop_last=True, valid_label_columns=["label"], world_size=world, homogeneous=True,
        **(options and {**guide, **options}),
    )  # fmt: skip


def measure_clusters(folder: str) -> dict[str, Any]:
    dataset, started, cpu = make_dataset(Path(folder)), time.perf_counter(), time.process_time()
    sampler = clustered(dataset, folder, cluster_size=CLUSTER, range_max=RANKS)
    marks = [time.perf_counter() - started]
    length = len(sampler)
    marks.append(time.perf_counter() - started)
    found = {"clusters_s": round(marks[0], 1), "clusters_and_plan_s": round(marks[1], 1)}
    found |= {"cpu_s": round(time.process_time() - cpu, 1), "peak_mb": peak_mb()}
    edges = rank_edges(folder, sampler)
    shares = (shared(edges, each) for each in (sampler, clustered(dataset, folder)))
    found |= dict(zip(("edges_within_batches", "edges_within_random_batches"), shares, strict=True))
    found["recall"] = {name: round(value, 4) for name, value in sampler.recall.items()}
    return {"rows": len(dataset), "global_batch": CLUSTERED_BATCH, "cluster_size": CLUSTER, **found} | {
        "batches": length,
        "edges": len(edges.neighbours) // 2,
        "edges_within_clusters": round(float(edges.within(sampler.clusters).mean()), 4),
        "load_average": round(os.getloadavg()[0], 1),
    }


def rank_edges(folder: str, sampler: Any) -> Any:
    """The rank graph of the neighbours that the sampler's first run has kept."""
    from unime_st.samplers.guide.clusters import rank_graph

    hardest, twins = (np.load(next(Path(folder).glob(f"neighbors-*.{name}.npy"))) for name in ("hardest", "twins"))
    return rank_graph(hardest[:, sampler.range_min :], twins)


def shared(edges: Any, sampler: Any) -> float:
    """Of the edges between rows that are drawn at all, the share within a global batch."""
    batch = np.full(len(sampler.dataset), -1)
    for number, rows in enumerate(sampler):
        batch[rows] = number // sampler.world_size
    drawn = edges.within(np.where(batch < 0, -1, 0))
    return round(float(edges.within(batch).sum() / drawn.sum()), 4)


def run_clusters(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / str(rows))
        write_rows(Path(folder), rows)
        neighbours = measured("keep_neighbours", folder)
        return measured("measure_clusters", folder) | neighbours


def growth_exponents(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Slope of log time over log (n log n) between sizes: 1 is n log n, less is better."""
    work = [one["rows"] * math.log(one["rows"]) for one in measured]
    exponents = {}
    for name in ("set_up_and_first_plan_s", "cpu_s"):
        for first in range(len(measured) - 1):
            a, b = measured[first], measured[first + 1]
            slope = math.log(b[name] / a[name]) / math.log(work[first + 1] / work[first])
            exponents[f"{name} {a['rows']} to {b['rows']}"] = round(slope, 2)
    return exponents


def measure_loss(batch: str) -> dict[str, Any]:
    """The loss from embeddings that are there, and its gradient; peak memory over what was there before."""
    import torch

    from unime_st.losses import HardNegativeInfoNCELoss

    rows, width, k = int(batch), 1024, 8
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=k)
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(64, width, generator=generator, requires_grad=True) for _ in range(2)]
    loss.compute_loss_from_embeddings(small, None).backward()  # loads what is loaded once
    columns = [torch.randn(rows, width, generator=generator, requires_grad=True) for _ in range(2)]
    with peak_above() as peak:
        started = time.perf_counter()
        value = loss.compute_loss_from_embeddings(columns, None)
        value.backward()
        seconds = time.perf_counter() - started
    gradients = sum(int(bool((column.grad != 0).any())) for column in columns if column.grad is not None)
    return {
        "global_batch": rows, "dim": width, "num_hard_negatives": k, "loss": round(float(value.detach()), 4),
        "columns_with_gradient": gradients, "seconds": round(seconds, 2),
        "peak_above_inputs_mb": round(peak.bytes / 2**20, 1),
        "a_tensor_n_1k_d_mb": round(rows * (1 + k) * width * 4 / 2**20, 1),
        "score_matrix_mb": round(rows * rows * 4 / 2**20, 1),
    }  # fmt: skip


def measure_teacher(texts: str, runs: str) -> dict[str, Any]:
    """Alternating: embeddings of a data set into an empty cache, and bare encode of its distinct texts."""
    from measuring import alternating
    from unime_st.data import teacher_embeddings

    logging.disable(logging.WARNING)
    teacher, name = load_teacher()
    rng = np.random.default_rng(0)
    colours, things = ("red", "blue", "old", "new", "tall"), ("bus", "cat", "tree", "boat", "sky")
    words = [f"{how} {what}" for how in colours for what in things]
    distinct = [f"{row}: " + " ".join(rng.choice(words, int(rng.integers(3, 12)))) + "." for row in range(int(texts))]
    teacher.encode(distinct[:64], batch_size=32)
    with tempfile.TemporaryDirectory() as folder:
        folders = iter(range(int(runs)))
        contenders = {
            "cache": lambda: teacher_embeddings(teacher, distinct, f"{folder}/{next(folders)}", batch_size=32),
            "encode": lambda: teacher.encode(distinct, batch_size=32),
        }
        seconds, _ = alternating(contenders, int(runs), lambda _: None, time.perf_counter)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "teacher": name, "texts": len(distinct), "seconds": seconds,
        "cache_over_encode": round(medians["cache"] / medians["encode"], 3),
    }  # fmt: skip


def load_teacher() -> tuple[Any, str]:
    """MiniLM of the demo's package where that is installed, else a small BERT with random weights."""
    from sentence_transformers import SentenceTransformer

    from emoji.packages import TEACHER

    found = sorted(Path(os.environ.get("UNIME_DEMO_CACHE", ".demo_cache")).glob(f"{TEACHER.folder}/**/modules.json"))
    if found:
        return SentenceTransformer(str(found[0].parent), device="cpu"), TEACHER.spec
    return random_teacher(), "BERT of 6 layers, 384 dimensions, random weights"


def random_teacher() -> Any:
    """As large as MiniLM, with a tokenizer of whole words."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(special)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes, vocab_size=len(special))
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        body = Transformer(folder)
    return SentenceTransformer(modules=[body, Pooling(384)], device="cpu")


def measured(function: str, *arguments: str) -> dict[str, Any]:
    """Run a function of this file in a process of its own, whose peak memory is then its own."""
    result: dict[str, Any] = in_process(__file__, "--measure", function, *arguments)
    print(f"{function} {arguments}: {result}", flush=True)
    return result


def tables(results: dict[str, Any]) -> list[str]:
    """What was measured, every figure."""
    lines: list[str] = []
    for section, found in results.items():
        rows = found.get("measured", [found])
        lines += ["", f"## {section}", "", *table(rows[0], (row.values() for row in rows))]
    return lines


def main() -> None:
    runs = {
        "sampler": lambda: run_sampler(given.rows),
        "clusters": lambda: run_clusters(given.rows[-1]),
        "loss": lambda: {"measured": [measured("measure_loss", str(batch)) for batch in (1024, 4096, 16384)]},
        "teacher": lambda: measured("measure_teacher", "600", "5"),
    }
    options = parser(__doc__)
    options.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(runs)}; all when none is given")
    options.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 662_000])
    options.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.measure:
        print(json.dumps(globals()[given.measure[0]](*given.measure[1:])))
        return
    if unknown := set(given.sections) - set(runs):
        options.error(f"There is no section {sorted(unknown)}; the sections are {', '.join(runs)}.")
    for section in given.sections or runs:
        about = {"command": f"python benchmarks/scale.py {section}", "machine": machine()}
        keep(given.out, kept(given.out) | {section: {**about, **runs[section]()}})
    print("\n".join(tables(kept(given.out))))


if __name__ == "__main__":
    main()
