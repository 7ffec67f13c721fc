"""A step of stage 1 against the stock modules with the same loss in plain form: seconds, memory, results.

    python benchmarks/stage1_step.py

A batch of 48 made-up sentences of 5 to 100 words, most of them short as in NLI sets, or of 10 to 14 words; LoRA on the
language model; forward and backward pass of `DistillKLLoss`, on the demo's miniature (2 of its layers). "stock" is
sentence-transformers' own modules: one padded forward pass of the batch, and the same loss of its embeddings.

In a model of two layers it tells that ours computes the last layer's feed-forward part for last tokens alone; in a deep
one it does not. So "unime_st, whole last layer" runs without that.

All run in one process, alternating, on one thread, and CPU time is what counts. Memory is read in a process of its own
for each, as the growth of its peak over what it was before the first step. Losses and gradients are compared in double
precision: embeddings of the untrained miniature are alike (their mean cosine is above 0.99), so in single precision
the gradients of the stock step itself change by 2e-5 when its rows change places. Writes
`benchmarks/results/stage1_step.json`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from memory import megabytes_of, peak_above
from small_models import miniature
from train_step import LAYERS, Calls, difference, encoder, gradients, keep, step
from unime_st.losses import DistillKLLoss

RESULTS = Path(__file__).parent / "results" / "stage1_step.json"
BATCH, TEACHER_DIMENSION = 48, 64
OPTIONS: dict[str, Any] = {"temperature": 0.05, "include_diagonal": False}
CASES = {"5 to 100 words, most short": (5, 100), "10 to 14 words": (10, 14)}
KINDS = ("unime_st", "unime_st, whole last layer", "stock")
WORDS = "a the two young man woman child dog red small on in under with and at street water field plays holds outside"


class PlainForm(nn.Module):
    """The loss of one padded forward pass a column."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self.loss = DistillKLLoss(None, **OPTIONS)

    def forward(self, columns: list[dict[str, Any]], labels: torch.Tensor) -> torch.Tensor:
        embeddings = [self.model(column)["sentence_embedding"] for column in columns]
        return self.loss.compute_loss_from_embeddings(embeddings, labels)


def sentences(shortest: int, longest: int) -> list[str]:
    """Their numbers of words are log-normal, 13 in the middle."""
    draw = random.Random(0)
    counts = [min(longest, max(shortest, round(draw.lognormvariate(2.6, 0.85)))) for _ in range(BATCH)]
    return [" ".join(draw.choices(WORDS.split(), k=count)) for count in counts]


def prepared(kind: str, path: Path) -> tuple[SentenceTransformer, nn.Module]:
    """A model and its loss."""
    model = encoder(kind.partition(",")[0], path)
    if kind == "stock":
        return model, PlainForm(model)
    if kind != "unime_st":
        model[1].pooling_mode = (model[1].pooling_mode,)  # pools the same, but is not known to read last tokens alone
    return model, DistillKLLoss(model, **OPTIONS)


def teacher() -> torch.Tensor:
    drawn = torch.randn(BATCH, TEACHER_DIMENSION, generator=torch.Generator().manual_seed(1))
    return nn.functional.normalize(drawn, dim=1)


def compare(path: Path, words: tuple[int, int], runs: int) -> dict[str, Any]:
    """Time all, alternating; compare losses and gradients."""
    texts, label = sentences(*words), teacher()
    made = {kind: prepared(kind, path) for kind in KINDS}
    columns = {kind: [model.preprocess(texts)] for kind, (model, _) in made.items()}
    lengths = columns["stock"][0]["attention_mask"].sum(dim=1)
    padded = columns["stock"][0]["attention_mask"].numel()
    counts, seconds = {}, {kind: [] for kind in KINDS}
    for kind, (model, loss) in made.items():  # the first step also warms up
        calls = Calls(model)
        step(loss, model, columns[kind], label)
        counts[kind] = calls.read()["tokens"]
    for number in range(runs):
        for kind in KINDS if number % 2 else reversed(KINDS):
            seconds[kind].append(step(made[kind][1], made[kind][0], columns[kind], label)[0])
            print(f"  {kind:27} {seconds[kind][-1]:.2f} s", flush=True)
    values, found = {}, {}
    for kind in ("unime_st", "stock"):
        model, loss = made[kind]
        values[kind] = step(loss, model.double(), columns[kind], label.double())[1]
        found[kind] = gradients(model)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    result: dict[str, Any] = {
        "runs": runs,
        "tokens": {"of the sentences": int(lengths.sum()), **counts},
        "padding": round(1 - int(lengths.sum()) / padded, 3),
        "seconds": {kind: round(value, 3) for kind, value in medians.items()},
        "sentences_a_second": {kind: round(BATCH / value, 1) for kind, value in medians.items()},
    }
    for kind in KINDS[:-1]:
        ratios = [theirs / ours for theirs, ours in zip(seconds["stock"], seconds[kind], strict=True)]
        told = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        result[f"{kind}: times as fast"] = {name: round(value, 3) for name, value in told.items()}
    result["difference_of_loss"] = abs(values["unime_st"] - values["stock"])
    result["difference_of_gradients"] = difference(found["unime_st"], found["stock"])
    return result


def peak(kind: str, path: Path, words: tuple[int, int]) -> int:
    """Bytes by which two steps raise the peak of this process."""
    model, loss = prepared(kind, path)
    columns = [model.preprocess(sentences(*words))]
    with peak_above() as found:
        for _ in range(2):
            step(loss, model, columns, teacher())
    return found.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved encoder in place of the miniature")
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="folder of the demo's packages")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "CASE"), help="print the memory of one, for this script")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.model or miniature(given.cache, LAYERS)
    if given.peak:
        print(peak(given.peak[0], path, CASES[given.peak[1]]))
        return
    results: dict[str, Any] = {"command": "python benchmarks/stage1_step.py", "batch": BATCH}
    for name, words in CASES.items():
        print(name)
        result = compare(path, words, given.runs)
        result["peak_megabytes"] = {
            kind: megabytes_of(__file__, ["--model", str(path), "--peak", kind, name]) for kind in KINDS
        }
        keep(RESULTS, results, name, result)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
