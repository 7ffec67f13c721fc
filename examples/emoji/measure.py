"""What one checkpoint, or the linear baseline, finds: the rank of each query's right answer, and intervals of means.

Ranks are kept query by query, so that two models are compared on the same queries.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import TRAINED_VENDORS, VENDORS
from emoji.settings import DemoSettings
from emoji.tasks import DRAWINGS
from unime_st.evaluation import ImageTextRetrievalEvaluator, SugarCrepeEvaluator

DRAWS = 2000  # of a bootstrap

Ranks = dict[str, dict[str, list[int]]]  # "google label" or "text keywords" -> direction -> rank of each query, from 1


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rank, from 1, of each query's own candidate by cosine, (N,); ties count against it."""
    scores = normalize(queries.double(), dim=1) @ normalize(candidates.double(), dim=1).T
    return (scores >= scores.diagonal()[:, None]).sum(1)


def all_ranks(images: Mapping[str, Tensor], texts: Mapping[str, Tensor], has: Mapping[str, Sequence[int]]) -> Ranks:
    """Ranks both ways between each vendor's drawings and each kind of text, and between labels and the other kinds.

    Args:
        images: vendor -> embeddings, row i of concept i. (N, D)
        texts: kind -> embeddings of the concepts that have such a text. (M, D)
        has: kind -> numbers of these concepts.
    """
    found: Ranks = {}
    for kind, said in texts.items():
        own = list(has[kind])
        for vendor, shown in images.items():
            both = {"text_to_image": ranks(said, shown[own]), "image_to_text": ranks(shown[own], said)}
            found[f"{vendor} {kind}"] = {way: rank.tolist() for way, rank in both.items()}
        if kind != "label":
            found[f"text {kind}"] = {"text_to_text": ranks(texts["label"][own], said).tolist()}
    return found


def hits(found: Ranks, vendors: Sequence[str], kind: str, way: str, k: int = 1) -> np.ndarray:
    """Share of these vendors whose query is answered within rank k, concept by concept, (N,)."""
    return np.mean([np.array(found[f"{vendor} {kind}"][way]) <= k for vendor in vendors], axis=0)


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of a value a concept, its standard error, and the middle 95 % of the means of resampled concepts.

    Example:
        >>> found = interval(np.array([1.0, 0.0, 1.0, 0.0] * 25))
        >>> found["mean"], round(found["error"], 2), found["low"] < 0.45, found["high"] > 0.55
        (0.5, 0.05, True, True)
    """
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    error = values.std(ddof=1) / len(values) ** 0.5
    return {"mean": float(values.mean()), "error": float(error), "low": float(low), "high": float(high)}


def retrieval(
    benchmark: EmojiBenchmark, split: str, vendor: str, cache: Path, **options: Any
) -> ImageTextRetrievalEvaluator:
    """Both directions over the plain drawings of a split's concepts, by one vendor."""
    images, captions = benchmark.retrieval(split, vendor)
    return ImageTextRetrievalEvaluator(
        images, captions, name=split, cache_dir=cache, show_progress_bar=True, write_csv=False, **options
    )


def swaps(
    benchmark: EmojiBenchmark, split: str, drawings: str, cache: Path, settings: DemoSettings
) -> SugarCrepeEvaluator:
    """Attribute swaps of a split: `settings.swap_limit` rows of each set, the same for all models."""
    sets = {}
    for name, file in benchmark.swaps(split, drawings).items():
        rows = list(json.loads(file.read_text(encoding="utf-8")).values())
        drawn = random.Random(0).sample(rows, min(len(rows), settings.swap_limit))
        sets[name] = [
            (benchmark.image_root / row["filename"], row["caption"], row["negative_caption"]) for row in drawn
        ]
    return SugarCrepeEvaluator(sets, cache_dir=cache, show_progress_bar=True, write_csv=False, name="")


def evaluate(
    model: SentenceTransformer, benchmark: EmojiBenchmark, split: str, settings: DemoSettings, cache: Path
) -> dict[str, Any]:
    """All numbers of one checkpoint on a split.

    Returns:
        "ranks" of `all_ranks`; "shuffled": ranks of labels' drawings, by the first trained vendor, after the drawings
        were shuffled; "swaps": kind of drawings -> mean accuracy of its sets; "cone": mean cosine of different labels.
    """
    said = benchmark.texts(split)
    has = {kind: [place for place, text in enumerate(own) if text] for kind, own in said.items()}
    texts = {kind: torch.from_numpy(model.encode([text for text in own if text])) for kind, own in said.items()}
    images = {}
    for vendor in VENDORS:
        paths, _ = benchmark.retrieval(split, vendor)
        images[vendor] = torch.from_numpy(model.encode([{"image": str(path)} for path in paths]))
    labels, shown = texts["label"], images[TRAINED_VENDORS[0]]
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(settings.seed))
    different = ~torch.eye(len(labels), dtype=torch.bool)
    preferred = {drawings: swaps(benchmark, split, drawings, cache, settings)(model) for drawings in DRAWINGS}
    return {
        "ranks": all_ranks(images, texts, has),
        "shuffled": ranks(labels, shown[order]).tolist(),
        "swaps": {drawings: values["mean_of_sets_accuracy"] for drawings, values in preferred.items()},
        "cone": (labels @ labels.T)[different].mean().item(),
    }
