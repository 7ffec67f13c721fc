"""Phi-3-Vision and Phi-3.5-Vision: transformers' Phi-3 and CLIP, and what lies between them.

It is written from the public description of ``microsoft/Phi-3.5-vision-instruct``: the names of its configuration keys
and tensors, so that its checkpoints load unchanged, and the order of its operations.
"""

from __future__ import annotations

import transformers  # noqa: F401 (first: its import registers what follows)

from unime_st.models.phi3_v.configuration import Phi3VConfig
from unime_st.models.phi3_v.image_processing import Phi3VImageProcessor
from unime_st.models.phi3_v.modeling import Phi3VForCausalLM, Phi3VModel
from unime_st.models.phi3_v.processing import Phi3VProcessor

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VModel", "Phi3VProcessor"]
