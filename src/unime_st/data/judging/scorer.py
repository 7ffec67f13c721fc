"""What judging asks of a judge, and its scores, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import nn

from unime_st.identity.model import model_fingerprint


@runtime_checkable
class PairScorer(Protocol):
    """A judge: a reranker of ``build_reranker`` or ``load_reranker``, or any ``CrossEncoder`` of sentence-transformers.

    ``predict`` takes ``N`` pairs (query, candidate), each a text, an image or ``{"image", "text"}``, and gives ``(N,)``
    scores in 0..1.
    """

    def predict(self, inputs: list[Any], *, batch_size: int, show_progress_bar: bool) -> Any:
        """Score pairs."""


@runtime_checkable
class ListScorer(Protocol):
    """What compares the candidates of a query with each other: a ``ListwiseReranker``."""

    model: Any
    max_candidates: int
    replaces: str

    def predict_lists(self, lists: list[Any], *, batch_size: int) -> list[np.ndarray]:
        """Score lists (query, candidates), ``(n,)`` each."""


def scorer_identity(judge: Any, name: str | None) -> str:
    """What tells one judge from another: the name given, or a hash of the model."""
    if isinstance(judge, ListScorer):
        raise TypeError(
            f"`judge` is a {type(judge).__name__}, whose scores compare the candidates of one list with each other; a "
            "judge must score each pair by itself, in 0..1. Give the reranker that it asks, its `model`."
        )
    if not isinstance(judge, PairScorer):
        raise TypeError(f"`judge` is a {type(judge).__name__}, but it needs a method `predict`, as a CrossEncoder has.")
    if name is not None:
        return name
    model: Any = judge
    if not isinstance(model, nn.Module):
        raise ValueError(  # noqa: TRY004 (of what is missing)
            "`judge` is no torch module, so its results cannot be told from another's: give `judge_name`."
        )
    activation = getattr(model, "activation_fn", None)  # whose name is in no weight; a sigmoid is the usual one
    named = "" if activation is None or type(activation) is nn.Sigmoid else f" {_named(activation)}"
    return model_fingerprint(model) + named


def _named(activation: Any) -> str:
    """A module's class and settings, a function's name: the same in every process."""
    return repr(activation) if isinstance(activation, nn.Module) else getattr(activation, "__qualname__", "")


def scores_of(judge: PairScorer, pairs: list[Any], batch_size: int, told: Callable[[int], str]) -> np.ndarray:
    """Score pairs in 0..1, ``(N,)``; ``told`` says where a pair comes from, for errors."""
    found = _predicted(judge, pairs, batch_size)
    check_range(found, told)
    return found


def pair_scores(reranker: PairScorer, pairs: list[Any], batch_size: int, told: Callable[[int], str]) -> np.ndarray:
    """Score pairs by any finite numbers, ``(N,)``, for their order alone; ``told`` as above."""
    found = _predicted(reranker, pairs, batch_size)
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{told(first)}: the reranker's score is {found[first]:g}, as are {len(wrong) - 1} more of {len(found)} "
            "not finite, so they have no order. Load it in float32 or bfloat16 if it overflows in float16."
        )
    return found


def list_scores(
    reranker: ListScorer, lists: list[Any], batch_size: int, told: Callable[[int], str]
) -> list[np.ndarray]:
    """Score lists of candidates, ``(n,)`` each; ``told`` says where a list comes from, for errors."""
    found = [np.asarray(own, dtype=np.float32) for own in reranker.predict_lists(lists, batch_size=batch_size)]
    for number, (own, (_, candidates)) in enumerate(zip(found, lists, strict=True)):
        if own.shape != (len(candidates),) or not np.isfinite(own).all():
            raise ValueError(
                f"{told(number)}: {type(reranker).__name__} gave the scores {own.tolist()} for {len(candidates)} "
                "candidates, but one finite number each is needed."
            )
    return found


def _predicted(scorer: PairScorer, pairs: list[Any], batch_size: int) -> np.ndarray:
    found = np.asarray(scorer.predict(pairs, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)
    if found.shape != (len(pairs),):
        raise ValueError(
            f"{type(scorer).__name__} gave scores of shape {found.shape} for {len(pairs)} pairs, but one each is "
            "needed: a reranker with one label."
        )
    return found


def check_range(scores: Sequence[float] | np.ndarray, told: Callable[[int], str]) -> None:
    """Refuse scores that are not in 0..1, NaN among them."""
    values = np.asarray(scores, dtype=np.float64)
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{told(first)}: the score is {values[first]:g}, and {len(wrong) - 1} more of {len(values)} are out of "
            "range; a score is p(yes) in 0..1. A CrossEncoder that gives logits needs "
            "`activation_fn=torch.nn.Sigmoid()`; NaN comes of weights that overflow in float16."
        )
