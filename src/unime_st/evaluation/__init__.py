"""Evaluators for sentence-transformers, a cache of embeddings on disk, and reports of results."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unime_st.evaluation.cache import EmbeddingCache
    from unime_st.evaluation.encoding import BrokenItemError, encode_distinct
    from unime_st.evaluation.identity import model_fingerprint
    from unime_st.evaluation.mmeb import MMEBEvaluator
    from unime_st.evaluation.published import published_results
    from unime_st.evaluation.report import Report
    from unime_st.evaluation.retrieval import ImageTextRetrievalEvaluator
    from unime_st.evaluation.sugarcrepe import SugarCrepeEvaluator

_EXPORTS = {
    "BrokenItemError": "encoding",
    "EmbeddingCache": "cache",
    "ImageTextRetrievalEvaluator": "retrieval",
    "MMEBEvaluator": "mmeb",
    "Report": "report",
    "SugarCrepeEvaluator": "sugarcrepe",
    "encode_distinct": "encoding",
    "model_fingerprint": "identity",
    "published_results": "published",
}

__all__ = [
    "BrokenItemError",
    "EmbeddingCache",
    "ImageTextRetrievalEvaluator",
    "MMEBEvaluator",
    "Report",
    "SugarCrepeEvaluator",
    "encode_distinct",
    "model_fingerprint",
    "published_results",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
