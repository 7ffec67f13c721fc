"""The nearest candidates of each query that are not false negatives, among more of them than fit in memory at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_BLOCK = 16384
_PROBED = 1 / 16
_TRAINING_ROWS_A_CELL = 64


class Forbidden(NamedTuple):
    """Pairs of a query and a candidate that answers it, or is the query itself.

    Attributes:
        rows: ``(P,)`` queries.
        candidates: ``(P,)`` candidates.
    """

    rows: np.ndarray
    candidates: np.ndarray


class Nearest(NamedTuple):
    """The nearest valid candidates of each query, nearest first.

    Attributes:
        scores: ``(Q, m)`` cosines; ``-inf`` where a query has fewer.
        candidates: ``(Q, m)`` their numbers; any where the score is ``-inf``.
    """

    scores: np.ndarray
    candidates: np.ndarray


def exact_nearest(
    queries: Tensor,
    positive_scores: Tensor,
    *,
    num_candidates: int,
    read: Callable[[np.ndarray], Tensor],
    forbidden: Forbidden,
    margin: float | None,
    keep: int,
) -> Nearest:
    """Compare every query with every candidate, a block of candidates at a time.

    The rule is that of :func:`~unime_st.functional.hardest_valid_negatives`: a candidate above the positive's score
    plus the margin is a false negative, and so is a forbidden one.

    Args:
        queries: ``(Q, D)`` of length 1.
        positive_scores: ``(Q,)`` each query's cosine with its own positive.
        num_candidates: ``C``.
        read: Gives the candidates ``(n, D)`` of length 1 with the given numbers; NaN for one that cannot be used.
        forbidden: See :class:`Forbidden`.
        margin: None switches the filter by score off.
        keep: ``m``.

    Example:
        >>> points = torch.eye(3) + 0.0
        >>> none = Forbidden(np.array([0]), np.array([0]))
        >>> exact_nearest(
        ...     points[:1],
        ...     torch.ones(1),
        ...     num_candidates=3,
        ...     read=lambda numbers: points[numbers],
        ...     forbidden=none,
        ...     margin=0.1,
        ...     keep=1,
        ... ).scores.tolist()
        [[0.0]]
    """
    limit = positive_scores[:, None] + (torch.inf if margin is None else margin)  # (Q, 1)
    order = np.argsort(forbidden.candidates, kind="stable")
    rows, candidates = forbidden.rows[order], forbidden.candidates[order]
    best = torch.full((len(queries), 0), -torch.inf, device=queries.device)
    numbers = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
    for start in range(0, num_candidates, _BLOCK):
        end = min(start + _BLOCK, num_candidates)
        scores = queries @ read(np.arange(start, end)).to(queries.device).T  # (Q, block)
        scores.masked_fill_((scores > limit) | scores.isnan(), -torch.inf)
        first, last = np.searchsorted(candidates, [start, end])
        scores[torch.from_numpy(rows[first:last]), torch.from_numpy(candidates[first:last] - start)] = -torch.inf
        top = scores.topk(min(keep, end - start), dim=1)
        both = torch.cat([best, top.values], dim=1)
        best, places = both.topk(min(keep, both.shape[1]), dim=1)
        numbers = torch.cat([numbers, top.indices + start], dim=1).gather(1, places)
    return Nearest(best.cpu().numpy(), numbers.cpu().numpy())


class FaissIndex:
    """Candidates by approximate nearest neighbours (an inverted file of faiss), for sets too large to compare in full.

    Args:
        num_candidates: ``C``.
        dimension: ``D``.
        read: See :func:`exact_nearest`.

    Raises:
        ImportError: When faiss is not installed.
    """

    def __init__(self, num_candidates: int, dimension: int, read: Callable[[np.ndarray], Tensor]) -> None:
        try:
            faiss: Any = importlib.import_module("faiss")
        except ImportError as error:
            raise ImportError(
                "`search='faiss'` needs faiss: pip install faiss-cpu (the extra `ann`), or use `search='exact'`."
            ) from error
        cells = max(1, min(int(4 * num_candidates**0.5), num_candidates // 39))
        self._read, self._total = read, num_candidates
        self._index: Any = faiss.index_factory(dimension, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        drawn = np.random.default_rng(0).permutation(num_candidates)[: cells * _TRAINING_ROWS_A_CELL]
        self._index.train(self._vectors(np.sort(drawn)))
        for start in range(0, num_candidates, _BLOCK):
            self._index.add(self._vectors(np.arange(start, min(start + _BLOCK, num_candidates))))
        self._index.nprobe = max(1, int(cells * _PROBED), min(cells, 8))

    def nearest(
        self, queries: Tensor, positive_scores: Tensor, *, forbidden: Forbidden, margin: float | None, keep: int
    ) -> Nearest:
        """Find the nearest valid candidates; queries for which too few come are compared with all of them.

        Arguments and result are those of :func:`exact_nearest`.
        """
        depth = min(self._total, 2 * keep + 64)
        scores, numbers = self._index.search(queries.cpu().numpy(), depth)
        there = numbers >= 0
        codes = np.arange(len(numbers))[:, None] * self._total + numbers
        false = np.isin(codes, forbidden.rows * self._total + forbidden.candidates)
        if margin is not None:
            false |= scores > positive_scores.cpu().numpy()[:, None] + margin
        scores = np.where(there & ~false, scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
        found = Nearest(np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1))
        short = np.flatnonzero((found.scores == -np.inf).any(axis=1))
        if not len(short) or depth == self._total:
            return found
        place = np.full(len(queries), -1)
        place[short] = np.arange(len(short))
        own = place[forbidden.rows] >= 0
        again = exact_nearest(
            queries[short],
            positive_scores[short],
            num_candidates=self._total,
            read=self._read,
            forbidden=Forbidden(place[forbidden.rows[own]], forbidden.candidates[own]),
            margin=margin,
            keep=keep,
        )
        found.scores[short], found.candidates[short] = again
        return found

    def _vectors(self, numbers: np.ndarray) -> np.ndarray:
        return torch.nan_to_num(self._read(numbers)).cpu().numpy()
