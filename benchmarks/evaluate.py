"""Evaluation on MMEB-like tasks against two peers, each on the same rows, alternating in one process.

1. *published style*: a loop of our own writing that does what published evaluation scripts do: task after task, fixed
   batches in the given order, duplicates removed within a task only, logits of all positions computed;
2. *stock*: ``SentenceTransformer.encode`` over the same distinct inputs, at the same batch size.

The model is the demo's miniature, the tasks are the demo's six (VQA, classification, two retrievals, composed
retrieval, grounding), their first rows. Run ``make demo`` before. Writes `benchmarks/results/evaluate.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, machine, parser, peak_mb

# isort: split
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from measuring import alternating, times_as_fast
from peers import PublishedStyle
from unime_st import load_encoder
from unime_st.data import load_mmeb_eval
from unime_st.evaluation import MMEBEvaluator
from unime_st.fingerprint import fingerprint

TASKS = ("EmojiVQA", "EmojiClassification", "Emoji_t2i", "Emoji_i2t", "EmojiCIR", "EmojiGrounding")


def first_rows(source: Path, target: Path, rows: int) -> None:
    """Copy the first rows of each task."""
    for task in TASKS:
        (target / task).mkdir()
        for file in (source / task).glob("test-*.parquet"):
            pq.write_table(pq.read_table(file).slice(0, rows), target / task / file.name)


def inputs_of(root: Path, task: str, images: Path) -> list[list[Any]]:
    """The inputs of each row of a task: the query, then its candidates, the right one first."""
    return [[row["query"], *row["candidates"]] for row in load_mmeb_eval(root, task, image_root=images)]


def evaluate_published_style(encode: PublishedStyle, root: Path, images: Path) -> dict[str, float]:
    """Evaluate task after task, duplicates removed within a task only."""
    scores = {}
    for task in TASKS:
        rows = [[json.dumps(item, sort_keys=True) for item in row] for row in inputs_of(root, task, images)]
        own = dict.fromkeys(key for row in rows for key in row)
        embedded = dict(zip(own, encode([json.loads(key) for key in own]), strict=True))
        right = 0
        for query, *pool in rows:
            right += int((np.stack([embedded[key] for key in pool]) @ embedded[query]).argmax() == 0)
        scores[task] = right / len(rows)
    return scores


def distinct_items(root: Path, images: Path) -> tuple[list[Any], int, int]:
    """The distinct inputs of all tasks, how many there are within tasks, and with repetitions."""
    items: dict[str, Any] = {}
    within, total = 0, 0
    for task in TASKS:
        every = [item for row in inputs_of(root, task, images) for item in row]
        own = {fingerprint(item): item for item in every}
        items = own | items
        within, total = within + len(own), total + len(every)
    return list(items.values()), within, total


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> dict[str, float]:
    """How many times faster: ratio of medians, and the least and most of the paired runs."""
    found = times_as_fast(seconds, ours, peer)
    return {"ratio": found["times_as_fast"], "least": found["spread"][0], "most": found["spread"][1]}


class Contenders:
    """Ours, stock, and a published-style loop, of one checkpoint, on the tasks in a folder."""

    def __init__(self, given: Any, root: Path) -> None:
        self.ours = load_encoder(str(given.checkpoint), device="cpu")
        self.stock = SentenceTransformer(str(given.checkpoint), device="cpu")
        self.published = PublishedStyle(given.checkpoint, given.published_batch_size)
        self.root, self.images, self.batch = root, given.benchmark / "images", given.batch_size
        self.items, self.within, self.total = distinct_items(root, self.images)
        for model in (self.ours, self.stock):  # warm up
            model.encode(self.items[:8])
        self.published(self.items[:8])

    def evaluate(self) -> dict[str, float]:
        self.ours[0].vision_cache.clear()
        evaluator = MMEBEvaluator(
            self.root, TASKS, image_root=self.images, batch_size=self.batch, meta_tasks={}, name=""
        )
        scores = evaluator(self.ours)
        return {task: scores[f"{task}_precision@1"] for task in TASKS}

    def encode(self, model: SentenceTransformer) -> np.ndarray:
        if model is self.ours:
            model[0].vision_cache.clear()
        return model.encode(self.items, batch_size=self.batch, show_progress_bar=False)


def measured(given: Any, root: Path) -> dict[str, Any]:
    """Whole evaluations, then encoding alone, in turn by the wall clock."""
    all_of = Contenders(given, root)
    prefixes = all_of.ours[0].prefixes
    before = prefixes.computed, prefixes.tokens
    loop = partial(evaluate_published_style, all_of.published, root, all_of.images)
    whole, scores = alternating(
        {"published style": loop, "unime_st": all_of.evaluate}, given.runs, clock=time.perf_counter
    )
    computed, tokens = (prefixes.computed - before[0]) // given.runs, (prefixes.tokens - before[1]) // given.runs
    models = {"stock encode": all_of.stock, "unime_st encode": all_of.ours}
    encoders = {name: partial(all_of.encode, model) for name, model in models.items()}
    encoding, embeddings = alternating(encoders, given.runs, clock=time.perf_counter)
    ours, sample = embeddings["unime_st encode"], all_of.published(all_of.items[:200])
    return {
        "inputs": {"total": all_of.total, "distinct within tasks": all_of.within, "distinct": len(all_of.items)},
        "tokens": {"of distinct inputs": tokens, "computed by the language model": computed},
        "batch size": {"unime_st and stock": given.batch_size, "published style": given.published_batch_size},
        "seconds": whole | encoding,
        "faster than the published-style loop": ratio(whole, "unime_st", "published style"),
        "faster than stock encode": ratio(encoding, "unime_st encode", "stock encode"),
        "precision@1": scores,
        "largest difference of an embedding": {
            "to stock": float(np.abs(embeddings["stock encode"] - ours).max()),
            "to the published style": float(np.abs(sample - ours[:200]).max()),
        },
        "peak memory of the process, GB": round(peak_mb() / 1024, 2),
    }


def main() -> None:
    options = parser(__doc__, runs=2, output=RESULTS / "evaluate.json")
    options.add_argument("--checkpoint", type=Path, default=Path("demo_output/unime-emoji-miniature"))
    options.add_argument("--benchmark", type=Path, default=Path(".demo_cache/benchmark"))
    options.add_argument("--rows", type=int, default=160, help="of each task (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--published-batch-size", type=int, default=4, help="of the published-style loop")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first_rows(given.benchmark / "eval" / "test" / "trained", Path(folder), given.rows)
        found = measured(given, Path(folder))
    command = f"python benchmarks/evaluate.py --rows {given.rows} --runs {given.runs}"
    keep(given.output, {"command": command, "machine": machine(), **found})
    print(json.dumps({key: value for key, value in found.items() if "faster" in key or "largest" in key}, indent=1))


if __name__ == "__main__":
    main()
