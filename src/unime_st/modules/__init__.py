"""The multimodal encoder: how it runs in memory, and how it is built, loaded and saved as a stock checkpoint."""

from __future__ import annotations

from unime_st import stock  # noqa: F401 (importing it checks the seams that all below rely on)
from unime_st.modules.adapters import default_lora_config, merge_adapters
from unime_st.modules.build import build_encoder
from unime_st.modules.export import export_encoder
from unime_st.modules.load import load_encoder
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.modules.reranker.build import build_reranker, export_reranker, load_reranker
from unime_st.modules.reranker.cross_encoder import MultimodalCrossEncoder
from unime_st.modules.reranker.listwise import ListwiseReranker
from unime_st.modules.sentence_transformer import MultimodalSentenceTransformer

__all__ = [
    "ListwiseReranker",
    "MultimodalCrossEncoder",
    "MultimodalEncoder",
    "MultimodalSentenceTransformer",
    "build_encoder",
    "build_reranker",
    "default_lora_config",
    "export_encoder",
    "export_reranker",
    "load_encoder",
    "load_reranker",
    "merge_adapters",
]
