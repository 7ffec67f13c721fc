"""What each part of stage 2 is worth: the demo's second stage with one part changed at a time, on five paired seeds.

    python benchmarks/ablation.py                 # all runs; goes on where it was stopped
    python benchmarks/ablation.py --batch 512     # the same in larger batches

All runs of a batch size have the same steps, learning rate, temperature, data and start, but for what a row's name
says, and are scored on concepts never trained on: those of the test split, by which nothing is chosen, or of the
validation split. Steps are fewer than in the demo. Differences are paired by seed and by concept. Writes
`benchmarks/results/ablation.json` and `ablation.md` beside it, or `ablation-validation`.
"""

from __future__ import annotations

from basics import RESULTS, compared, difference, keep, kept, machine, over_seeds, parser, percent, table

# isort: split
import argparse
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from emoji.settings import DemoSettings, StageSettings

SETTINGS = DemoSettings(
    num_hard_negatives=8,  # the paper's
    hard_negatives_warmup_steps=8,
    stage1=StageSettings(steps=30, batch_size=128, learning_rate=3e-4),
    stage2=StageSettings(steps=24, batch_size=256, learning_rate=3e-4),
)
EVERY = {"num_hard_negatives": None, "hard_negatives_warmup_steps": 0}
STOCK, ALL, WARMED = "stock loss", "all negatives, both filters", "k = 8 after 8 steps of all"
ALONE = f"{ALL}, no stage 1"
VARIANTS: dict[str, dict[str, Any]] = {
    STOCK: {"stock": True},
    ALL: EVERY,
    "k = 8 from the first step": {"hard_negatives_warmup_steps": 0},
    WARMED: {},
    "8 at random": {"hard_negatives_warmup_steps": 0, "negative_selection": "random"},
    "all negatives, hard rows together": EVERY | {"hard_rows": 4},
    ALONE: EVERY | {"stage1": False},
    "stock loss, no stage 1": {"stock": True, "stage1": False},
}
"""Name -> what differs from the paper's recipe with a warm-up. "stock": sentence-transformers' cached symmetric ranking
loss and its default batches; "hard_rows": how many of each row's hardest ones, by the text teacher, the sampler puts
into its batch."""
ASKED = {
    "text→image": ("trained", "label", "text_to_image"),
    "image→text": ("trained", "label", "image_to_text"),
    "keywords→image": ("trained", "keywords", "text_to_image"),
    "definition→image": ("trained", "definition", "text_to_image"),
    "text→image, held-out vendor": ("heldout", "label", "text_to_image"),
}
"""What is asked -> whose drawings, kind of text and direction; the score is the reciprocal rank."""
SWAPS = "attribute swaps"


def run_one(name: str, seed: int, batch: int, split: str, cache: Path, work: Path) -> dict[str, Any]:
    """Train and score one variant with one seed; kept in a file, so that it is done once."""
    file = work / f"{split}-{batch}" / f"{seed} {name}.json"
    if found := kept(file):
        return found
    import torch
    from sentence_transformers.training_args import BatchSamplers

    from emoji.benchmark import EmojiBenchmark
    from emoji.measure import evaluate
    from emoji.training import hard_negative_loss, run_stage, stage2_rows
    from unime_st.modules import load_encoder
    from unime_st.samplers import FalseNegativeAwareBatchSampler

    torch.set_num_threads(1)
    changed = dict(VARIANTS[name])
    settings = replace(SETTINGS, seed=seed, stage2=replace(SETTINGS.stage2, batch_size=batch))
    benchmark = EmojiBenchmark(cache / "benchmark")
    start = stage1(seed, cache, work) if changed.pop("stage1", True) else work / "checkpoints" / "start"
    stock, hard_rows = changed.pop("stock", False), changed.pop("hard_rows", 0)
    sampler: Any = BatchSamplers.BATCH_SAMPLER if stock else FalseNegativeAwareBatchSampler
    rows = stage2_rows(benchmark)
    if hard_rows:
        guide = guide_embeddings(rows, cache, work)
        sampler = partial(sampler, guide_queries=guide, guide_targets=guide, hard_negatives_together=hard_rows)
    trained = run_stage(
        "stage2",
        start,
        rows,
        stock_loss(settings) if stock else hard_negative_loss(settings, **changed),
        settings.stage2,
        settings,
        file.with_suffix(""),
        batch_sampler=sampler,
        save_strategy="no",
        disable_tqdm=True,
    )
    found = evaluate(load_encoder(trained, device="cpu"), benchmark, split, settings, cache / "embeddings")
    made = {"scores": scores(found["ranks"]), SWAPS: found["swaps"]["trained"], "cone": found["cone"]}
    keep(file, made)
    shutil.rmtree(file.with_suffix(""))
    return made


def scores(found: dict[str, Any]) -> dict[str, list[float]]:
    """What is asked -> mean reciprocal rank of each concept over the vendors, (N,)."""
    from emoji.tasks import DRAWINGS

    return {
        asked: np.mean([1 / np.array(found[f"{vendor} {kind}"][way]) for vendor in DRAWINGS[whose]], axis=0).tolist()
        for asked, (whose, kind, way) in ASKED.items()
    }


def stock_loss(settings: DemoSettings) -> Callable[[Any], Any]:
    """Sentence-transformers' own loss of a model, with the stage's temperature, both ways."""
    from sentence_transformers.losses import CachedMultipleNegativesSymmetricRankingLoss

    options = {"scale": 1 / settings.stage2.temperature, "mini_batch_size": settings.mini_batch_size}
    return lambda model: CachedMultipleNegativesSymmetricRankingLoss(model, **options)


