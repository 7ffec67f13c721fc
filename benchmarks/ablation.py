"""What each part of the recipe is worth: the demo's second stage with one part changed at a time, on three seeds.

    python benchmarks/ablation.py            # all runs, two at a time; goes on where it was stopped

    python benchmarks/ablation.py --split validation --seeds 0   # what the demo's settings were chosen by

All runs have the same number of steps, batch size, learning rate, temperature, data and start, but for what a row's
name says, and are scored on concepts never trained on: those of the test split, by which nothing is chosen, or of the
validation split. Steps are fewer than in the demo. Writes `benchmarks/results/ablation.json` and `ablation.md` beside
it, or `ablation-validation`.
"""

from __future__ import annotations

from basics import RESULTS, keep, over_seeds, parser, percent, read, table

# isort: split
import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from emoji.settings import DemoSettings, StageSettings

SETTINGS = DemoSettings(
    num_hard_negatives=8,  # the paper's
    hard_negatives_warmup_steps=8,
    stage1=StageSettings(steps=30, batch_size=128, learning_rate=3e-4),
    stage2=StageSettings(steps=24, batch_size=256, learning_rate=3e-4),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "full recipe (all, then k=8; margin=0.1)": {},
    "k=8 from the first step": {"hard_negatives_warmup_steps": 0},
    "k=all": {"num_hard_negatives": None},
    "k=all, no stage 1": {"num_hard_negatives": None, "stage1": False},
    "stock loss after stage 1": {"stock": True},
    "stock loss, no stage 1": {"stock": True, "stage1": False},
    "k=all, no false-negative filter": {"num_hard_negatives": None, "filter": False, "margin": None},
    "k=32": {"num_hard_negatives": 32},
    "random instead of hard negatives": {"negative_selection": "random"},
    "margin=0.0": {"margin": 0.0},
    "temperature=0.02": {"temperature": 0.02},
    "temperature=0.02, stock loss after stage 1": {"temperature": 0.02, "stock": True},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 1e-4, stock loss after stage 1": {"learning_rate": 1e-4, "stock": True},
    "batch=32": {"batch_size": 32},
    "batch=32, stock loss after stage 1": {"batch_size": 32, "stock": True},
}
"""Name -> what differs from the full recipe. "stock": sentence-transformers' CachedMultipleNegativesRankingLoss and its
default batches; "filter": our batch sampler (equal contents are never negatives of each other, sampler or not)."""
STAGE = ("temperature", "learning_rate", "batch_size")
"""What a variant may change of `SETTINGS.stage2`."""
METRICS = ("text_to_image_recall@1", "image_to_text_recall@1", "attribute_swaps")
TRAINING = {"positive_similarity": 4, "hard_negative_similarity": 4, "false_negatives_filtered": None}
"""What is told of the training, where the loss logs it -> mean over so many last steps; None: over all."""


def run_one(name: str, seed: int, split: str, cache: Path, work: Path) -> dict[str, Any]:
    """Train and score one variant with one seed; kept in a file, so that it is done once."""
    kept = work / split / f"{seed}-{_slug(name)}.json"
    if kept.is_file():
        return read(kept)
    import torch
    from sentence_transformers.training_args import BatchSamplers

    from emoji.benchmark import EmojiBenchmark
    from emoji.training import hard_negative_loss, run_stage, stage2_rows
    from unime_st.modules import load_encoder
    from unime_st.samplers import FalseNegativeAwareBatchSampler

    torch.set_num_threads(1)
    changed = dict(VARIANTS[name])
    stage2 = replace(SETTINGS.stage2, **{key: changed.pop(key) for key in STAGE if key in changed})
    settings = replace(SETTINGS, seed=seed, stage2=stage2)
    benchmark = EmojiBenchmark(cache / "benchmark")
    stock, filtered = changed.pop("stock", False), changed.pop("filter", True)
    start = stage1(seed, cache, work) if changed.pop("stage1", True) else work / "checkpoints" / "start"
    loss = stock_loss(settings) if stock else hard_negative_loss(settings, **changed)
    folder = kept.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    trained = run_stage(
        "stage2",
        start,
        stage2_rows(benchmark),
        loss,
        stage2,
        settings,
        folder,
        batch_sampler=FalseNegativeAwareBatchSampler if filtered and not stock else BatchSamplers.BATCH_SAMPLER,
        save_strategy="no",
        disable_tqdm=True,
    )
    result = score(load_encoder(trained, device="cpu"), benchmark, split, settings, cache)
    result["log"] = [row for row in read(trained / "training_log.json")["log"] if "loss" in row]
    keep(kept, result)
    shutil.rmtree(folder)
    return result


def stock_loss(settings: DemoSettings) -> Callable[[Any], Any]:
    """Sentence-transformers' own loss of a model, with the stage's temperature, both ways."""
    from sentence_transformers.losses import CachedMultipleNegativesSymmetricRankingLoss

    options = {"scale": 1 / settings.stage2.temperature, "mini_batch_size": settings.mini_batch_size}
    return lambda model: CachedMultipleNegativesSymmetricRankingLoss(model, **options)


