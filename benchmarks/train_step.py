"""A training step with GradCache against sentence-transformers' own: seconds, memory, forward calls, results.

    python benchmarks/train_step.py

The step is stage 2's: 64 pairs of a drawing with a question and a text (or half of them a caption and a drawing, as in
batches of several data sets), of 3 to 30 words, LoRA on the language model, vision tower frozen, forward and backward
pass of the loss, on the demo's miniature (2 of its layers, images of 160 pixels, its projector not aligned).
`HardNegativeInfoNCELoss` is set to what `CachedMultipleNegativesRankingLoss` computes (all negatives, no margin), with
the same mini-batch size. Ours computes the last layer's feed-forward part for last tokens alone, which counts for more
with two layers than in a deep model (`benchmarks/stage1_step.py` tells how much).

Results without repeats are compared with the stock loss. The stock loss takes copies of an answer for wrong ones, so
results with repeats are compared with our own plain loss, which embeds all at once. Stock modules leave a frozen tower
in training mode, where its batch normalisation depends on the mini-batch: the stock model's is put into evaluation
mode, as ours is by itself.

Both losses run in one process, alternating, on one thread, and CPU time is what counts, so that other work on the
machine does not. Memory is read in a process of its own for each, as the
growth of its peak over what it was before the first step. Writes `benchmarks/results/train_step.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from PIL import Image, ImageDraw
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from memory import megabytes_of, peak_above
from small_models import miniature
from unime_st import load_encoder
from unime_st.files import write_atomically
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config

RESULTS = Path(__file__).parent / "results" / "train_step.json"
BATCH, MINI_BATCH, TEMPERATURE, LAYERS = 64, 8, 0.05, 2
CASES = {
    f"{name}, {'a quarter of the targets repeated' if repeated else 'no repeats'}": (kind, repeated)
    for kind, name in (("questions", "questions about drawings"), ("mixed", "mixed with captions of drawings"))
    for repeated in (0.25, 0.0)
}
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
KINDS = ("unime_st", "stock")


def encoder(kind: str, path: Path) -> SentenceTransformer:
    """The miniature with LoRA, on our module or the stock one; the same weights, the frozen tower only evaluated."""
    if kind == "stock":
        transformer = Transformer(str(path), processor_kwargs={"padding_side": "left"})
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    else:
        model = load_encoder(path, device="cpu")
    model.float()
    model.add_adapter(default_lora_config(rank=16))
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    model.train()
    model[0].model.vision_tower.eval()
    return model


def drawing(number: int) -> Image.Image:
    image = Image.new("RGB", (160, 160), "white")
    pen = ImageDraw.Draw(image)
    left, top = 10 + 7 * (number % 9), 10 + 7 * (number // 9)
    pen.rectangle((left, top, left + 40 + number % 5, top + 60), fill=COLOURS[number % len(COLOURS)])
    return image


def words(number: int, start: str) -> str:
    """From 3 to 30 words."""
    return f"{start} {number} {COLOURS[number % len(COLOURS)]}" + " or any other" * (number * 7 % 10)


def pairs(kind: str, repeated: float) -> tuple[list[Any], list[Any]]:
    """Pairs of one kind, a drawing with a question and an answer, or half of them captions and drawings instead."""
    distinct = int(BATCH * (1 - repeated))
    anchors: list[Any] = []
    targets: list[Any] = []
    for row in range(BATCH):
        number = row if row < distinct else (row - distinct) * 3  # of the target
        if kind == "mixed" and number % 2:
            anchors.append(words(row, "the one with"))
            targets.append(drawing(number))
        else:
            anchors.append({"image": drawing(row), "text": words(row, "Which is it, number")})
            targets.append(words(number, "answer"))
    return anchors, targets


def loss_of(kind: str, model: SentenceTransformer) -> nn.Module:
    if kind == "stock":
        return CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=MINI_BATCH)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "margin": None, "num_hard_negatives": None}
    return HardNegativeInfoNCELoss(model, **options, mini_batch_size=None if kind == "plain" else MINI_BATCH)


def step(
    loss: nn.Module, model: SentenceTransformer, columns: list[dict[str, Any]], labels: torch.Tensor | None = None
) -> tuple[float, float]:
    """CPU seconds and loss of a forward and backward pass; features are made before, as data loaders do."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    value = loss([dict(column) for column in columns], labels)
    value.backward()
    return time.process_time() - start, value.item()


