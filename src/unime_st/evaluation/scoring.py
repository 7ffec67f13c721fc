"""Scores from embeddings: pure functions, a matrix product at a time, with ties always accounted for.

Dimension letters: Q queries, C candidates of a query, U distinct embeddings, D dimension, k results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def unit_rows(embeddings: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, np.ndarray]:
    """Normalise rows, and find rows that are equal to the bit so that they tie exactly.

    A matrix product may round two equal columns differently; each distinct row is therefore kept once.

    Args:
        embeddings: Shape (N, D).
        device: Where the result is to be.

    Returns:
        Distinct rows of length 1 (a zero row stays zero), shape (U, D), and for each of the N its row, shape (N,).

    Example:
        >>> rows, index = unit_rows(np.array([[3.0, 4.0], [1.0, 0.0], [3.0, 4.0]]))
        >>> rows.shape, index.tolist()
        (torch.Size([2, 2]), [0, 1, 0])
    """
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    first: dict[bytes, int] = {}
    index = np.fromiter((first.setdefault(row.tobytes(), len(first)) for row in embeddings), np.int64, len(embeddings))
    keep = np.unique(index, return_index=True)[1]
    rows = torch.nn.functional.normalize(torch.from_numpy(embeddings[keep]).to(device), dim=1)
    return rows, index


@dataclass(frozen=True)
class CandidateScores:
    """Outcome for queries that each have candidates of their own.

    Attributes:
        right: Whether the right answer has the best score, a tie counting as right, shape (Q,).
        tied: Whether a candidate of other content shares that best score, shape (Q,).
        rank: Rank of the right answer from 1, behind better scores only, shape (Q,).
        top: The best candidates' places among the query's own, best first, -1 past the last, shape (Q, k).
        scores: Their cosines, -inf past the last, shape (Q, k).
    """

    right: np.ndarray
    tied: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    scores: np.ndarray


def score_candidates(
    embeddings: np.ndarray,
    queries: Sequence[int] | np.ndarray,
    candidates: Sequence[np.ndarray],
    *,
    k: int = 5,
    chunk_size: int = 64,
    device: torch.device | str = "cpu",
) -> CandidateScores:
    """Compare each query with its own candidates, of which the first is the right answer.

    As in the published evaluation, the first of the best candidates wins, so a tie counts as right; ``tied`` tells.
    Copies of the right answer are the right answer, not a tie.

    Args:
        embeddings: Distinct embeddings, shape (U, D).
        queries: Rows of ``embeddings``, Q of them.
        candidates: For each query the rows of its candidates, at least one; uneven lengths allowed.
        k: How many of the best to keep.
        chunk_size: Queries a matrix product.
        device: Where to compute.

    Returns:
        The outcome of each query.

    Raises:
        ValueError: If a query has no candidates.

    Example:
        >>> vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> score_candidates(vectors, [0, 2], [np.array([1, 2]), np.array([0, 1])]).right.tolist()
        [True, False]
    """
    queries = np.asarray(queries, dtype=np.int64)
    if empty := [number for number, own in enumerate(candidates) if len(own) == 0]:
        raise ValueError(f"Query {empty[0]} has no candidates to choose from.")
    rows, same = unit_rows(embeddings, device)
    right, tied = np.zeros(len(queries), dtype=bool), np.zeros(len(queries), dtype=bool)
    rank, top = np.zeros(len(queries), dtype=np.int64), np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for start in range(0, len(queries), chunk_size):
        part = slice(start, start + chunk_size)
        own = candidates[part]
        longest = max(len(ids) for ids in own)
        ids = np.stack([np.pad(ids, (0, longest - len(ids)), constant_values=-1) for ids in own])  # (Q, C)
        pool, place = np.unique(same[ids], return_inverse=True)  # padding points at some row; masked below
        cosines = rows[torch.from_numpy(same[queries[part]])] @ rows[torch.from_numpy(pool)].T
        cosine = np.take_along_axis(cosines.cpu().numpy(), place.reshape(ids.shape), axis=1)  # (Q, C)
        cosine[ids == -1] = -np.inf
        best = cosine.max(axis=1, keepdims=True)
        rank[part] = 1 + (cosine > cosine[:, :1]).sum(axis=1)
        right[part] = rank[part] == 1
        tied[part] = right[part] & ((cosine == best) & (ids != ids[:, :1])).any(axis=1)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(cosine, order, axis=1)
        top[part, : order.shape[1]] = np.where(np.isneginf(kept), -1, order)
        scores[part, : order.shape[1]] = kept
    return CandidateScores(right, tied, rank, top, scores)


@dataclass(frozen=True)
class Ranking:
    """Outcome for queries that share one pool of candidates.

    Attributes:
        ranks: Candidates that score at least as well as the query's best right one without being right, shape (Q,).
        tied: Whether one of them scores exactly as well, shape (Q,).
        top: Best candidates, best first, -1 past the last, shape (Q, k).
        scores: Their cosines, shape (Q, k).
    """

    ranks: np.ndarray
    tied: np.ndarray
    top: np.ndarray
    scores: np.ndarray

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
        ValueError: If a query has no right candidate.

    Example:
        >>> ranking = rank_pool(np.eye(2), np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [[1], [2]])
        >>> ranking.ranks.tolist(), ranking.recall(1)
        ([1, 0], 0.5)
    """
    if empty := [number for number, own in enumerate(right) if len(own) == 0]:
        raise ValueError(f"Query {empty[0]} has no right candidate.")
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
        best = cosine.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks = ((cosine >= best) & ~is_right).sum(dim=1)
        tied = ((cosine == best) & ~is_right).any(dim=1)
        top = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]  # equal scores in the order of the pool
        scores = cosine.gather(1, top)
        parts.append([part.cpu().numpy() for part in (ranks, tied, top, scores)])
    return Ranking(*(np.concatenate(column) for column in zip(*parts, strict=True)))
