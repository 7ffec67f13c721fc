"""`encode` of a model of Qwen2-VL-2B's shape (and Qwen3-VL-2B's), bfloat16: ours against stock at its best batch size.

Mixed inputs of one to four images of 336 to 1,024 pixels and texts of 5 to 300 tokens, without repeats and half of them
repeated, and eight questions to an image. Beside: how long images take on the CPU, and the forward passes alone on
prepared features, against the chip's own bfloat16 product of matrices.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, arguments, median, peak, timed
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from work import count_images, mixed, questions, with_repeats

from models import real_backbone
from unime_st import build_encoder, export_encoder

BUDGET = 32768  # tokens of a pass of ours


class Bench:
    def __init__(self, family: str, given: Any, folder: Path) -> None:
        self.device, self.tiny = given.device, given.tiny
        self.about = real_backbone(family, folder / "backbone", given.device, small=given.tiny)
        self.ours = build_encoder(folder / "backbone", device=given.device, torch_dtype="bfloat16")
        shutil.rmtree(folder / "backbone")
        export_encoder(self.ours, folder / "encoder")
        kwargs = {"dtype": torch.bfloat16}
        self.stock = SentenceTransformer(str(folder / "encoder"), device=given.device, model_kwargs=kwargs)
        shutil.rmtree(folder / "encoder")
        self.batch = {"ours": 32, "stock": 8}

    def run_ours(self, items: list[Any], size: int | None = None) -> np.ndarray:
        self.ours[0].vision_cache.clear()
        size = size or self.batch["ours"]
        return self.ours.encode(items, batch_size=size, batch_num_tokens=BUDGET, show_progress_bar=False)

    def run_stock(self, items: list[Any], size: int | None = None) -> np.ndarray:
        return self.stock.encode(items, batch_size=size or self.batch["stock"], show_progress_bar=False)

    def warm_up(self, items: list[Any]) -> dict[str, Any]:
        first, _ = timed(lambda: self.run_ours(items), self.device)
        again, _ = timed(lambda: self.run_ours(items[: len(items) // 2]), self.device)
        stock, _ = timed(lambda: self.run_stock(items), self.device)
        return {"ours, first": median(first), "ours, second": median(again), "stock": median(stock)}

    def best_batch(self, items: list[Any]) -> dict[str, Any]:
        """Seconds by batch size; the fastest of each is taken from here on."""
        sizes = (2, 4) if self.tiny else (8, 16, 32, 64)
        found: dict[str, Any] = {}
        for name, run in {"ours": self.run_ours, "stock": self.run_stock}.items():
            seconds = {size: median(timed(lambda s=size, r=run: r(items, s), self.device)[0]) for size in sizes}
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
        cosine = (found["ours"].astype(np.float64) * found["stock"]).sum(-1)
        return {
            "inputs": len(items),
            "batch": self.batch["ours"],
            "stock, batch": self.batch["stock"],
            "images": count_images(items),
            "seconds": ours,
            "stock, seconds": stock,
            "times as fast": round(stock / ours, 3),
            "images/s": round(count_images(items) / ours, 1),
            "stock, images/s": round(count_images(items) / stock, 1),
            "MB": memory["ours"],
            "stock, MB": memory["stock"],
            "least cosine": float(cosine.min()),
            "attention": self.ours[0].prefixes.taken,
        }

    def parts(self, items: list[Any]) -> dict[str, Any]:
        """Preparing on the CPU, and the passes alone."""
        encoder, prefixes = self.ours[0], self.ours[0].prefixes
        size = 4 if self.tiny else 16
        batches = [items[at : at + size] for at in range(0, len(items), size)]
        prepare, features = timed(lambda: [encoder.preprocess(batch) for batch in batches], self.device)
        tokens = sum(int(one["attention_mask"].sum()) for one in features)
        patches = sum(len(one["pixel_values"]) for one in features if one.get("pixel_values") is not None)

        def forward() -> None:
            encoder.vision_cache.clear()
            with torch.inference_mode(), prefixes.encoding(last_token_only=True, inference=True):
                for one in features:
                    self.ours(batch_to_device(dict(one), self.device))

        forward()
        found: dict[str, Any] = {"preparing, seconds": median(prepare), "tokens": tokens, "patches": patches}
        for kind in ("auto", "mask"):
            prefixes.attention = kind
            forward()
            seconds = median(timed(forward, self.device)[0])
            found |= {f"passes, seconds ({kind})": seconds, f"tokens/s ({kind})": round(tokens / seconds)}
        prefixes.attention = "auto"
        encoder.share_prefixes = False
        forward()
        found["passes, seconds (padded rows)"] = median(timed(forward, self.device)[0])
        encoder.share_prefixes = True
        size = self.batch["stock"]
        for_stock = [self.stock.preprocess(items[at : at + size]) for at in range(0, len(items), size)]

        def stock_forward() -> None:
            with torch.inference_mode():
                for one in for_stock:
                    self.stock(batch_to_device(dict(one), self.device))

        stock_forward()
        found["passes, seconds (stock)"] = median(timed(stock_forward, self.device)[0])
        model = encoder.model
        text = sum(p.numel() for p in model.language_model.layers.parameters())
        vision = sum(p.numel() for p in model.visual.parameters())
        work = 2 * (text * tokens + vision * patches)
        found["TFLOP of weights"] = round(work / 1e12, 1)
        found["TFLOP/s (auto)"] = round(work / 1e12 / found["passes, seconds (auto)"], 1)
        return found

    def profile(self, items: list[Any]) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.run_ours(items)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
        return {row.key[:70]: {"ms": round(row.self_device_time_total / 1e3, 1), "calls": row.count} for row in rows}


def matmul_peak(device: str, size: int) -> dict[str, Any]:
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    seconds = median(timed(lambda: [one @ other for _ in range(10)], device)[0]) / 10
    return {"TFLOP/s": round(2 * size**3 / seconds / 1e12, 1)}


def run(family: str, given: Any, results: Results, count: int, runs: int) -> None:
    sides = (56, 84) if given.tiny else (336, 448, 640, 800, 1024)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        bench: Any = None

        def make() -> dict[str, Any]:
            nonlocal bench
            bench = Bench(family, given, Path(scratch))
            return bench.about

        results.measure(f"{family}: made", make)
    items = mixed(count, sides, 2 if given.tiny else 4)
    results.measure(f"{family}: warming up, seconds", lambda: bench.warm_up(items[: count // 4]))
    results.measure(f"{family}: seconds by batch size", lambda: bench.best_batch(items[: count // 3]))
    results.measure(f"{family}: parts", lambda: bench.parts(items[: count // 2]))
    asked = questions(max(2, count // 12), sides)
    cases = {"mixed, no repeats": items, "mixed, 50 % repeats": with_repeats(items, 0.5), "8 questions an image": asked}
    for name, own in cases.items():
        results.measure(f"{family}: {name}", lambda own=own: bench.against_stock(own, runs))
    if given.device.startswith("cuda"):
        results.measure(f"{family}: profile", lambda: bench.profile(items[: count // 4]))


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