def guide_embeddings(rows: Any, cache: Path, work: Path) -> str:
    """A file of the text teacher's embeddings of each row's label, (N, D)."""
    from emoji.miniature import text_teacher
    from emoji.packages import fetch
    from unime_st.data import teacher_embeddings

    file = work / "guide.npy"
    if not file.is_file():
        labels = [label["text"] for label in rows["positive"]]
        np.save(file, np.asarray(teacher_embeddings(text_teacher(fetch(cache, print)), labels, cache / "teacher")))
    return str(file)


def stage1(seed: int, cache: Path, work: Path) -> Path:
    """The first stage of a seed, shared by its variants."""
    from emoji.benchmark import EmojiBenchmark
    from emoji.packages import fetch
    from emoji.pipeline import Demo

    demo = Demo(cache, work / f"seed{seed}", replace(SETTINGS, seed=seed))
    quiet = {"save_strategy": "no", "disable_tqdm": True}
    benchmark = EmojiBenchmark(cache / "benchmark")
    return demo.stage1(fetch(cache, print), benchmark, work / "checkpoints" / "start", **quiet)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Scores over seeds, and of two seeds or more the paired differences from the stock loss, and of stage 1."""
    rows = {}
    for name, found in runs.items():
        values = {asked: [float(np.mean(run["scores"][asked])) for run in found] for asked in ASKED}
        values |= {key: [run[key] for run in found] for key in (SWAPS, "cone")}
        rows[name] = {key: over_seeds(each) for key, each in values.items()}
    pairs = [(name, STOCK) for name in runs if name != STOCK and STOCK in runs]
    pairs += [(ALL, ALONE)] if {ALL, ALONE} <= set(runs) else []
    told = {f"{one} − {other}": paired(runs[one], runs[other]) for one, other in pairs if len(runs[one]) > 1}
    return {"rows": rows, "differences": told}


def paired(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """What is asked -> difference of the same seeds, with its interval over seeds and concepts."""

    def values(runs: list[dict[str, Any]], asked: str) -> np.ndarray:
        return np.array([[run[asked]] if asked == SWAPS else run["scores"][asked] for run in runs])

    return {asked: difference(values(ours, asked), values(reference, asked)) for asked in (*ASKED, SWAPS)}


def markdown(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [
        f"# Ablation on unseen emoji concepts, {results['split']} split",
        "",
        "`python benchmarks/ablation.py`: mean reciprocal rank, and accuracy on attribute swaps, in percent, mean ±",
        "standard deviation over seeds; the cone is the mean cosine of different labels. Differences are paired by",
        "seed and concept, with the interval of 95 % over resampled seeds and concepts (swaps: seeds), bold where it",
        "leaves out 0.",
    ]
    for batch, found in results["batches"].items():
        lines += ["", f"## Batches of {batch}", "", *tables(found)]
    return "\n".join(lines) + "\n"


def tables(found: dict[str, Any]) -> list[str]:
    """The lines of the two tables of a batch size: scores, differences."""
    head = ["", *ASKED, SWAPS]
    rows = [
        [name, *(percent(row[asked]) for asked in head[1:]), f"{row['cone']['mean']:.2f}", len(row["cone"]["values"])]
        for name, row in found["rows"].items()
    ]
    differences = [[name, *map(compared, row.values())] for name, row in found["differences"].items()]
    return [*table([*head, "cone", "seeds"], rows), "", *table(head, differences)]


def main() -> None:
    options = parser(__doc__, cache=True)
    options.add_argument("--work", type=Path, default=Path(".demo_cache/ablation"), help="checkpoints and single runs")
    options.add_argument("--split", choices=("test", "validation"), default="test", help="concepts to score on")
    options.add_argument("--batch", type=int, default=SETTINGS.stage2.batch_size, help="pairs a step")
    options.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = options.parse_args()
    work = given.work / SETTINGS.key(*asdict(SETTINGS))
    runs = run_all(given, work)
    file = RESULTS / ("ablation.json" if given.split == "test" else f"ablation-{given.split}.json")
    results = kept(file) or {"split": given.split, "batches": {}}
    results |= {"command": "python benchmarks/ablation.py", "settings": asdict(SETTINGS), "machine": machine()}
    results["batches"][str(given.batch)] = summarise(runs)
    keep(file, results)
    keep(file.with_suffix(".md"), markdown(results))
    print(markdown(results))


def run_all(given: argparse.Namespace, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Name -> results by seed of the runs asked for; those that are kept are not done again."""
    from emoji.pipeline import Demo

    demo, began = Demo(given.cache, work, SETTINGS), time.monotonic()
    demo.start(*demo.benchmark())
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(stage1, given.seeds, *([each] * len(given.seeds) for each in (given.cache, work))))
        waiting = {
            pool.submit(run_one, name, seed, given.batch, given.split, given.cache, work): (name, seed)
            for seed in given.seeds
            for name in given.variants
        }
        for number, done in enumerate(as_completed(waiting), start=1):
            name, seed = waiting[done]
            told = ", ".join(f"{asked} {100 * np.mean(each):.1f}" for asked, each in done.result()["scores"].items())
            passed = time.monotonic() - began
            print(f"[{passed:5.0f} s] {number} of {len(waiting)}: {name}, seed {seed}: {told}", flush=True)
    made = {key: done.result() for done, key in waiting.items()}
    return {name: [made[name, seed] for seed in given.seeds] for name in given.variants}


if __name__ == "__main__":
    sys.exit(main())
