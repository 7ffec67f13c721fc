"""Evaluating one checkpoint on the emoji benchmark, through the evaluators a user runs on MMEB."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import HELD_OUT_VENDOR, TRAINED_VENDORS
from emoji.settings import DemoSettings
from unime_st.evaluation import ImageTextRetrievalEvaluator, MMEBEvaluator, SugarCrepeEvaluator

VENDOR_OF = {"trained": TRAINED_VENDORS[0], "heldout": HELD_OUT_VENDOR}
"""Kind of drawings -> the vendor whose drawings the retrieval lists show."""


def retrieval(
    benchmark: EmojiBenchmark, split: str, drawings: str, cache: Path, **options: Any
) -> ImageTextRetrievalEvaluator:
    """Both directions over the plain drawings of a split's concepts, by one vendor."""
    images, captions = benchmark.retrieval(split, VENDOR_OF[drawings])
    return ImageTextRetrievalEvaluator(
        images,
        captions,
        name=f"{split}_{drawings}",
        cache_dir=cache,
        show_progress_bar=True,
        write_csv=False,
        **options,
    )


def swaps(  # noqa: PLR0917
    benchmark: EmojiBenchmark,
    split: str,
    drawings: str,
    cache: Path,
    settings: DemoSettings,
    names: Collection[str] | None = None,
) -> SugarCrepeEvaluator:
    """Attribute swaps of a split: `settings.swap_limit` rows of each set (of these names), the same for all models."""
    sets = {}
    for name, file in benchmark.swaps(split, drawings).items():
        if names is not None and name not in names:
            continue
        rows = list(json.loads(file.read_text(encoding="utf-8")).values())
        drawn = random.Random(0).sample(rows, min(len(rows), settings.swap_limit))
        sets[name] = [
            (benchmark.image_root / row["filename"], row["caption"], row["negative_caption"]) for row in drawn
        ]
    return SugarCrepeEvaluator(sets, cache_dir=cache, show_progress_bar=True, write_csv=False, name="")


def evaluate(
    model: SentenceTransformer, benchmark: EmojiBenchmark, settings: DemoSettings, cache: Path
) -> dict[str, Any]:
    """All numbers of one checkpoint on the test split.

    Returns:
        Kind of drawings -> "mmeb", "retrieval" and "swaps" -> metric -> value in [0, 1]; and "shuffled" -> retrieval
        metric -> value after the images were shuffled among the captions.
    """
    results: dict[str, Any] = {}
    for drawings in VENDOR_OF:
        mmeb = MMEBEvaluator(
            benchmark.eval_root("test", drawings),
            tasks=list(benchmark.meta_tasks),
            meta_tasks=benchmark.meta_tasks,
            image_root=benchmark.image_root,
            limit=settings.eval_limit,
            cache_dir=cache,
            show_progress_bar=True,
            write_csv=False,
            name="",
        )
        results[drawings] = {
            "mmeb": mmeb(model),
            "retrieval": retrieval(benchmark, "test", drawings, cache)(model),
            "swaps": swaps(benchmark, "test", drawings, cache, settings)(model),
        }
    shuffled = retrieval(benchmark, "test", "trained", cache, shuffle_images_seed=settings.seed)
    return results | {"shuffled": shuffled(model)}


def metric(results: dict[str, float], ending: str) -> float:
    """The metric of this name, or the only one whose name ends so after a prefix."""
    if ending in results:
        return results[ending]
    found = [value for name, value in results.items() if name.endswith(f"_{ending}")]
    if len(found) != 1:
        raise KeyError(f"{len(found)} metrics end in {ending!r}: {sorted(results)}")
    return found[0]
