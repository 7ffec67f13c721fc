"""Evaluators for sentence-transformers, a cache of embeddings on disk, and reports of results."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unime_st.embedding.cache import EmbeddingCache
    from unime_st.embedding.distinct import BrokenItemError, encode_distinct
    from unime_st.evaluation.mmeb.evaluator import MMEBEvaluator
    from unime_st.evaluation.outcomes import read_settings
    from unime_st.evaluation.published import published_results, published_task_scores
    from unime_st.evaluation.report.compare import compare
    from unime_st.evaluation.report.report import Report
    from unime_st.evaluation.retrieval import ImageTextRetrievalEvaluator
    from unime_st.evaluation.sugarcrepe import SugarCrepeEvaluator
    from unime_st.identity.model import model_fingerprint

_EXPORTS = {
    "BrokenItemError": "unime_st.embedding.distinct",
    "EmbeddingCache": "unime_st.embedding.cache",
    "ImageTextRetrievalEvaluator": "unime_st.evaluation.retrieval",
    "MMEBEvaluator": "unime_st.evaluation.mmeb.evaluator",
    "Report": "unime_st.evaluation.report.report",
    "SugarCrepeEvaluator": "unime_st.evaluation.sugarcrepe",
    "encode_distinct": "unime_st.embedding.distinct",
    "model_fingerprint": "unime_st.identity.model",
    "compare": "unime_st.evaluation.report.compare",
    "published_results": "unime_st.evaluation.published",
    "published_task_scores": "unime_st.evaluation.published",
    "read_settings": "unime_st.evaluation.outcomes",
}

__all__ = [
    "BrokenItemError",
    "EmbeddingCache",
    "ImageTextRetrievalEvaluator",
    "MMEBEvaluator",
    "Report",
    "SugarCrepeEvaluator",
    "compare",
    "encode_distinct",
    "model_fingerprint",
    "published_results",
    "published_task_scores",
    "read_settings",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
