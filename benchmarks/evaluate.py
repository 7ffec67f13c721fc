"""Evaluation on MMEB-like tasks against two peers, each on the same rows, alternating in one process.

1. *published style*: a loop of our own writing that does what published evaluation scripts do: task after task, fixed
   batches in the given order, duplicates removed within a task only, logits of all positions computed;
2. *stock*: ``SentenceTransformer.encode`` over the same distinct inputs, at the same batch size.

The model is the demo's miniature, the tasks are the demo's six (VQA, classification, two retrievals, composed
retrieval, grounding), their first rows. Run ``make demo`` before. Writes `benchmarks/results/evaluate.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from peers import PublishedStyle
from unime_st import load_encoder
from unime_st.data import load_mmeb_eval
from unime_st.evaluation import MMEBEvaluator
from unime_st.fingerprint import fingerprint

TASKS = ("EmojiVQA", "EmojiClassification", "Emoji_t2i", "Emoji_i2t", "EmojiCIR", "EmojiGrounding")
RESULTS = Path(__file__).parent / "results"


def first_rows(source: Path, target: Path, rows: int) -> None:
    """Copy the first rows of each task."""
    for task in TASKS:
        (target / task).mkdir()
        for file in (source / task).glob("test-*.parquet"):
            pq.write_table(pq.read_table(file).slice(0, rows), target / task / file.name)


def evaluate_published_style(encode: PublishedStyle, root: Path, images: Path) -> dict[str, float]:
    """Evaluate task after task, duplicates removed within a task only."""
    scores = {}
    for task in TASKS:
        rows = list(load_mmeb_eval(root, task, image_root=images))
        as_they_come = [item for row in rows for item in (row["query"], *row["candidates"])]
        own = {json.dumps(item, sort_keys=True): item for item in as_they_come}
        embedded = dict(zip(own, encode(list(own.values())), strict=True))
        right = 0
        for row in rows:
            query = embedded[json.dumps(row["query"], sort_keys=True)]
            pool = np.stack([embedded[json.dumps(item, sort_keys=True)] for item in row["candidates"]])
            right += int((pool @ query).argmax() == 0)
        scores[task] = right / len(rows)
    return scores


def distinct_items(root: Path, images: Path) -> tuple[list[dict[str, str]], int, int]:
    """The distinct inputs of all tasks, how many there are within tasks, and with repetitions."""
    items: dict[str, dict[str, str]] = {}
    within, total = 0, 0
    for task in TASKS:
        own = set()
        for row in load_mmeb_eval(root, task, image_root=images):
            for item in (row["query"], *row["candidates"]):
                key = fingerprint(item)
                items.setdefault(key, item)
                own.add(key)
                total += 1
        within += len(own)
    return list(items.values()), within, total


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def alternating(contenders: dict[str, Callable[[], Any]], runs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each contender in each run, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for run in range(runs):
        order = list(contenders) if run % 2 == 0 else list(reversed(contenders))
        for name in order:
            taken, results[name] = timed(contenders[name])
            seconds[name].append(round(taken, 2))
            print(f"run {run + 1} of {runs}: {name} {taken:.1f} s", flush=True)
    return seconds, results


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times faster: ratio of medians, and the least and most of the paired runs."""
    pairs = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    medians = statistics.median(seconds[slow]) / statistics.median(seconds[fast])
    return {"ratio": round(medians, 2), "least": round(min(pairs), 2), "most": round(max(pairs), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo_output/unime-emoji-miniature"))
    parser.add_argument("--benchmark", type=Path, default=Path(".demo_cache/benchmark"))
    parser.add_argument("--rows", type=int, default=160, help="of each task (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="of each contender (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--published-batch-size", type=int, default=4, help="of the published-style loop")
    parser.add_argument("--output", type=Path, default=RESULTS / "evaluate.json")
    given = parser.parse_args()
    images = given.benchmark / "images"
    ours = load_encoder(str(given.checkpoint), device="cpu")
    stock = SentenceTransformer(str(given.checkpoint), device="cpu")
    published = PublishedStyle(given.checkpoint, given.published_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first_rows(given.benchmark / "eval" / "test" / "trained", root, given.rows)
        items, within, total = distinct_items(root, images)
        print(f"{total} inputs, {within} distinct within tasks, {len(items)} distinct", flush=True)

        def evaluate() -> dict[str, float]:
            ours[0].vision_cache.clear()
            evaluator = MMEBEvaluator(
                root, TASKS, image_root=images, batch_size=given.batch_size, meta_tasks={}, name=""
            )
            scores = evaluator(ours)
            return {task: scores[f"{task}_precision@1"] for task in TASKS}

        def encode(model: SentenceTransformer) -> np.ndarray:
            if model is ours:
                ours[0].vision_cache.clear()
            return model.encode(items, batch_size=given.batch_size, show_progress_bar=False)

        for model in (ours, stock):  # warm up
            model.encode(items[:8])
        published(items[:8])
        before = ours[0].prefixes.computed, ours[0].prefixes.tokens
        whole, scores = alternating(
            {
                "published style": lambda: evaluate_published_style(published, root, images),
                "unime_st": evaluate,
            },
            given.runs,
        )
        prefixes = ours[0].prefixes
        computed, tokens = (prefixes.computed - before[0]) // given.runs, (prefixes.tokens - before[1]) // given.runs
        encoding, embeddings = alternating(
            {"stock encode": lambda: encode(stock), "unime_st encode": lambda: encode(ours)}, given.runs
        )
        agreement = published(items[:200])
    result = {
        "command": f"python benchmarks/evaluate.py --rows {given.rows} --runs {given.runs}",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
        "inputs": {"total": total, "distinct within tasks": within, "distinct": len(items)},
        "tokens": {"of distinct inputs": tokens, "computed by the language model": computed},
        "batch size": {"unime_st and stock": given.batch_size, "published style": given.published_batch_size},
        "seconds": whole | encoding,
        "faster than the published-style loop": ratio(whole, "published style", "unime_st"),
        "faster than stock encode": ratio(encoding, "stock encode", "unime_st encode"),
        "precision@1": scores,
        "largest difference of an embedding": {
            "to stock": float(np.abs(embeddings["stock encode"] - embeddings["unime_st encode"]).max()),
            "to the published style": float(np.abs(agreement - embeddings["unime_st encode"][:200]).max()),
        },
        "peak memory of the process, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if "faster" in key or "largest" in key}, indent=1))
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
