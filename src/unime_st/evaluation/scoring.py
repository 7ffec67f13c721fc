"""Scores from embeddings: pure functions, a matrix product at a time, with ties always accounted for.

What becomes of equal scores is what the published evaluations do. MMEB takes them in the order of the candidates
(``numpy.argmax`` in V1, ``numpy.argsort`` in V2): where each query has its own, the right one first, a tie is therefore
right, and in a pool that all share the pool's order decides. Retrieval scripts take ``torch.topk``, which promises no
order: there a tie is wrong, so that a score is never luck. Copies of a right answer are right wherever they stand.

Dimension letters: Q queries, C candidates of a query, U distinct embeddings, D dimension, k results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CUTOFF = 5  # of nDCG


def unit_rows(embeddings: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, np.ndarray]:
    """Normalise rows, and find rows that are equal to the bit so that they tie exactly.

    A matrix product may round two equal columns differently; each distinct row is therefore kept once.

    Args:
        embeddings: Shape (N, D).
        device: Where the result is to be.

    Returns:
        Distinct rows of length 1 (a zero row stays zero), shape (U, D), and for each of the N its row, shape (N,).

    Raises:
        ValueError: If a number is not finite: it would win or lose every comparison.

    Example:
        >>> rows, index = unit_rows(np.array([[3.0, 4.0], [1.0, 0.0], [3.0, 4.0]]))
        >>> rows.shape, index.tolist()
        (torch.Size([2, 2]), [0, 1, 0])
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
    """Outcome for queries that choose among candidates.

    Attributes:
        right: Whether a right answer comes first, shape (Q,).
        tied: Whether the order decides that: right and wrong candidates share the best score, shape (Q,).
        best: Place of the best right answer among the query's own candidates, or in the pool, shape (Q,).
        rank: Its rank, from 1, shape (Q,).
        ndcg: nDCG@5, the gain of a result being its relevance ("linear"), shape (Q,).
        ndcg_tied: Whether the order of equal scores decides that, shape (Q,).
        top: The best candidates' places among the query's own, or in the pool, best first and equal ones in their
            order, -1 past the last, shape (Q, k).
        scores: Their cosines, -inf past the last, shape (Q, k).
    """

    right: np.ndarray
    tied: np.ndarray
    best: np.ndarray
    rank: np.ndarray
    ndcg: np.ndarray
    ndcg_tied: np.ndarray
    top: np.ndarray
    scores: np.ndarray


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
    """Compare each query with its own candidates, or with a pool that all share.

    Equal scores stand in the order of the candidates. Copies of a right answer are right, and no tie.

    Args:
        embeddings: Distinct embeddings, shape (U, D).
        queries: Rows of ``embeddings``, Q of them.
        candidates: For each query the rows of its candidates, the right answer first; uneven lengths allowed. With a
            ``pool``, of its relevant ones alone.
        gains: Relevance of each of ``candidates``, 0 or more; None for 1 for the right ones.
        pool: Rows of the candidates of every query, shape (C,); None for each query's own.
        k: How many of the best to keep.
        chunk_size: Queries a matrix product.
        device: Where to compute.

    Returns:
        The outcome of each query.

    Raises:
        ValueError: If a query has no candidates, none of its candidates is relevant, or a relevant one is not in the
            pool; if there are no queries, not as many of one thing as of another, or a number below 1.

    Example:
        >>> vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> score_candidates(vectors, [0, 2], [np.array([1, 2]), np.array([0, 1])]).right.tolist()
        [True, False]
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
    width = max(k, _CUTOFF)
    parts = []
    for start in range(0, len(queries), chunk_size):
        part = slice(start, start + chunk_size)
        graded = None if gains is None else gains[part]
        ids, gain = (_own if pool is None else _shared(pool))(candidates[part], graded)
        if (gain.max(axis=1) <= 0).any():
            first = start + int((gain.max(axis=1) <= 0).argmax())
            raise ValueError(f"Query {first} has no right answer among its candidates.")
        distinct, place = np.unique(same[ids], return_inverse=True)  # padding points at some row; masked below
        cosines = rows[torch.from_numpy(same[queries[part]])] @ rows[torch.from_numpy(distinct)].T
        cosine = np.take_along_axis(cosines.cpu().numpy(), place.reshape(ids.shape), axis=1)  # (Q, C)
        cosine[ids == -1] = -np.inf
        right_ones = np.where(gain > 0, cosine, -np.inf)
        first = right_ones.argmax(axis=1)[:, None]  # of equal ones the first
        best = np.take_along_axis(right_ones, first, axis=1)
        ahead = (cosine > best) | ((cosine == best) & (np.arange(cosine.shape[1]) < first))
        rank = 1 + ahead.sum(axis=1)
        top, scores = best_first(cosine, width)
        found = np.where(top >= 0, np.take_along_axis(gain, np.maximum(top, 0), axis=1), 0.0)
        tied = _order_decides(cosine, gain > 0, scores[:, :1], found[:, :1] > 0)
        ndcg_tied = _order_decides(cosine, gain, scores[:, :_CUTOFF], found[:, :_CUTOFF])
        ndcg = _ndcg(found, gain)
        parts.append((rank == 1, tied, first[:, 0], rank, ndcg, ndcg_tied, top[:, :k], scores[:, :k]))
    return CandidateScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _order_decides(cosine: np.ndarray, gain: np.ndarray, scores: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Whether one of the results (Q, k) might as well be a candidate of equal score and another gain, shape (Q,)."""
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
    """As :func:`_own`, for a pool that all queries share; several places of one content are all relevant."""
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
    """Find the k highest of each row without sorting the rest; equal ones in their order.

    Args:
        scores: Shape (Q, C); -inf is nothing.
        k: How many.

    Returns:
        Places, -1 past the last, and scores, -inf past the last, both of shape (Q, k).

    Example:
        >>> best_first(np.array([[0.1, 0.5, 0.5, 0.2]]), 3)[0].tolist()
        [[1, 2, 3]]
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


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}={number}`, but there must be at least one.")


def _ndcg(found: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """nDCG@5 of gains in the order found (Q, k), against the best order of all gains (Q, C)."""
    discounts = 1 / np.log2(np.arange(2, _CUTOFF + 2))
    ideal = best_first(gains, _CUTOFF)[1]
    ideal[np.isneginf(ideal)] = 0.0
    return (found[:, :_CUTOFF] * discounts).sum(axis=1) / (ideal * discounts).sum(axis=1)


@dataclass(frozen=True)
class Ranking:
    """Outcome for queries that share one pool of candidates.

    Attributes:
        ranks: Wrong candidates that score at least as well as the query's best right one, shape (Q,).
        better: Those that score better, shape (Q,).
        best: That right one, shape (Q,).
        top: Best candidates, best first, -1 past the last, shape (Q, k).
        scores: Their cosines, shape (Q, k).
    """

    ranks: np.ndarray
    better: np.ndarray
    best: np.ndarray
    top: np.ndarray
    scores: np.ndarray

    @property
    def tied(self) -> np.ndarray:
        """Whether a wrong candidate scores exactly as well as the best right one, shape (Q,)."""
        return self.ranks > self.better

    def tied_at(self, k: int) -> np.ndarray:
        """Whether another order of equal scores would make a query right at k that is not, shape (Q,)."""
        return (self.better < k) & (self.ranks >= k)

    def recall(self, k: int) -> float:
        """Share of the queries with a right candidate among their first k."""
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
    """Rank one pool for each query. A query is right at k when any of its right candidates is among the first k.

    Ties are resolved against the model: every wrong candidate with the same score goes first.

    Args:
        queries: Shape (Q, D).
        candidates: Shape (U, D).
        right: For each query the indices of its right candidates, at least one.
        k: How many of the best to keep.
        chunk_size: Queries a matrix product; memory is ``chunk_size * U`` numbers.
        device: Where to compute.

    Returns:
        Ranks and the best candidates.

    Raises:
        ValueError: If a query has no right candidate or one that is not there, there are no queries or not as many as
            lists of right ones, or a number is below 1.

    Example:
        >>> ranking = rank_pool(np.eye(2), np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [[1], [2]])
        >>> ranking.ranks.tolist(), ranking.recall(1)
        ([1, 0], 0.5)
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
