"""Growth in rows, batch and dimension of what runs beside the model, each measurement in a process of its own.

1. ``sampler``: set-up, first epoch's plan, time a batch and peak memory of ``FalseNegativeAwareBatchSampler`` at 10k,
   100k and 662k rows x 256 dimensions, from made-up clustered guide embeddings with natural conflicts, repeated
   targets and labels and 20 data sets; mixed and homogeneous batches, with and without hard negatives together.
2. ``loss``: ``HardNegativeInfoNCELoss`` alone, forward and backward, at global batches of 1k, 4k and 16k; its peak
   memory beside what a tensor of (N, 1 + k, D) would take.
3. ``teacher``: ``teacher_embeddings`` on an empty cache beside bare ``encode`` of the same distinct texts.

``python benchmarks/scale.py [sampler] [loss] [teacher]`` runs all or some, writes `benchmarks/results/scale.json`,
where sections that were not run stay, and prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from memory import peak_above

RESULTS = Path(__file__).parent / "results" / "scale.json"
SECTIONS = ("sampler", "loss", "teacher")
DIM = 256
SUBSETS = 20
GLOBAL_BATCH = (8, 8)  # processes, rows a batch on each
VARIANTS = {
    "mixed": {},
    "mixed, hard negatives together": {"hard_negatives_together": 2},
    "homogeneous": {"homogeneous": True},
    "homogeneous, hard negatives together": {"homogeneous": True, "hard_negatives_together": 2},
}


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


# --- sampler ---------------------------------------------------------------------------------------------------------


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
    sides = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (rows, DIM)) for name in ("q", "t")
    }
    for start in range(0, rows, 32768):
        part = slice(start, min(rows, start + 32768))
        for name, generator_seed, levels in (("q", 1, (0.3, 0.3)), ("t", 2, (0.3, 1.5))):
            sides[name][part] = noisy(centres[topic[part]], start, generator_seed, levels)
    for side in sides.values():
        side.flush()
    repeated = np.flatnonzero(target != np.arange(rows))
    sides["t"][repeated] = sides["t"][target[repeated]]
    sides["t"].flush()
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

    columns = {
        "anchor": items(
            pa.array(f"images/{row}.jpg" for row in range(rows)), (f"what is {row % 97}" for row in range(rows))
        ),
        "positive": items(pa.nulls(rows, pa.string()), (f"answer {number}" for number in target)),
        "label": pa.array(np.where(np.arange(rows) % 10 == 0, topic, target + len(topic))),
        "subset": pa.array(f"set {number}" for number in subset),
    }
    return Dataset(pa.table(columns)).with_transform(without_subset)


def measure_sampler(folder: str, variant: str) -> dict[str, Any]:
    """Set-up is all up to the length, plan the first epoch's, both from nothing kept."""
    from unime_st.samplers import FalseNegativeAwareBatchSampler

    dataset, (world, batch) = make_dataset(Path(folder)), GLOBAL_BATCH
    before_mb, cpu, started = peak_mb(), time.process_time(), time.perf_counter()
    sampler = FalseNegativeAwareBatchSampler(
        dataset,
        batch,
        drop_last=True,
        valid_label_columns=["label"],
        world_size=world,
        guide_queries=f"{folder}/q.npy",
        guide_targets=f"{folder}/t.npy",
        **VARIANTS[variant],
    )
    guided = time.perf_counter() - started
    length = len(sampler)
    set_up = time.perf_counter() - started
    batches = iter(sampler)
    first = next(batches)
    planned = time.perf_counter() - started
    iterating = time.perf_counter()
    drawn = len(first) + sum(len(rows) for rows in batches)
    a_batch = (time.perf_counter() - iterating) / max(1, length - 1)
    total_cpu, peak = time.process_time() - cpu, peak_mb()
    sampler.set_epoch(1)
    again = time.perf_counter()
    next(iter(sampler))
    return {
        "rows": len(dataset),
        "variant": variant,
        "neighbours_s": round(guided, 2),
        "set_up_s": round(set_up, 2),
        "set_up_and_first_plan_s": round(planned, 2),
        "cpu_s": round(total_cpu, 2),
        "next_epoch_plan_s": round(time.perf_counter() - again, 2),
        "batch_us": round(a_batch * 1e6, 1),
        "peak_mb": peak,
        "before_mb": before_mb,
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
            found += [in_process("measure_sampler", str(folder), variant) for variant in VARIANTS]
            for file in folder.glob("*.npy"):
                file.unlink()
    growth = {variant: growth_exponents([one for one in found if one["variant"] == variant]) for variant in VARIANTS}
    return {"global_batch": GLOBAL_BATCH, "dim": DIM, "measured": found, "growth_in_n_log_n": growth}


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


# --- loss ------------------------------------------------------------------------------------------------------------


def measure_loss(batch: str, dim: str = "1024", negatives: str = "8") -> dict[str, Any]:
    """The loss from embeddings that are there, and its gradient; peak memory over what was there before."""
    import torch

    from unime_st.losses import HardNegativeInfoNCELoss

    rows, width, k = int(batch), int(dim), int(negatives)
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
        "global_batch": rows,
        "dim": width,
        "num_hard_negatives": k,
        "loss": round(float(value.detach()), 4),
        "columns_with_gradient": gradients,
        "seconds": round(seconds, 2),
        "peak_above_inputs_mb": round(peak.bytes / 2**20, 1),
        "a_tensor_n_1k_d_mb": round(rows * (1 + k) * width * 4 / 2**20, 1),
        "score_matrix_mb": round(rows * rows * 4 / 2**20, 1),
    }


