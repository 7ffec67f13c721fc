"""`encode` of a model of Qwen2-VL-2B's shape (and Qwen3-VL-2B's), bfloat16: ours against stock at its best batch size.

Mixed inputs of one to four images of 336 to 1,024 pixels and texts of 5 to 300 tokens, without repeats and half of them
repeated, and eight questions to an image. Beside: how long images take on the CPU, and the forward passes alone on
prepared features, against the chip's own bfloat16 product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, arguments, median, peak, profiled, seconds_of, timed
from sentence_transformers.util import batch_to_device
from work import count_images, mixed, questions, with_repeats

from models import with_peer

BUDGET = 32768  # tokens of a pass of ours


class Bench:
    def __init__(self, family: str, given: Any, folder: Path) -> None:
        self.device, self.tiny = given.device, given.tiny
        self.ours, self.stock, self.about = with_peer(family, folder, given)
        self.batch = {"ours": 32, "stock": 8}

    def run_ours(self, items: list[Any], size: int | None = None) -> np.ndarray:
        self.ours[0].vision_cache.clear()
        size = size or self.batch["ours"]
        return self.ours.encode(items, batch_size=size, batch_num_tokens=BUDGET, show_progress_bar=False)

    def run_stock(self, items: list[Any], size: int | None = None) -> np.ndarray:
        return self.stock.encode(items, batch_size=size or self.batch["stock"], show_progress_bar=False)

    def warm_up(self, items: list[Any]) -> dict[str, Any]:
        seconds = partial(seconds_of, device=self.device)
        first, again = seconds(lambda: self.run_ours(items)), seconds(lambda: self.run_ours(items[: len(items) // 2]))
        return {"ours, first": first, "ours, second": again, "stock": seconds(lambda: self.run_stock(items))}

    def best_batch(self, items: list[Any]) -> dict[str, Any]:
        """Seconds by batch size; the fastest of each is taken from here on."""
        sizes = (2, 4) if self.tiny else (8, 16, 32, 64)
        found: dict[str, Any] = {}
        for name, run in {"ours": self.run_ours, "stock": self.run_stock}.items():
            seconds = {size: seconds_of(partial(run, items, size), self.device) for size in sizes}
            self.batch[name] = min(seconds, key=lambda size: seconds[size])
            found |= {f"{name}, {size}": value for size, value in seconds.items()}
        return found

    def against_stock(self, items: list[Any], runs: int) -> dict[str, Any]:
        contenders = {"ours": lambda: self.run_ours(items), "stock": lambda: self.run_stock(items)}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        memory, found = {}, {}
        for run in range(runs):
            for name in contenders if run % 2 == 0 else reversed(contenders):
                peak(self.device)
                own, found[name] = timed(contenders[name], self.device)
                seconds[name] += own
                memory[name] = peak(self.device)
        ours, stock = median(seconds["ours"]), median(seconds["stock"])
        images = count_images(items)
        cosine = (found["ours"].astype(np.float64) * found["stock"]).sum(-1)
        about = {"inputs": len(items), "batch": self.batch["ours"], "stock, batch": self.batch["stock"]}
        about |= {"images": images, "seconds": ours, "stock, seconds": stock, "times as fast": round(stock / ours, 3)}
        about |= {"images/s": round(images / ours, 1), "stock, images/s": round(images / stock, 1)}
        about |= {"MB": memory["ours"], "stock, MB": memory["stock"], "least cosine": float(cosine.min())}
        return {**about, "attention": self.ours[0].prefixes.taken}

    def passes(self, model: Any, prepared: list[dict[str, Any]], **sharing: Any) -> float:
        """Seconds of the forward passes alone, warmed up."""
        encoder = self.ours[0]

        def forward() -> None:
            encoder.vision_cache.clear()
            with torch.inference_mode(), encoder.prefixes.encoding(**sharing) if sharing else nullcontext():
                for one in prepared:
                    model(batch_to_device(dict(one), self.device))

        forward()
        return seconds_of(forward, self.device)

    def parts(self, items: list[Any]) -> dict[str, Any]:
        """Preparing on the CPU, and the passes alone."""
        encoder, shared = self.ours[0], {"last_token_only": True, "inference": True}
        prepare, features = timed(lambda: batches(items, 4 if self.tiny else 16, encoder.preprocess), self.device)
        tokens = sum(int(one["attention_mask"].sum()) for one in features)
        patches = sum(len(one["pixel_values"]) for one in features if one.get("pixel_values") is not None)
        found: dict[str, Any] = {"preparing, seconds": median(prepare), "tokens": tokens, "patches": patches}
        for kind in ("auto", "mask"):
            encoder.prefixes.attention = kind
            seconds = self.passes(self.ours, features, **shared)
            found |= {f"passes, seconds ({kind})": seconds, f"tokens/s ({kind})": round(tokens / seconds)}
        encoder.prefixes.attention, encoder.share_prefixes = "auto", False
        found["passes, seconds (padded rows)"] = self.passes(self.ours, features, **shared)
        encoder.share_prefixes = True
        for_stock = batches(items, self.batch["stock"], self.stock.preprocess)
        found["passes, seconds (stock)"] = self.passes(self.stock, for_stock)
        weights = (encoder.model.language_model.layers, tokens), (encoder.model.visual, patches)
        work = 2 * sum(p.numel() * count for part, count in weights for p in part.parameters()) / 1e12
        rate = round(work / found["passes, seconds (auto)"], 1)
        return found | {"TFLOP of weights": round(work, 1), "TFLOP/s (auto)": rate}


def batches(items: list[Any], size: int, prepare: Callable[[list[Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    return [prepare(items[at : at + size]) for at in range(0, len(items), size)]


def matmul_peak(device: str, size: int) -> dict[str, Any]:
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    seconds = seconds_of(lambda: [one @ other for _ in range(10)], device) / 10
    return {"TFLOP/s": round(2 * size**3 / seconds / 1e12, 1)}


def run(family: str, given: Any, results: Results, count: int, runs: int) -> None:
    sides = (56, 84) if given.tiny else (336, 448, 640, 800, 1024)
    bench = results.made(f"{family}: made", partial(Bench, family, given))
    items = mixed(count, sides, 2 if given.tiny else 4)
    results.measure(f"{family}: warming up, seconds", lambda: bench.warm_up(items[: count // 4]))
    results.measure(f"{family}: seconds by batch size", lambda: bench.best_batch(items[: count // 3]))
    results.measure(f"{family}: parts", lambda: bench.parts(items[: count // 2]))
    asked = questions(max(2, count // 12), sides)
    cases = {"mixed, no repeats": items, "mixed, 50 % repeats": with_repeats(items, 0.5), "8 questions an image": asked}
    for name, own in cases.items():
        results.measure(f"{family}: {name}", lambda own=own: bench.against_stock(own, runs))
    if given.device.startswith("cuda"):
        results.measure(f"{family}: profile", lambda: profiled(lambda: bench.run_ours(items[: count // 4])))


def main() -> None:
    given = arguments(__doc__)
    results = Results("encode", given)
    results.measure("product of matrices", lambda: matmul_peak(given.device, 256 if given.tiny else 8192))
    for family, count, runs in (("qwen2_vl", 192, 2), ("qwen3_vl", 96, 1)):
        if given.only and given.only not in family:
            continue
        run(family, given, results, 12 if given.tiny else count, 1 if given.tiny else runs)


if __name__ == "__main__":
    main()
