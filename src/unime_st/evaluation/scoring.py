"""Scores from embeddings: pure functions, one matrix product at a time, with ties always accounted for.

Equal scores are treated as in the published evaluations. MMEB takes them in the order of the candidates
(``numpy.argmax`` in V1, ``numpy.argsort`` in V2). Where each query has its own candidates, the right one first, a tie
is therefore right; in a pool that all queries share, the pool's order decides. Retrieval scripts take ``torch.topk``,
which promises no order: there a tie is wrong, so that a score is never luck. Copies of a right answer are right
wherever they stand.

Dimension letters: Q queries, C candidates of a query, U distinct embeddings, D dimension, k results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CUTOFF = 5  # the k of nDCG@k


def unit_rows(embeddings: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, np.ndarray]:
    """The distinct rows of embeddings (N, D), of length 1, (U, D), and for each of the N its row, (N,).

    A matrix product may round equal columns differently; rows equal to the bit are kept once, so that they tie exactly.
    NaN and infinity are refused, for they would win or lose every comparison.
    """
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ValueError(f"Embedding {row} holds NaN or infinity, which cannot be compared. Encode it again.")
    first: dict[bytes, int] = {}
    index = np.fromiter((first.setdefault(row.tobytes(), len(first)) for row in embeddings), np.int64, len(embeddings))
    keep = np.unique(index, return_index=True)[1]
    rows = torch.nn.functional.normalize(torch.from_numpy(embeddings[keep]).to(device), dim=1)
    return rows, index


@dataclass(frozen=True)
class CandidateScores:
    """The outcome for queries that choose among candidates; places are among a query's own, or in the pool."""

    right: np.ndarray  # (Q,) whether a right answer comes first
    tied: np.ndarray  # (Q,) whether the order decides that, since right and wrong candidates share the best score
    best: np.ndarray  # (Q,) the place of the best right answer
    rank: np.ndarray  # (Q,) its rank, from 1
    ndcg: np.ndarray  # (Q,) nDCG@5 with "linear" gains: a result's gain is its relevance
    ndcg_tied: np.ndarray  # (Q,) whether the order of equal scores decides that
    top: np.ndarray  # (Q, k) places of the best candidates, equal ones in their order, -1 past the last
    scores: np.ndarray  # (Q, k) their cosines, -inf past the last
    gains: np.ndarray  # (Q, k) their relevance
    ideal: np.ndarray  # (Q,) DCG@5 of the best order

    def reranked(self, scores: np.ndarray) -> CandidateScores:
        """The outcome after the first candidates got new scores ``(Q, n)``, n <= k, see ``reranking``.

        Equal scores keep the order of cosines, and candidates past the first ``n`` stay where they are.
        """
        n = scores.shape[1]
        numbers = pair_order(scores, self.scores[:, :n])
        order = np.arange(self.top.shape[1])[None].repeat(len(scores), axis=0)
        order[:, :n] = best_order(numbers)
        # what stays behind is ordered by cosine, below all that was scored
        behind = pair_order(self.scores[:, n:], self.scores[:, n:]) - self.top.shape[1]
        numbers = np.concatenate([numbers, behind], axis=1)
        top, cosines, gains, sorted_numbers = (
            np.take_along_axis(own, order, axis=1) for own in (self.top, self.scores, self.gains, numbers)
        )
        is_right = gains[:, :n] > 0
        there, first = is_right.any(axis=1), is_right.argmax(axis=1)
        rank = np.where(there, first + 1, self.rank)
        best = np.where(there, np.take_along_axis(top, first[:, None], axis=1)[:, 0], self.best)
        tied = _order_decides(numbers, self.gains > 0, sorted_numbers[:, :1], gains[:, :1] > 0)
        ndcg_tied = _order_decides(numbers, self.gains, sorted_numbers[:, :_CUTOFF], gains[:, :_CUTOFF])
        ndcg = _dcg(gains) / self.ideal
        return CandidateScores(rank == 1, tied, best, rank, ndcg, ndcg_tied, top, cosines, gains, self.ideal)