def run_loss() -> dict[str, Any]:
    return {"measured": [in_process("measure_loss", str(batch)) for batch in (1024, 4096, 16384)]}


# --- teacher ---------------------------------------------------------------------------------------------------------


def measure_teacher(texts: str, runs: str) -> dict[str, Any]:
    """Alternating: embeddings of a data set into an empty cache, and bare encode of its distinct texts."""
    import torch

    from unime_st.data import teacher_embeddings

    logging.disable(logging.WARNING)
    teacher, name = load_teacher()
    rng = np.random.default_rng(0)
    words = [
        f"{a}{b}" for a in ("red", "blue", "old", "new", "tall") for b in (" bus", " cat", " tree", " boat", " sky")
    ]
    distinct = [
        f"{number}: " + " ".join(rng.choice(words, int(rng.integers(3, 12)))) + "." for number in range(int(texts))
    ]
    with torch.inference_mode():
        teacher.encode(distinct[:64], batch_size=32)
    seconds: dict[str, list[float]] = {"cache": [], "encode": []}
    for run in range(int(runs)):
        for contender in ("cache", "encode") if run % 2 == 0 else ("encode", "cache"):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                if contender == "cache":
                    teacher_embeddings(teacher, distinct, folder, batch_size=32)
                else:
                    teacher.encode(distinct, batch_size=32)
                seconds[contender].append(round(time.perf_counter() - started, 2))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "teacher": name,
        "texts": len(distinct),
        "seconds": seconds,
        "cache_over_encode": round(medians["cache"] / medians["encode"], 3),
    }


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
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=len(special)
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        body = Transformer(folder)
    return SentenceTransformer(modules=[body, Pooling(384)], device="cpu")


def run_teacher() -> dict[str, Any]:
    return in_process("measure_teacher", "600", "5")


# --- all -------------------------------------------------------------------------------------------------------------


def in_process(function: str, *arguments: str) -> dict[str, Any]:
    """Run a function of this file in a process of its own, whose peak memory is then its own."""
    command = [sys.executable, __file__, "--measure", function, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{function} {arguments}: {result}", file=sys.stderr, flush=True)
    return result


def tables(results: dict[str, Any]) -> Iterator[str]:
    if "sampler" in results:
        yield "| rows | batches | set-up and plan | CPU | next plan | a batch | peak | recall |"
        yield "|---:|---|---:|---:|---:|---:|---:|---|"
        for one in results["sampler"]["measured"]:
            recall = ", ".join(f"{name} {value:.3f}" for name, value in one["recall"].items()) or "exact"
            yield (
                f"| {one['rows']:,} | {one['variant']} | {one['set_up_and_first_plan_s']} s | {one['cpu_s']} s "
                f"| {one['next_epoch_plan_s']} s | {one['batch_us']} µs | {one['peak_mb']:,.0f} MB | {recall} |"
            )
        yield ""
    if "loss" in results:
        yield "| global batch | seconds | peak above inputs | an (N, 1+k, D) tensor | the scores |"
        yield "|---:|---:|---:|---:|---:|"
        for one in results["loss"]["measured"]:
            yield (
                f"| {one['global_batch']:,} | {one['seconds']} | {one['peak_above_inputs_mb']:,.0f} MB "
                f"| {one['a_tensor_n_1k_d_mb']:,.0f} MB | {one['score_matrix_mb']:,.0f} MB |"
            )
        yield ""
    if "teacher" in results:
        one = results["teacher"]
        yield f"Teacher cache over bare encode, {one['texts']:,} texts ({one['teacher']}): {one['cache_over_encode']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {SECTIONS}; all when none is given")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 662_000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(globals()[options.measure[0]](*options.measure[1:])))
        return
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"There is no section {sorted(unknown)}; the sections are {SECTIONS}.")
    runs = {"sampler": lambda: run_sampler(options.rows), "loss": run_loss, "teacher": run_teacher}
    for section in options.sections or SECTIONS:
        found = runs[section]()
        results = json.loads(options.out.read_text()) if options.out.exists() else {}
        results[section] = {
            "command": f"python benchmarks/scale.py {section}",
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
            **found,
        }
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(tables(json.loads(options.out.read_text()))))


if __name__ == "__main__":
    main()
