"""Exact search over an encoded corpus: every row is compared, a block of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from unime_st.arguments import require_count
from unime_st.data import EncodedCorpus

BLOCK = 16384
"""The most rows of a part that are in memory as float32 at once."""


class Found(NamedTuple):
    """The nearest rows of each query, nearest first.

    Attributes:
        scores: ``(Q, k)`` cosines, float32.
        rows: ``(Q, k)`` row numbers of the corpus, int64.
    """

    scores: np.ndarray
    rows: np.ndarray


def unit_queries(queries: Any, dimension: int) -> np.ndarray:
    """Queries ``(Q, D)`` or ``(D,)`` as ``(Q, D)`` float32 of length 1; one of zeros stays.

    Raises:
        ValueError: For another dimension, or a number that is not finite.
    """
    found = np.asarray(queries.detach().float().cpu() if hasattr(queries, "detach") else queries, dtype=np.float32)
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or found.shape[1] != dimension:
        raise ValueError(
            f"`queries` has the shape {found.shape}, but the corpus has {dimension} dimensions: give (Q, {dimension}) "
            f"or ({dimension},), embedded by the corpus's own model and settings (`truncate_dim` too)."
        )
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise ValueError(f"`queries` has a number that is not finite in row {row}, so nothing is nearest to it.")
    return unit_rows(found)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows ``(n, D)`` as float32 of length 1; one of zeros stays."""
    rows = np.asarray(rows, dtype=np.float32)
    return np.ascontiguousarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def exact_search(corpus: EncodedCorpus, queries: Any, top_k: int = 10, *, among: np.ndarray | None = None) -> Found:
    """Compare queries with every row of a corpus, or with some; of equal scores the row that comes first is nearer.

    Args:
        corpus: See :func:`~unime_st.data.load_corpus`.
        queries: ``(Q, D)`` or ``(D,)``.
        top_k: Rows for each query; fewer where there are fewer.
        among: Row numbers to compare with, in rising order; None compares with all.

    Returns:
        The nearest rows, ``(Q, min(top_k, rows compared))``.

    Raises:
        TypeError: When ``top_k`` is no whole number.
        ValueError: When ``top_k`` is below 1, for queries of another dimension, or a damaged part.

    Example:
        >>> import tempfile
        >>> from unime_st.data import encode_corpus
        >>> class Points:  # stands for a model
        ...     def encode(self, items, **options):
        ...         return np.array([[float(item), 1.0] for item in items])
        >>> corpus = encode_corpus(Points(), ["0", "2", "-3"], tempfile.mkdtemp(), model_name="points")
        >>> exact_search(corpus, [2.0, 1.0], top_k=2).rows.tolist()
        [[1, 0]]
    """
    require_count("top_k", top_k)
    asked = unit_queries(queries, corpus.shape[1])
    best = Found(np.empty((len(asked), 0), np.float32), np.empty((len(asked), 0), np.int64))
    for block, stored in _blocks(corpus, among):
        rows = np.asarray(stored, dtype=np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        scores, numbers = asked @ rows.T / np.maximum(lengths, 1e-12), block  # (Q, n), (n,)
        if best.rows.shape[1] == top_k:
            worth = np.flatnonzero((scores > best.scores[:, -1:]).any(axis=0))
            scores, numbers = scores[:, worth], block[worth]
        every = np.concatenate([best.scores, scores], axis=1)
        names = np.concatenate([best.rows, np.broadcast_to(numbers, scores.shape)], axis=1)
        order = np.argsort(-every, axis=1, kind="stable")[:, :top_k]
        best = Found(np.take_along_axis(every, order, axis=1), np.take_along_axis(names, order, axis=1))
    return best


def _blocks(corpus: EncodedCorpus, among: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers ``(n,)`` and their embeddings ``(n, D)``, block after block; parts without any are not read."""
    size = corpus.manifest["window_size"]
    if among is not None:
        of_part = among // size
        for part in np.unique(of_part):
            numbers = among[of_part == part]
            for start in range(0, len(numbers), BLOCK):
                yield numbers[start : start + BLOCK], corpus.rows(numbers[start : start + BLOCK])
        return
    first = 0
    for part in corpus.parts():
        count = min(len(part), len(corpus) - first)  # the last one may have grown since the corpus was opened
        for start in range(0, count, BLOCK):
            block = part[start : min(start + BLOCK, count)]
            yield np.arange(first + start, first + start + len(block)), block
        first += count
