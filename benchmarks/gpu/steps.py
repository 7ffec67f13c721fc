"""Training steps of a model of Qwen2-VL-2B's shape with LoRA (r = 16) under GradCache: ours against stock.

In bfloat16 autocast. Stage 2: pairs of an image of 336 pixels with a question, and a text; stage 1: texts against a
teacher, packed against padded rows. Seconds, peak memory, and the places that make the CPU wait for the GPU.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, peak, profiled, seconds_of
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device
from work import QUESTIONS, image, text

from models import with_peer
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config

TEMPERATURE = 0.02


class Bench:
    def __init__(self, given: Any, folder: Path) -> None:
        self.device = given.device
        self.pairs, self.texts, self.mini = (8, 8, 4) if given.tiny else (512, 768, 64)
        self.sides = (56,) if given.tiny else (336,)
        lora = default_lora_config(rank=16)
        self.ours, self.stock, _ = with_peer("qwen2_vl", folder, given, lora)
        self.stock.add_adapter(lora)
        for one in (self.ours.train(), self.stock.train()):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def loss(self, margin: float | None = None) -> HardNegativeInfoNCELoss:
        return HardNegativeInfoNCELoss(self.ours, temperature=TEMPERATURE, margin=margin, mini_batch_size=self.mini)

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
        stock = CachedMultipleNegativesRankingLoss(self.stock, 1 / TEMPERATURE, mini_batch_size=self.mini)
        found: dict[str, dict[str, Any]] = {}
        for name, model, loss in (("", self.ours, self.loss()), ("stock, ", self.stock, stock)):
            columns = self.columns(model, repeats)
            value = self.step(model, loss, columns)  # warms up
            peak(self.device)
            seconds = seconds_of(partial(self.step, model, loss, columns), self.device, 2)
            found[name] = {"seconds": seconds, "MB": peak(self.device), "loss": value}
        both = {key: {f"{name}{key}": row[key] for name, row in found.items()} for key in ("seconds", "MB", "loss")}
        ratio = round(found["stock, "]["seconds"] / found[""]["seconds"], 3)
        attention = self.ours[0].prefixes.taken
        result = {"pairs": self.pairs, **both["seconds"], "times as fast": ratio, **both["MB"], **both["loss"]}
        return {**result, "attention": attention}

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
            seconds = seconds_of(partial(self.step, self.ours, loss, [column], labels), self.device, 2)
            found |= {f"seconds ({kind})": seconds, f"MB ({kind})": peak(self.device)}
        self.ours[0].share_prefixes, self.ours[0].prefixes.attention = True, "auto"
        return found

    def waits(self) -> dict[str, Any]:
        """Places in a step at which the CPU waits for the GPU."""
        loss, columns = self.loss(margin=0.1), self.columns(self.ours, 0.0)
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
        columns = self.columns(self.ours, 0.0)
        return profiled(lambda: self.step(self.ours, self.loss(), columns))


def main() -> None:
    given = arguments(__doc__)
    results = Results("steps", given)
    bench = results.made("made", partial(Bench, given))
    results.measure("stage 2", lambda: bench.stage2(0.0))
    results.measure("stage 1", partial(Bench.stage1, bench))
    if given.device.startswith("cuda"):
        results.measure("waits for the GPU", partial(Bench.waits, bench))
    results.measure("stage 2, a quarter repeated", lambda: bench.stage2(0.25))
    if given.device.startswith("cuda"):
        results.measure("profile", partial(Bench.profile, bench))


if __name__ == "__main__":
    main()
