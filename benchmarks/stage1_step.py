"""A step of stage 1 against the stock modules with the same loss in plain form: seconds, memory, results.

    python benchmarks/stage1_step.py

A batch of 48 made-up sentences of 5 to 100 words, most of them short as in NLI sets, or of 10 to 14 words; LoRA on the
language model; forward and backward pass of `DistillKLLoss`, on the demo's miniature (2 of its layers). "stock" is
sentence-transformers' own modules: one padded forward pass of the batch, and the same loss of its embeddings.

In a model of two layers it tells that ours computes the last layer's feed-forward part for last tokens alone; in a deep
one it does not. So "unime_st, whole last layer" runs without that.

All run in one process, alternating, on one thread, and CPU time counts. Memory is read in a process of its own for
each, as the growth of its peak. Losses and gradients are compared in double precision: embeddings of the untrained
miniature are alike (their mean cosine is above 0.99), so in single precision the gradients of the stock step itself
change by 2e-5 when its rows change places. Writes `benchmarks/results/stage1_step.json`.
"""

from __future__ import annotations

import basics  # noqa: F401 (it sets what libraries read)

# isort: split
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from measuring import alternating
from train_step import arguments, counted, difference, encoder, gradients, measure, medians, peak, step
from unime_st.losses import DistillKLLoss

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
    work, made, counts, values, found = {}, {}, {}, {}, {}
    for kind in KINDS:
        model, loss = made[kind] = prepared(kind, path)
        columns = [model.preprocess(texts)]
        work[kind] = partial(step, loss, model, columns, label)
        counts[kind] = counted(model, work[kind])[0]["tokens"]
    mask = columns[0]["attention_mask"]  # of the stock model
    seconds, _ = alternating(work, runs)
    for kind in ("unime_st", "stock"):
        model, loss = made[kind]
        values[kind] = step(loss, model.double(), work[kind].args[2], label.double())
        found[kind] = gradients(model)
    middle = medians(seconds)
    result: dict[str, Any] = {
        "runs": runs, "tokens": {"of the sentences": int(mask.sum()), **counts},
        "padding": round(1 - int(mask.sum()) / mask.numel(), 3), "seconds": middle,
        "sentences_a_second": {kind: round(BATCH / value, 1) for kind, value in middle.items()},
    }  # fmt: skip
    for kind in KINDS[:-1]:
        ratios = [theirs / ours for theirs, ours in zip(seconds["stock"], seconds[kind], strict=True)]
        told = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        result[f"{kind}: times as fast"] = {name: round(value, 3) for name, value in told.items()}
    result["difference_of_loss"] = abs(values["unime_st"] - values["stock"])
    result["difference_of_gradients"] = difference(found["unime_st"], found["stock"])
    return result


def main() -> None:
    given, path = arguments(__doc__, ("KIND", "CASE"))
    if given.peak:
        kind, case = given.peak
        model, loss = prepared(kind, path)
        print(peak(loss, model, [sentences(*CASES[case])], teacher()))
        return
    cases = {name: (partial(compare, path, words), (name,)) for name, words in CASES.items()}
    measure(__file__, given, path, KINDS, cases, batch=BATCH)


if __name__ == "__main__":
    main()
