"""How many of the nearest rows an index finds: measured on a sample, and what of its settings is chosen by that."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from unime_st.data import EncodedCorpus
from unime_st.embedding.approximate import import_faiss
from unime_st.search.exact import exact_search, unit_queries
from unime_st.search.index import AT

logger = logging.getLogger(__name__)

SAMPLE = 256
_DEPTHS = (10, 20, 50, 100, 200)  # rows scored for each that is asked for
_GIVEN_UP = 0.002  # of the recall of looking at everything, where that does not reach the target
_SEED = 1
_TIE = 1e-6


class RecallSample:
    """Queries and the rows that exact search finds for them.

    Args:
        corpus: The corpus.
        queries: ``(Q, D)``; None takes rows of the corpus, each of which is then no answer to itself.
    """

    def __init__(self, corpus: EncodedCorpus, queries: Any) -> None:
        self.corpus = corpus
        self.own: np.ndarray | None = None
        if queries is None:
            chosen = np.random.default_rng(_SEED).choice(len(corpus), min(SAMPLE, len(corpus)), replace=False)
            self.own = np.sort(chosen)
            queries = corpus.rows(self.own)
        self.queries = unit_queries(queries, corpus.shape[1])
        if not len(self.queries):
            raise ValueError("`queries` is empty, so no recall can be measured on it. Leave it out, or give some.")
        self.k = min(AT, len(corpus) - (self.own is not None))
        self._nearest: np.ndarray | None = None

    @property
    def nearest(self) -> np.ndarray:
        """The rows to find, ``(Q, k)``; searched at the first use."""
        if self._nearest is None:
            logger.info("Searching %d queries exactly, to measure recall on", len(self.queries))
            found = exact_search(self.corpus, self.queries, self.k + (self.own is not None)).rows
            self._nearest = self._others(found, np.arange(len(found)))
        return self._nearest

    def recall(self, index: Any, places: np.ndarray) -> float:
        """The share of the rows to find that a faiss index finds for some of the queries, by their numbers ``(n,)``.

        A row of the same score as the last of them counts as it does: of equal rows it is chance which are found.
        """
        queries, truth = self.queries[places], self.nearest[places]
        _, rows = index.search(queries, self.k + (self.own is not None))
        rows = self._others(rows, places)
        copies = import_faiss().downcast_index(index.refine_index)
        scores, nearest = (
            np.einsum("qd,qkd->qk", queries, _reconstructed(copies, numbers)) for numbers in (rows, truth)
        )
        equal = np.abs(scores - nearest.min(axis=1, keepdims=True)) <= _TIE
        hit = ((rows[:, :, None] == truth[:, None, :]).any(axis=2) | equal) & (rows >= 0)
        return float(hit.mean())

    def _others(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Rows ``(n, k + 1)`` without the query's own, else without the last, ``(n, k)``."""
        if self.own is None:
            return rows
        own = rows == self.own[places][:, None]
        order = np.argsort(own, axis=1, kind="stable")[:, : self.k]
        return np.take_along_axis(rows, order, axis=1)


def _reconstructed(copies: Any, rows: np.ndarray) -> np.ndarray:
    """The index's copies of rows ``(n, k)`` as ``(n, k, D)``; of row -1 any."""
    flat = np.ascontiguousarray(np.maximum(rows, 0).reshape(-1))
    return copies.reconstruct_batch(flat).reshape(*rows.shape, -1)


def tune(index: Any, sample: RecallSample, target: float) -> dict[str, Any]:
    """Set the fewest cells and rows to look at that reach a recall, and tell what is found on the other queries.

    Where looking at everything does not reach it, what finds about as much as that is chosen.
    """
    faiss = import_faiss()
    cells = faiss.downcast_index(index.base_index)
    even, odd = np.arange(0, len(sample.queries), 2), np.arange(1, len(sample.queries), 2)
    held = odd if len(odd) else even

    def recall_of(probes: int, depth: int) -> float:
        cells.nprobe, index.k_factor = probes, depth
        return sample.recall(index, even)

    goal = min(target, recall_of(cells.nlist, _DEPTHS[-1]) - _GIVEN_UP)
    every = [2**power for power in range((cells.nlist - 1).bit_length())] + [cells.nlist]
    probes = next(count for count in every if recall_of(count, _DEPTHS[-1]) >= goal)
    depth = next(count for count in _DEPTHS if recall_of(probes, count) >= goal)
    cells.nprobe, index.k_factor = probes, depth
    recall = sample.recall(index, held)
    if recall < target:
        logger.warning("recall@%d of the index is %.3f, below the %.3f asked for.", AT, recall, target)
    kind = "given queries" if sample.own is None else "rows of the corpus"
    told = {"recall": round(recall, 4), "target": target, "queries": len(held), "of": kind}
    return {"nprobe": probes, "k_factor": depth, "recall@10": told}