def score_candidates(
    embeddings: np.ndarray,
    queries: Sequence[int] | np.ndarray,
    candidates: Sequence[np.ndarray],
    *,
    gains: Sequence[np.ndarray] | None = None,
    pool: np.ndarray | None = None,
    k: int = 5,
    chunk_size: int = 64,
    device: torch.device | str = "cpu",
) -> CandidateScores:
    """Compare each of Q queries with its own candidates, or with a ``pool`` (C,) that all share.

    ``queries``, ``candidates`` and ``pool`` are rows of the distinct ``embeddings`` (U, D). ``candidates`` has one
    array per query: its candidates, the right answer first, or with a pool its relevant ones alone. ``gains`` is the
    relevance of each; None is 1 for the right ones. Copies of a right answer are right, and no tie.
    """
    queries = np.asarray(queries, dtype=np.int64)
    _check(k=k, chunk_size=chunk_size, queries=len(queries))
    if len(candidates) != len(queries) or (gains is not None and list(map(len, gains)) != list(map(len, candidates))):
        raise ValueError(
            f"{len(queries)} queries need as many lists of candidates, and of their gains, of equal length."
        )
    if empty := [number for number, own in enumerate(candidates) if len(own) == 0]:
        raise ValueError(f"Query {empty[0]} has no candidates to choose from.")
    rows, same = unit_rows(embeddings, device)
    parts = []
    for start in range(0, len(queries), chunk_size):
        part = slice(start, start + chunk_size)
        graded = None if gains is None else gains[part]
        ids, gain = (_own if pool is None else _shared(pool))(candidates[part], graded)
        if (gain.max(axis=1) <= 0).any():
            first = start + int((gain.max(axis=1) <= 0).argmax())
            raise ValueError(f"Query {first} has no right answer among its candidates.")
        distinct, place = np.unique(same[ids], return_inverse=True)  # padding points at some row, and is masked below
        cosines = rows[torch.from_numpy(same[queries[part]])] @ rows[torch.from_numpy(distinct)].T
        cosine = np.take_along_axis(cosines.cpu().numpy(), place.reshape(ids.shape), axis=1)  # (Q, C)
        cosine[ids == -1] = -np.inf
        parts.append(_ranked(cosine, gain, k))
    return CandidateScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _ranked(cosine: np.ndarray, gain: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """The fields of :class:`CandidateScores` for cosines and gains (Q, C)."""
    right_ones = np.where(gain > 0, cosine, -np.inf)
    first = right_ones.argmax(axis=1)[:, None]  # argmax takes the first of equal ones
    best = np.take_along_axis(right_ones, first, axis=1)
    ahead = (cosine > best) | ((cosine == best) & (np.arange(cosine.shape[1]) < first))
    rank = 1 + ahead.sum(axis=1)
    top, scores = best_first(cosine, max(k, _CUTOFF))
    found = np.where(top >= 0, np.take_along_axis(gain, np.maximum(top, 0), axis=1), 0.0)
    tied = _order_decides(cosine, gain > 0, scores[:, :1], found[:, :1] > 0)
    ndcg_tied = _order_decides(cosine, gain, scores[:, :_CUTOFF], found[:, :_CUTOFF])
    ideal = _dcg(np.maximum(best_first(gain, _CUTOFF)[1], 0.0))
    told = rank == 1, tied, first[:, 0], rank, _dcg(found) / ideal, ndcg_tied
    return *told, top[:, :k], scores[:, :k], found[:, :k], ideal


def _order_decides(cosine: np.ndarray, gain: np.ndarray, scores: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Whether a result (Q, k) might as well be a candidate of equal score and another gain, (Q,)."""
    decides = np.zeros(len(cosine), dtype=bool)
    for score, own in zip(scores.T[..., None], found.T[..., None], strict=True):
        decides |= ((cosine == score) & (gain != own)).any(axis=1)
    return decides


def _own(candidates: Sequence[np.ndarray], gains: Sequence[np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """Pad each query's own candidates: their rows, -1 for none, and their gains, both (Q, C)."""
    longest = max(len(own) for own in candidates)
    ids = np.stack([np.pad(own, (0, longest - len(own)), constant_values=-1) for own in candidates])
    if gains is None:
        return ids, (ids == ids[:, :1]).astype(np.float64)
    return ids, np.stack([np.pad(np.asarray(own, float), (0, longest - len(own))) for own in gains])


def _shared(pool: np.ndarray) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The same as :func:`_own` for a pool that all queries share; all places of a relevant content are relevant."""
    order = np.argsort(pool, kind="stable")

    def ids_and_gains(relevant: Sequence[np.ndarray], gains: Sequence[np.ndarray] | None) -> Any:
        gain = np.zeros((len(relevant), len(pool)))
        for row, own in enumerate(relevant):
            first, last = (np.searchsorted(pool, own, side, sorter=order) for side in ("left", "right"))
            if (first == last).any():
                raise ValueError(f"A relevant candidate (row {own[first == last][0]}) is not in the pool.")
            for number, (a, b) in enumerate(zip(first, last, strict=True)):
                gain[row, order[a:b]] = 1.0 if gains is None else gains[row][number]
        return np.broadcast_to(pool, gain.shape), gain

    return ids_and_gains


def best_first(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The places (-1 past the last) and scores (-inf past the last) of the k highest of each row, both (Q, k).

    Scores (Q, C) that are -inf do not count; equal ones stand in their order. The rest is not sorted.
    """
    top = np.full((len(scores), k), -1, dtype=np.int64)
    kept = np.full((len(scores), k), -np.inf, dtype=scores.dtype)
    count = min(k, scores.shape[1])
    least = np.partition(scores, scores.shape[1] - count, axis=1)[:, scores.shape[1] - count]
    for row, values in enumerate(scores):
        chosen = np.flatnonzero((values >= least[row]) & (values > -np.inf))
        chosen = chosen[np.argsort(-values[chosen], kind="stable")][:count]
        top[row, : len(chosen)] = chosen
        kept[row, : len(chosen)] = values[chosen]
    return top, kept


def pair_order(scores: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Dense numbers (Q, k) that order by score, equal ones by cosine; equal where both are.

    >>> pair_order(np.array([[0.5, 0.9, 0.5, 0.5]]), np.array([[0.3, 0.1, 0.3, 0.2]])).tolist()
    [[1, 2, 1, 0]]
    """
    order = np.lexsort((cosines, scores), axis=-1)
    ranked = [np.take_along_axis(values, order, axis=1) for values in (scores, cosines)]
    steps = np.zeros(scores.shape, dtype=np.int64)
    for values in ranked:
        steps[:, 1:] |= values[:, 1:] != values[:, :-1]
    numbers = np.empty_like(steps)
    np.put_along_axis(numbers, order, steps.cumsum(axis=1), axis=1)
    return numbers


def best_order(numbers: np.ndarray) -> np.ndarray:
    """Places (Q, k) of what :func:`pair_order` numbers, the highest first, equal ones as they stand."""
    return np.argsort(-numbers, axis=1, kind="stable")


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}={number}`, but there must be at least one.")


def _dcg(found: np.ndarray) -> np.ndarray:
    """DCG@5 of gains in the order found (Q, k), (Q,)."""
    first = found[:, :_CUTOFF]
    return (first / np.log2(np.arange(2, first.shape[1] + 2))).sum(axis=1)


@dataclass(frozen=True)
class Ranking:
    """The outcome for queries that share one pool of candidates."""

    ranks: np.ndarray  # (Q,) the number of wrong candidates that score at least as well as the best right one
    better: np.ndarray  # (Q,) the number of those that score better
    best: np.ndarray  # (Q,) that right one
    top: np.ndarray  # (Q, k) the best candidates, best first, -1 past the last
    scores: np.ndarray  # (Q, k) their cosines

    @property
    def tied(self) -> np.ndarray:
        """Whether a wrong candidate scores exactly as well as the best right one, (Q,)."""
        return self.ranks > self.better

    def reranked(self, right: Sequence[Sequence[int]], scores: np.ndarray) -> Ranking:
        """The outcome after the first candidates got new scores ``(Q, n)``, n <= k, see ``reranking``.

        Equal scores keep the order of cosines; a wrong candidate with equal score and cosine goes first. ``right``
        lists the right candidates of each query, as ``top`` numbers them.
        """
        n = scores.shape[1]
        numbers = pair_order(scores, self.scores[:, :n])
        is_right = np.array([np.isin(row[:n], own) for row, own in zip(self.top, right, strict=True)]).reshape(-1, n)
        best = np.where(is_right, numbers, -1)
        place, best = best.argmax(axis=1), best.max(axis=1, keepdims=True)
        found = self.ranks < n  # whether a right candidate is among them in any order of equal cosines
        ranks = np.where(found, ((numbers >= best) & ~is_right).sum(axis=1), self.ranks)
        better = np.where(found, ((numbers > best) & ~is_right).sum(axis=1), self.better)
        order = np.arange(self.top.shape[1])[None].repeat(len(scores), axis=0)
        order[:, :n] = best_order(numbers)
        top, cosines = (np.take_along_axis(own, order, axis=1) for own in (self.top, self.scores))
        return Ranking(ranks, better, np.where(found, self.top[np.arange(len(top)), place], self.best), top, cosines)

    def tied_at(self, k: int) -> np.ndarray:
        """Whether another order of equal scores would make a query right at k that is wrong, (Q,)."""
        return (self.better < k) & (self.ranks >= k)

    def recall(self, k: int) -> float:
        """The share of queries with a right candidate among their first k."""
        return float((self.ranks < k).mean())


def rank_pool(
    queries: np.ndarray,
    candidates: np.ndarray,
    right: Sequence[Sequence[int]],
    *,
    k: int = 10,
    chunk_size: int = 1024,
    device: torch.device | str = "cpu",
) -> Ranking:
    """Rank candidates (U, D) for each query (Q, D), which is right at k if a right candidate is among the first k.

    ``right`` lists the right candidates of each query. Ties are resolved against the model. Memory is ``chunk_size *
    U``.
    """
    _check(k=k, chunk_size=chunk_size, queries=len(queries))
    if len(right) != len(queries):
        raise ValueError(f"{len(queries)} queries, but right candidates of {len(right)}.")
    for number, own in enumerate(right):
        if len(own) == 0:
            raise ValueError(f"Query {number} has no right candidate.")
        if min(own) < 0 or max(own) >= len(candidates):
            raise ValueError(
                f"Query {number} has right candidates {list(own)}, but there are {len(candidates)}, from 0."
            )
    query_rows, query_index = unit_rows(queries, device)
    pool, pool_index = unit_rows(candidates, device)
    expand = torch.from_numpy(pool_index).to(device)
    k = min(k, len(candidates))
    parts = []
    for start in range(0, len(queries), chunk_size):
        chunk = torch.from_numpy(query_index[start : start + chunk_size]).to(device)
        cosine = (query_rows[chunk] @ pool.T)[:, expand]  # (Q, U)
        is_right = torch.zeros_like(cosine, dtype=torch.bool)
        for row, own in enumerate(right[start : start + chunk_size]):
            is_right[row, torch.as_tensor(list(own), device=device)] = True
        best, place = cosine.masked_fill(~is_right, -torch.inf).max(dim=1, keepdim=True)
        ranks = ((cosine >= best) & ~is_right).sum(dim=1)
        better = (cosine > best).sum(dim=1)
        top, scores = best_first(cosine.cpu().numpy(), k)
        parts.append([*(part.cpu().numpy() for part in (ranks, better, place[:, 0])), top, scores])
    return Ranking(*(np.concatenate(column) for column in zip(*parts, strict=True)))
