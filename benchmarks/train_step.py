"""A training step with GradCache against sentence-transformers' own: seconds, memory, forward calls, results.

    python benchmarks/train_step.py

The step is stage 2's: 64 pairs of a drawing with a question and a text (or half of them a caption and a drawing, as in
batches of several data sets), of 3 to 30 words, LoRA on the language model, vision tower frozen, forward and backward
pass of the loss, on the demo's miniature (2 of its layers, images of 160 pixels, its projector not aligned).
`HardNegativeInfoNCELoss` is set to what `CachedMultipleNegativesRankingLoss` computes (all negatives, no margin), with
the same mini-batch size. Ours computes the last layer's feed-forward part for last tokens alone, which counts for more
with two layers than in a deep model (`benchmarks/stage1_step.py` tells how much).

Results without repeats are compared with the stock loss, those with repeats, which it takes for wrong answers, with our
own plain loss, which embeds all at once. Stock modules leave a frozen tower in training mode, where its batch
normalisation depends on the mini-batch: the stock model's is put into evaluation mode, as ours is by itself.

Both losses run in one process, alternating, on one thread, and CPU time counts. Memory is read in a process of its own
for each, as the growth of its peak. Writes `benchmarks/results/train_step.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, kept, megabytes_of, parser, peak_above

# isort: split
import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from measuring import Counts, alternating, times_as_fast
from small_models import miniature
from unime_st import load_encoder
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config

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
) -> float:
    """The loss of a forward and backward pass on new images; features are made before, as data loaders do."""
    if hasattr(model[0], "vision_cache"):
        model[0].vision_cache.clear()
    model.zero_grad(set_to_none=True)
    value = loss([dict(column) for column in columns], labels)
    value.backward()
    return value.item()


def gradients(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    named = ((name.replace("_orig_mod.", ""), parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.clone() for name, gradient in named if gradient is not None}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient, over the largest gradient."""
    assert first.keys() == second.keys()
    assert first
    largest = max(float(gradient.abs().max()) for gradient in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / largest


def counted(model: SentenceTransformer, work: Callable[[], Any]) -> tuple[dict[str, int], Any]:
    """What a model runs over during some work, and what that returns."""
    with Counts(model[0].model) as counts:
        value = work()
    read = {"language_model_calls": counts.calls, "rows": counts.rows, "tokens": counts.places}
    return {**read, "images_through_the_tower": counts.images}, value


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {kind: round(statistics.median(times), 3) for kind, times in seconds.items()}


def compare(path: Path, pairs_of: str, repeated: float, runs: int) -> dict[str, Any]:
    """Time both, alternating; compare losses and gradients."""
    work, models, counts, values, found = {}, {}, {}, {}, {}
    for kind in KINDS:  # the first step also warms up
        models[kind] = model = encoder(kind, path)
        loss = loss_of(kind, model)
        columns = [model.preprocess(list(column)) for column in pairs(pairs_of, repeated)]
        work[kind] = partial(step, loss, model, columns)
        counts[kind], values[kind] = counted(model, work[kind])
        found[kind] = gradients(model)
    ours, reference, value = models["unime_st"], found["stock"], values["stock"]
    _, _, columns = work["unime_st"].args
    if repeated:
        value = step(loss_of("plain", ours), ours, columns)
        reference = gradients(ours)
    seconds, _ = alternating(work, runs)
    return {
        "runs": runs, "distinct_inputs": work["unime_st"].args[0].last_plan.distinct, "inputs": 2 * BATCH,
        "seconds": medians(seconds), **times_as_fast(seconds, "unime_st", "stock"), "counts": counts,
        "compared_with": "our plain loss" if repeated else "the stock loss",
        "difference_of_loss": abs(values["unime_st"] - value),
        "difference_of_gradients": difference(found["unime_st"], reference),
    }  # fmt: skip


def peak(loss: nn.Module, model: SentenceTransformer, columns: list[Any], labels: torch.Tensor | None = None) -> int:
    """Bytes by which two steps raise the peak of this process."""
    features = [model.preprocess(list(column)) for column in columns]
    with peak_above() as found:
        for _ in range(2):
            step(loss, model, features, labels)
    return found.bytes


def arguments(doc: str | None, names: tuple[str, ...]) -> tuple[argparse.Namespace, Path]:
    """What is given to a script that compares steps, and the model; `names` are those of what `--peak` takes."""
    options = parser(doc, cache=True, runs=7)
    options.add_argument("--model", type=Path, help="a saved encoder in place of the miniature")
    options.add_argument("--only", default="", help="cases whose name holds this; the others' results stay")
    options.add_argument("--peak", nargs=len(names), metavar=names, help="print the memory of one, for this script")
    given = options.parse_args()
    torch.set_num_threads(1)
    return given, given.model or miniature(given.cache, LAYERS)


def measure(
    script: str, given: argparse.Namespace, path: Path, kinds: tuple[str, ...], cases: dict[str, Any], **about: Any
) -> None:
    """Measure and write each case: its comparison, of so many runs, and what tells `--peak` which case it is."""
    name_of = Path(script).stem
    results = kept(RESULTS / f"{name_of}.json") | {"command": f"python benchmarks/{name_of}.py", **about}
    for name, (compared, told) in cases.items():
        if given.only in name:
            print(name)
            results[name] = compared(given.runs)
            command = (script, "--model", str(path), "--peak")
            results[name]["peak_megabytes"] = {kind: megabytes_of(*command, kind, *told) for kind in kinds}
            keep(RESULTS / f"{name_of}.json", results)
            print(json.dumps(results[name], indent=1))


def main() -> None:
    given, path = arguments(__doc__, ("KIND", "PAIRS", "SHARE"))
    if given.peak:
        kind, kind_of_pairs, repeated = given.peak
        model = encoder(kind, path)
        print(peak(loss_of(kind, model), model, pairs(kind_of_pairs, float(repeated))))
        return
    cases = {name: (partial(compare, path, *case), (case[0], str(case[1]))) for name, case in CASES.items()}
    measure(__file__, given, path, KINDS, cases, batch=BATCH, mini_batch=MINI_BATCH)


if __name__ == "__main__":
    main()
