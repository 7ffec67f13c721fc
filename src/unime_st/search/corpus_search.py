"""Search over an encoded corpus: exact, or through its index."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

from unime_st.arguments import require_count
from unime_st.data import EncodedCorpus
from unime_st.search.build import build_index
from unime_st.search.exact import Found, exact_search, unit_queries
from unime_st.search.ids import RowIds
from unime_st.search.index import DamagedIndexError, SearchIndex, StaleIndexError, open_index

logger = logging.getLogger(__name__)

EXACT_ROWS = 100_000
"""A corpus of fewer rows is searched exactly unless told otherwise."""

Method = Literal["auto", "exact", "index"]


class CorpusSearch:
    """Finds the rows of a corpus that are nearest to queries.

    Exact search reads the corpus from disk for each call, a block at a time. With an index
    (:func:`~unime_st.search.build_index`) most of the nearest rows are found, in a time that hardly grows with the
    corpus, and scores are those of the index's copies of the rows, which differ in the fourth decimal. An index that
    is missing is built, and one of other rows or a damaged one is built anew, which a message says.

    Args:
        corpus: See :func:`~unime_st.data.load_corpus`.
        method: ``"exact"``, ``"index"``, or ``"auto"``: exact below 100,000 rows.
        show_progress_bar: Of building; None shows it when the log level is INFO or below.

    Attributes:
        index: The index, or None for exact search.

    Raises:
        ImportError: When an index is needed and faiss is missing.
        ValueError: For another method, or a corpus too small for an index.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from unime_st.data import encode_corpus
        >>> class Points:  # stands for a model
        ...     def encode(self, items, **options):
        ...         return np.array([[float(item), 1.0] for item in items])
        >>> rows = [("a/0", "0"), ("a/1", "2"), ("b/0", "-3")]
        >>> corpus = encode_corpus(Points(), rows, tempfile.mkdtemp(), model_name="points", with_ids=True)
        >>> search = CorpusSearch(corpus)
        >>> search.hits([-1.0, 0.0], top_k=1)
        [{'row': 2, 'id': 'b/0', 'score': 0.948683}]
        >>> search.hits([-1.0, 0.5], top_k=1, id_prefix="a/")
        [{'row': 0, 'id': 'a/0', 'score': 0.447214}]
    """

    def __init__(
        self, corpus: EncodedCorpus, *, method: Method = "auto", show_progress_bar: bool | None = None
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"`method={method!r}`, but it must be one of {', '.join(get_args(Method))}.")
        self.corpus = corpus
        self.index: SearchIndex | None = None
        if method == "index" or (method == "auto" and len(corpus) >= EXACT_ROWS):
            self.index = _opened_or_built(corpus, show_progress_bar)
        self.ids = RowIds(corpus) if self.index is None else self.index.ids

    def search(self, queries: Any, top_k: int = 10, *, id_prefix: str | None = None) -> Found:
        """Find the nearest rows of queries.

        Args:
            queries: ``(Q, D)`` or ``(D,)``, embedded by the corpus's own model.
            top_k: Rows for each query.
            id_prefix: Search only rows whose id begins so; all of these are compared, with an index too.

        Returns:
            Scores and rows, ``(Q, k)``, where k is ``top_k`` or the number of rows that there are to find.

        Raises:
            TypeError: When ``top_k`` is no whole number, or the prefix no string.
            ValueError: For another dimension, a number that is not finite, or a prefix where ids are no strings.
        """
        require_count("top_k", top_k)
        among = None if id_prefix is None else self.ids.with_prefix(id_prefix)
        if self.index is None:
            return exact_search(self.corpus, queries, top_k, among=among)
        asked = unit_queries(queries, self.corpus.shape[1])
        return self.index.search(asked, top_k) if among is None else self.index.search_among(asked, top_k, among)

    def hits(self, query: Any, top_k: int = 10, *, id_prefix: str | None = None) -> list[dict[str, Any]]:
        """Find the nearest rows of one query ``(D,)``; each is told by ``row``, ``id`` where there are ids, ``score``.

        Raises:
            ValueError: When several queries are given, and as :meth:`search` does.
        """
        scores, rows = self.search(query, top_k, id_prefix=id_prefix)
        if len(rows) != 1:
            raise ValueError(f"`query` holds {len(rows)} queries: give one, (D,), or call `search`.")
        with_ids = self.corpus.manifest["with_ids"]
        return [
            {"row": row, **({"id": self.ids.of_row(row)} if with_ids else {}), "score": round(score, 6)}
            for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        ]


def _opened_or_built(corpus: EncodedCorpus, shown: bool | None) -> SearchIndex:
    try:
        return open_index(corpus)
    except (FileNotFoundError, StaleIndexError, DamagedIndexError):
        logger.info("%s is searched through an index, which is built now, once", corpus.folder)
        return build_index(corpus, show_progress_bar=shown)
