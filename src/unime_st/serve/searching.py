"""Queries over a corpus, and what the page shows of their rows."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Protocol

import anyio
import numpy as np
from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException

from unime_st.serve.encoder import Encoder
from unime_st.serve.limits import Limits
from unime_st.serve.requests import SearchRequest
from unime_st.serve.rows import Rows

_AT_ONCE = 2  # searches, and images of the corpus that are decoded
_SAMPLE = 24  # rows shown before anything was asked


class Search(Protocol):
    """What of :class:`~unime_st.search.CorpusSearch` is needed.

    Attributes:
        corpus: That of ``load_corpus``.
    """

    corpus: Any

    def search(self, queries: Any, top_k: int = 10, *, id_prefix: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and numbers of the nearest rows of queries ``(Q, D)``, nearest first; both ``(Q, m)``, m <= top_k."""


class Searcher:
    """Answers queries of the page.

    Args:
        search: Finds rows.
        inputs: What the corpus was encoded from, or None.
        encoder: Embeds queries.
        limits: Bounds of requests.
    """

    def __init__(self, search: Search, inputs: Any, encoder: Encoder, limits: Limits) -> None:
        self.search, self.encoder, self.limits = search, encoder, limits
        self._readers, self._searches = (anyio.CapacityLimiter(_AT_ONCE) for _ in range(2))
        self.size = len(search.corpus)
        self.rows = Rows(search.corpus, inputs, max_pixels=limits.max_pixels)

    def about(self) -> dict[str, Any]:
        """What the page says before anything was asked."""
        sample = np.linspace(0, self.size - 1, min(_SAMPLE, self.size)).astype(int).tolist()
        return {
            "rows": self.size,
            "prefixes": self.rows.has_text_ids,
            "max_bytes": self.limits.max_bytes,
            "max_results": self.limits.max_results,
            "sample": [self.rows[row] for row in sample],
        }

    async def __call__(self, asked: SearchRequest) -> dict[str, Any]:
        """Answer a query.

        Returns:
            ``results`` (row, id, text, image, score), and the milliseconds that embedding and searching took.
        """
        if asked.k > self.limits.max_results:
            raise HTTPException(400, f"`k` is {asked.k}, and may be {self.limits.max_results} at most.")
        if asked.prefix and self.size and not self.rows.has_text_ids:
            raise HTTPException(400, "`prefix` chooses nothing: this corpus has no ids that are texts.")
        started = perf_counter()
        if asked.like is None:
            query = await self.encoder.query(asked)
        else:
            if asked.text or asked.image:
                raise HTTPException(400, "`like` is a query itself. Leave text and image out.")
            query = await run_sync(self._embedding, asked.like, limiter=self._searches)
        embedded = perf_counter()
        results = await run_sync(self._nearest, query, asked, limiter=self._searches)
        took = {"embedding": embedded - started, "search": perf_counter() - embedded}
        return {
            "results": results,
            "rows": self.size,
            "milliseconds": {name: round(1000 * seconds, 1) for name, seconds in took.items()},
        }

    async def thumbnail(self, row: int) -> bytes:
        """See :class:`~unime_st.serve.rows.Rows`."""
        self._check(row)
        return await run_sync(self.rows.thumbnail, row, limiter=self._readers)

    def _embedding(self, row: int) -> np.ndarray:
        self._check(row)
        return self.search.corpus.rows([row])[0]

    def _check(self, row: int) -> None:
        if not 0 <= row < self.size:
            raise HTTPException(404, f"There is no row {row}: the corpus has {self.size}.")

    def _nearest(self, query: np.ndarray, asked: SearchRequest) -> list[dict[str, Any]]:
        if not self.size:
            return []
        scores, rows = self.search.search(query[None], asked.k, id_prefix=asked.prefix or None)
        found = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        return [{**self.rows[row], "score": round(score, 4)} for row, score in found]