def stage1(seed: int, cache: Path, work: Path) -> Path:
    """The first stage of a seed, shared by its variants."""
    from emoji.benchmark import EmojiBenchmark
    from emoji.packages import fetch
    from emoji.pipeline import Demo

    demo = Demo(cache, work / f"seed{seed}", replace(SETTINGS, seed=seed))
    quiet = {"save_strategy": "no", "disable_tqdm": True}
    benchmark = EmojiBenchmark(cache / "benchmark")
    return demo.stage1(fetch(cache, print), benchmark, work / "checkpoints" / "start", **quiet)


def score(model: Any, benchmark: Any, split: str, settings: DemoSettings, cache: Path) -> dict[str, Any]:
    """Recall@1 both ways over a split's concepts by the trained vendors, and accuracy on their attribute swaps."""
    from emoji.measure import evaluate, hits
    from emoji.tasks import DRAWINGS

    found = evaluate(model, benchmark, split, settings, cache / "embeddings")
    ways = ("text_to_image", "image_to_text")
    recalls = {f"{way}_recall@1": hits(found["ranks"], DRAWINGS["trained"], "label", way).mean().item() for way in ways}
    return recalls | {"attribute_swaps": found["swaps"]["trained"]}


def prepare(cache: Path, work: Path) -> None:
    """Packages, benchmark and the start, shared by all runs."""
    from emoji.pipeline import Demo

    demo = Demo(cache, work, SETTINGS)
    demo.start(*demo.benchmark())


def summarise(runs: dict[str, dict[int, dict[str, Any]]], split: str = "test") -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds."""
    table = {}
    for name, by_seed in runs.items():
        row: dict[str, Any] = {"seeds": sorted(by_seed)}
        row |= {metric: over_seeds([by_seed[seed][metric] for seed in row["seeds"]]) for metric in METRICS}
        row["training"] = {key: _of_training(list(by_seed.values()), key, last) for key, last in TRAINING.items()}
        table[name] = row
    return {"split": split, "settings": asdict(SETTINGS), "table": table}


def _of_training(runs: list[dict[str, Any]], key: str, last: int | None) -> float | None:
    """Mean of a logged number over some last steps and all runs; None where the loss does not log it."""
    logs = [[float(row[key]) for row in run.get("log", []) if key in row] for run in runs]
    values = [value for log in logs for value in (log[-last:] if last else log)]
    return statistics.mean(values) if values else None


def markdown(summary: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# Ablation on unseen emoji concepts, {summary['split']} split",
        "",
        "`python benchmarks/ablation.py`; mean ± standard deviation over seeds, percent. Then, over the last four",
        "steps, the mean cosine of a query with its positive and with the negatives kept, and over all steps the",
        "candidates left out a row.",
        "",
    ]
    head = (
        "",
        "text→image R@1",
        "image→text R@1",
        "attribute swaps",
        "seeds",
        "cosine, positive",
        "negatives",
        "filtered",
    )
    rows = []
    for name, row in summary["table"].items():
        told = ["–" if value is None else f"{value:.2f}" for value in row["training"].values()]
        rows.append([name, *(percent(row[metric]) for metric in METRICS), len(row["seeds"]), *told])
    return "\n".join([*lines, *table(head, rows)]) + "\n"


def main() -> None:
    options = parser(__doc__, cache=True)
    options.add_argument("--work", type=Path, default=Path(".demo_cache/ablation"), help="checkpoints and single runs")
    options.add_argument("--split", choices=("test", "validation"), default="test", help="concepts to score on")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    options.add_argument("--collect", action="store_true", help="run nothing: the table of the runs that are kept")
    arguments = options.parse_args()
    work = arguments.work / SETTINGS.key(*asdict(SETTINGS))
    if not arguments.collect:
        prepare(arguments.cache, work)
        run_all(arguments, work)
    report(kept_runs(work / arguments.split), arguments.split)


def run_all(arguments: argparse.Namespace, work: Path) -> None:
    """Do the runs asked for that are not kept yet."""
    began = time.monotonic()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        stages = [pool.submit(stage1, seed, arguments.cache, work) for seed in arguments.seeds]
        for seed, stage in zip(arguments.seeds, stages, strict=True):
            print(f"stage 1, seed {seed}: {stage.result()}", flush=True)
        waiting = {
            pool.submit(run_one, name, seed, arguments.split, arguments.cache, work): (name, seed)
            for seed in arguments.seeds
            for name in arguments.variants
        }
        for number, done in enumerate(as_completed(waiting), start=1):
            name, seed = waiting[done]
            shown = ", ".join(f"{metric} {100 * done.result()[metric]:.1f}" for metric in METRICS)
            passed = time.monotonic() - began
            print(f"[{passed:5.0f} s] {number} of {len(waiting)}: {name}, seed {seed}: {shown}", flush=True)


def kept_runs(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Name -> seed -> result of the runs finished so far."""
    parts = [(file, *file.stem.split("-", 1)) for file in sorted(folder.glob("*.json"))]
    runs = {n: {int(seed): read(file) for file, seed, slug in parts if slug == _slug(n)} for n in VARIANTS}
    return {name: by_seed for name, by_seed in runs.items() if by_seed}


def report(runs: dict[str, dict[int, dict[str, Any]]], split: str) -> None:
    """Write the table as JSON and Markdown, and print it."""
    summary = summarise(runs, split)
    name = "ablation" if split == "test" else f"ablation-{split}"
    keep(RESULTS / f"{name}.json", summary)
    keep(RESULTS / f"{name}.md", markdown(summary))
    print(markdown(summary))


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name).strip("-")


if __name__ == "__main__":
    sys.exit(main())
