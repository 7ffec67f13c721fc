"""Universal multimodal embedders from any multimodal LLM: the UniME recipe for sentence-transformers.

Importing this package is cheap: torch, transformers and sentence-transformers load on first use of a name below.
The families that transformers lacks (:mod:`unime_st.models`) are known to its Auto classes from then on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unime_st.models import register_families

if TYPE_CHECKING:
    from unime_st.hub import push_encoder_to_hub
    from unime_st.modules import (
        ListwiseReranker,
        MultimodalEncoder,
        build_encoder,
        build_reranker,
        export_encoder,
        export_reranker,
        load_encoder,
        load_reranker,
    )

__version__ = "0.1.0"

_EXPORTS = {
    "ListwiseReranker": "unime_st.modules",
    "MultimodalEncoder": "unime_st.modules",
    "build_encoder": "unime_st.modules",
    "build_reranker": "unime_st.modules",
    "export_encoder": "unime_st.modules",
    "export_reranker": "unime_st.modules",
    "load_encoder": "unime_st.modules",
    "load_reranker": "unime_st.modules",
    "push_encoder_to_hub": "unime_st.hub",
}

__all__ = [
    "ListwiseReranker",
    "MultimodalEncoder",
    "__version__",
    "build_encoder",
    "build_reranker",
    "export_encoder",
    "export_reranker",
    "load_encoder",
    "load_reranker",
    "push_encoder_to_hub",
]

register_families()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
