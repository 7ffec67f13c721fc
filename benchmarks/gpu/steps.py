"""Training steps of a model of Qwen2-VL-2B's shape with LoRA (r = 16) under GradCache: ours against stock.

In bfloat16 autocast. Stage 2: pairs of an image of 336 pixels with a question, and a text; stage 1: texts against a
teacher, packed against padded rows. Seconds, peak memory, and the places that make the CPU wait for the GPU.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, median, peak, timed
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device
from work import QUESTIONS, image, text

from models import real_backbone
from unime_st import build_encoder, export_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config

TEMPERATURE = 0.02


class Bench:
    def __init__(self, given: Any, folder: Path) -> None:
        self.device = given.device
        self.pairs, self.texts, self.mini = (8, 8, 4) if given.tiny else (512, 768, 64)
        self.sides = (56,) if given.tiny else (336,)
        real_backbone("qwen2_vl", folder / "backbone", given.device, small=given.tiny)
        plain = build_encoder(folder / "backbone", device=given.device, torch_dtype="bfloat16")
        export_encoder(plain, folder / "encoder")
        del plain
        lora = default_lora_config(rank=16)
        self.ours = build_encoder(
            folder / "backbone", device=given.device, torch_dtype="bfloat16", peft_config=lora
        ).train()
        kwargs = {"dtype": torch.bfloat16}
        self.stock = SentenceTransformer(str(folder / "encoder"), device=given.device, model_kwargs=kwargs)
        self.stock.add_adapter(lora)
        self.stock.train()
        for one in (self.ours, self.stock):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_("lora_" in name)
        shutil.rmtree(folder / "backbone")
        shutil.rmtree(folder / "encoder")

    def columns(self, model: Any, repeats: float) -> list[dict[str, Any]]:
        generator = random.Random(0)
        distinct = max(1, round(self.pairs * (1 - repeats)))
        numbers = [*range(distinct), *(generator.randrange(distinct) for _ in range(self.pairs - distinct))]
        anchors = [{"image": image(number, self.sides), "text": QUESTIONS[number % 8]} for number in numbers]
        answers = [text(random.Random(number), 5, 60) for number in numbers]
        return [model.preprocess(anchors), model.preprocess(answers)]

    def step(self, model: Any, loss: Any, columns: list[Any], labels: Any = None) -> float:
        if hasattr(model[0], "vision_cache"):
            model[0].vision_cache.clear()
        model.zero_grad(set_to_none=True)
        features = [batch_to_device(dict(column), self.device) for column in columns]
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16):
            value = loss(features, labels)
        value.backward()
        return float(value)

    def stage2(self, repeats: float) -> dict[str, Any]:
        losses = {
            "ours": HardNegativeInfoNCELoss(self.ours, temperature=TEMPERATURE, margin=None, mini_batch_size=self.mini),
            "stock": CachedMultipleNegativesRankingLoss(self.stock, 1 / TEMPERATURE, mini_batch_size=self.mini),
        }
        models = {"ours": self.ours, "stock": self.stock}
        seconds, memory, values = {}, {}, {}
        for name, loss in losses.items():
            columns = self.columns(models[name], repeats)
            values[name] = self.step(models[name], loss, columns)  # warms up
            peak(self.device)
            own, _ = timed(lambda n=name, c=columns, one=loss: self.step(models[n], one, c), self.device, 2)
            seconds[name], memory[name] = median(own), peak(self.device)
        return {
            "pairs": self.pairs,
            "seconds": seconds["ours"],
            "stock, seconds": seconds["stock"],
            "times as fast": round(seconds["stock"] / seconds["ours"], 3),
            "MB": memory["ours"],
            "stock, MB": memory["stock"],
            "loss": values["ours"],
            "stock, loss": values["stock"],
            "attention": self.ours[0].prefixes.taken,
        }

    def stage1(self) -> dict[str, Any]:
        generator = random.Random(0)
        column = self.ours.preprocess([text(generator, 10, 200) for _ in range(self.texts)])
        labels = torch.randn(self.texts, 64, generator=torch.Generator().manual_seed(0)).to(self.device)
        loss = DistillKLLoss(self.ours, temperature=0.05, mini_batch_size=2 * self.mini)
        found: dict[str, Any] = {"texts": self.texts, "tokens": int(column["attention_mask"].sum())}
        for kind in ("auto", "mask", "padded rows"):
            self.ours[0].share_prefixes = kind != "padded rows"
            if kind != "padded rows":
                self.ours[0].prefixes.attention = kind
            self.step(self.ours, loss, [column], labels)
            peak(self.device)
            own, _ = timed(lambda: self.step(self.ours, loss, [column], labels), self.device, 2)
            found |= {f"seconds ({kind})": median(own), f"MB ({kind})": peak(self.device)}
        self.ours[0].share_prefixes, self.ours[0].prefixes.attention = True, "auto"
        return found

    def waits(self) -> dict[str, Any]:
        """Places in a step at which the CPU waits for the GPU."""
        loss = HardNegativeInfoNCELoss(self.ours, temperature=TEMPERATURE, margin=0.1, mini_batch_size=self.mini)
        columns = self.columns(self.ours, 0.0)
        self.step(self.ours, loss, columns)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step(self.ours, loss, columns)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        told = [one for one in caught if "synchroniz" in str(one.message)]
        places = Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in told)
        return {"all": len(told), "mini-batches": 2 * self.pairs // self.mini, **dict(places.most_common(25))}

    def profile(self) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        loss = HardNegativeInfoNCELoss(self.ours, temperature=TEMPERATURE, margin=None, mini_batch_size=self.mini)
        columns = self.columns(self.ours, 0.0)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.step(self.ours, loss, columns)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
        return {row.key[:70]: {"ms": round(row.self_device_time_total / 1e3, 1), "calls": row.count} for row in rows}


def main() -> None:
    given = arguments(__doc__)
    results = Results("steps", given)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        bench: Any = None

        def make() -> str:
            nonlocal bench
            bench = Bench(given, Path(scratch))
            return "yes"

        results.measure("made", make)
    results.measure("stage 2", lambda: bench.stage2(0.0))
    results.measure("stage 1", bench.stage1)
    if given.device.startswith("cuda"):
        results.measure("waits for the GPU", bench.waits)
    results.measure("stage 2, a quarter repeated", lambda: bench.stage2(0.25))
    if given.device.startswith("cuda"):
        results.measure("profile", bench.profile)


if __name__ == "__main__":
    main()