def gradients(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    named = ((name.replace("_orig_mod.", ""), parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.clone() for name, gradient in named if gradient is not None}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, over the largest gradient."""
    assert first.keys() == second.keys()
    assert first
    largest = max(float(gradient.abs().max()) for gradient in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / largest


class Calls:
    """Counts forward calls, and sequences and places in them that the language model's layers run over."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.language_model = self.tower = self.rows = self.tokens = 0
        inner = model[0].model
        inner.language_model.layers[0].register_forward_hook(self._text)
        tower = inner.vision_tower
        first = next(module for module in tower.modules() if not list(module.children()))
        first.register_forward_hook(self._vision)

    def _text(self, _module: nn.Module, args: Any, _output: Any) -> None:
        self.language_model += 1
        self.rows += args[0].shape[0]
        self.tokens += args[0].shape[0] * args[0].shape[1]

    def _vision(self, _module: nn.Module, args: Any, _output: Any) -> None:
        self.tower += len(args[0])

    def read(self) -> dict[str, int]:
        return {
            "language_model_calls": self.language_model,
            "rows": self.rows,
            "tokens": self.tokens,
            "images_through_the_tower": self.tower,
        }


def compare(path: Path, pairs_of: str, repeated: float, runs: int) -> dict[str, Any]:
    """Time both, alternating; compare losses and gradients."""
    models = {kind: encoder(kind, path) for kind in KINDS}
    losses = {kind: loss_of(kind, model) for kind, model in models.items()}
    columns = {kind: [models[kind].preprocess(list(column)) for column in pairs(pairs_of, repeated)] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    values, counts = {}, {}
    for kind in KINDS:  # the first step also warms up
        models[kind][0].vision_cache.clear() if kind == "unime_st" else None
        calls = Calls(models[kind])
        values[kind] = step(losses[kind], models[kind], columns[kind])[1]
        counts[kind] = calls.read()
    found = {kind: gradients(model) for kind, model in models.items()}
    if repeated:
        plain = loss_of("plain", models["unime_st"])
        values["reference"] = step(plain, models["unime_st"], columns["unime_st"])[1]
        reference = gradients(models["unime_st"])
    else:
        values["reference"], reference = values["stock"], found["stock"]
    for number in range(runs):
        for kind in KINDS if number % 2 else reversed(KINDS):
            if kind == "unime_st":
                models[kind][0].vision_cache.clear()  # each step shows new images
            seconds[kind].append(step(losses[kind], models[kind], columns[kind])[0])
            print(f"  {kind:9} {seconds[kind][-1]:.2f} s", flush=True)
    ratios = [theirs / ours for theirs, ours in zip(seconds["stock"], seconds["unime_st"], strict=True)]
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        "runs": runs,
        "distinct_inputs": losses["unime_st"].last_plan.distinct,
        "inputs": 2 * BATCH,
        "seconds": {kind: round(value, 3) for kind, value in medians.items()},
        "times_as_fast": round(medians["stock"] / medians["unime_st"], 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "counts": counts,
        "compared_with": "our plain loss" if repeated else "the stock loss",
        "difference_of_loss": abs(values["unime_st"] - values["reference"]),
        "difference_of_gradients": difference(found["unime_st"], reference),
    }


def peak(kind: str, path: Path, pairs_of: str, repeated: float) -> int:
    """Bytes by which two steps raise the peak of this process."""
    model = encoder(kind, path)
    loss = loss_of(kind, model)
    columns = [model.preprocess(list(column)) for column in pairs(pairs_of, repeated)]
    with peak_above() as found:
        for _ in range(2):
            step(loss, model, columns)
    return found.bytes


def keep(path: Path, results: dict[str, Any], name: str, result: dict[str, Any]) -> None:
    """Write a case's result beside the others', and show it."""
    results[name] = result
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved encoder in place of the miniature")
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="folder of the demo's packages")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this; the others' results stay")
    parser.add_argument(
        "--peak", nargs=3, metavar=("KIND", "PAIRS", "SHARE"), help="print the memory of one, for this script"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.model or miniature(given.cache, LAYERS)
    if given.peak:
        print(peak(given.peak[0], path, given.peak[1], float(given.peak[2])))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results |= {"command": "python benchmarks/train_step.py", "batch": BATCH, "mini_batch": MINI_BATCH}
    for name, (kind_of_pairs, repeated) in CASES.items():
        if given.only not in name:
            continue
        print(name)
        result = compare(path, kind_of_pairs, repeated, given.runs)
        arguments = (kind_of_pairs, str(repeated))
        result["peak_megabytes"] = {
            kind: megabytes_of(__file__, ["--model", str(path), "--peak", kind, *arguments]) for kind in KINDS
        }
        keep(RESULTS, results, name, result)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
