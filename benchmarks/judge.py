"""Judging the candidates of a query: `predict` of a reranker of ours against stock `CrossEncoder.predict`.

    python benchmarks/judge.py

One query of an image and a text, and 50 candidates: texts of 3 to 30 words, or images, each shown twice, with a text.
The model is a random Qwen2-VL of the shares of Qwen2-VL-2B (`small_models.small_qwen2_vl`), whose words are tokens; the
query's image has 256 of them. Stock code is given the same exported folder, at the batch size at which it is fastest,
found first, once each. Both alternate in one process, on one thread, and CPU time counts; the cache of vision features
is emptied before each run. The ratio that the arithmetic allows for is beside it: multiplications of the weights by
tokens and patches, of stock rows without padding over ours with everything shared computed once. Scores must be equal
within 1e-5. Writes `benchmarks/results/judge.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, machine, parser

# isort: split
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder

from measuring import alternating, times_as_fast
from small_models import small_qwen2_vl
from unime_st.modules import build_reranker, export_reranker, load_reranker
from unime_st.modules.speed.prefixes import language_model
from unime_st.modules.speed.vision_cache import vision_tower
from unime_st.placement import with_every_image
from unime_st.rerank_prompts import PAIR_PROMPTS

CANDIDATES = 50
SIZES = (1, 2, 4, 16, 50)
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "white", "grey", "brown", "pink")
NOUNS = ("bus", "boat", "tree", "house", "cat", "bird", "train", "table", "lamp", "river")
TOLERANCE = 1e-5


def vocabulary() -> list[str]:
    """The words of the prompt and of the workload, each one token."""
    asked = PAIR_PROMPTS["unime_v2"]
    told = f"{asked.before_query} {asked.before_candidate}".replace("'", " ").replace(".", " ").replace(";", " ")
    return sorted({*told.replace(":", " ").replace(",", " ").split(), *COLOURS, *NOUNS, "which", "shows", "the", "and"})


def picture(generator: random.Random, side: int) -> Image.Image:
    pixels = np.frombuffer(generator.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
    return Image.fromarray(pixels).resize((side, side))


def text(generator: random.Random) -> str:
    return " ".join(generator.choice((*COLOURS, *NOUNS)) for _ in range(generator.randint(3, 30)))


def workloads() -> dict[str, list[tuple[Any, Any]]]:
    generator = random.Random(0)
    query = {"image": picture(generator, 448), "text": "which shows the red bus and the boat"}
    texts = [text(generator) for _ in range(CANDIDATES)]
    images = [picture(generator, 112) for _ in range(CANDIDATES // 2)]
    shown = [{"image": images[number % len(images)], "text": words} for number, words in enumerate(texts)]
    return {
        "text candidates": [(query, words) for words in texts],
        "image+text candidates": [(query, c) for c in shown],
    }


def products(model: Any, pairs: list[tuple[Any, Any]]) -> dict[str, float]:
    """Multiplications, in billions, of weights by tokens and patches: for each pair by itself, and with all shared."""
    encoder = model[0]
    decoder, tower = language_model(encoder.model), vision_tower(encoder.model)
    weights = {
        name: sum(p.numel() for part, p in module.named_parameters() if p.ndim > 1 and "embed_tokens" not in part)
        for name, module in (("tokens", decoder), ("patches", tower))
    }
    contents = [tuple(content_of(half) for half in pair) for pair in pairs]
    features = encoder.preprocess([pair for pair, _ in zip(pairs, contents, strict=True)], contents=contents)
    keys, mask = features["prefix_key"], features["attention_mask"].bool()
    rows = [row[own].tolist() for row, own in zip(keys, mask, strict=True)]
    beginnings = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    grids = [int(grid.prod()) for grid in with_every_image(features)["image_grid_thw"]]
    media = [medium for pair in contents for content in pair for medium in content.media]
    alone = dict(zip(media, grids, strict=True))
    by_itself = sum(map(len, rows)) * weights["tokens"] + sum(grids) * weights["patches"]
    shared = len(beginnings) * weights["tokens"] + sum(alone.values()) * weights["patches"]
    return {
        "tokens_by_itself": sum(map(len, rows)), "tokens_shared": len(beginnings),
        "patches_by_itself": sum(grids), "patches_shared": sum(alone.values()),
        "billions_by_itself": round(by_itself / 1e9, 2), "billions_shared": round(shared / 1e9, 2),
        "limit": round(by_itself / shared, 2),
    }  # fmt: skip


def content_of(half: Any) -> Any:
    from unime_st.modules.inputs import contents_of  # an internal, for the arithmetic alone

    return contents_of([half], [0])[0]


def main() -> None:
    arguments = parser(__doc__, runs=7, output=RESULTS / "judge.json").parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_qwen2_vl(folder / "backbone", words=["Yes", "No", *vocabulary()])
        export_reranker(build_reranker(folder / "backbone", device="cpu"), folder / "reranker")
        stock = CrossEncoder(str(folder / "reranker"), device="cpu")
        ours = load_reranker(folder / "reranker", device="cpu")

        def judged(pairs: list[tuple[Any, Any]]) -> np.ndarray:
            ours[0].vision_cache.clear()
            return ours.predict(pairs, batch_size=CANDIDATES, show_progress_bar=False)

        found = {}
        for kind, pairs in workloads().items():
            print(kind, flush=True)

            def stock_judged(size: int, given: list[tuple[Any, Any]] = pairs) -> np.ndarray:
                return stock.predict(given, batch_size=size, show_progress_bar=False)

            sizes: dict[str, Callable[[], Any]] = {str(size): partial(stock_judged, size) for size in SIZES}
            tried = {size: seconds[0] for size, seconds in alternating(sizes, 1)[0].items()}
            best = int(min(tried, key=lambda size: tried[size]))
            contenders = {"unime_st": partial(judged, pairs), "stock": partial(stock_judged, best)}
            seconds, scores = alternating(contenders, arguments.runs)
            difference = float(np.abs(scores["unime_st"] - scores["stock"]).max())
            if difference > TOLERANCE or np.ptp(scores["stock"]) < 1e-2:
                raise ValueError(f"{kind}: scores differ by {difference:.2g}, and spread by {np.ptp(scores['stock'])}.")
            found[kind] = {
                **times_as_fast(seconds, "unime_st", "stock"),
                "arithmetic": products(ours, pairs),
                "largest_difference": difference,
                "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
                "seconds": seconds,
                "stock_batch_size": best,
                "stock_seconds_by_batch_size": tried,
            }
            print(kind, {name: found[kind][name] for name in ("times_as_fast", "spread", "largest_difference")})
            told = machine(load_average_before=round(load, 2), load_average_after=round(os.getloadavg()[0], 2))
            keep(arguments.output, {"machine": told, "candidates": CANDIDATES, "workloads": found})


if __name__ == "__main__":
    main()
