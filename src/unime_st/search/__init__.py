"""Search over what ``encode_corpus`` writes, and other stores for it.

``corpus_search`` is the entry point; ``exact`` compares all rows, ``build`` makes an index with faiss, ``index`` opens
it, ``recall`` measures what it finds, ``ids`` knows rows by their ids. ``qdrant`` and ``lancedb`` write a corpus into
these stores, ``store_rows`` cuts it for them; ``lancedb_embeddings`` is an encoder in LanceDB's own registry.
"""

from unime_st.search.build import build_index
from unime_st.search.corpus_search import CorpusSearch
from unime_st.search.exact import Found, exact_search
from unime_st.search.index import DamagedIndexError, SearchIndex, StaleIndexError, open_index
from unime_st.search.lancedb import write_lancedb
from unime_st.search.qdrant import write_qdrant

__all__ = [
    "CorpusSearch",
    "DamagedIndexError",
    "Found",
    "SearchIndex",
    "StaleIndexError",
    "build_index",
    "exact_search",
    "open_index",
    "write_lancedb",
    "write_qdrant",
]
