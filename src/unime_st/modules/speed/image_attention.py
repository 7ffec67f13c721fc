"""Attention of a vision tower over all images of a pass in one call: Qwen-VL's towers, on a GPU, in 16 bits.

Under torch's usual attention these towers call it for one image at a time in every layer, and wait for the GPU to learn
how long each image is. Under an attention whose name contains "flash" they pass all images with their bounds, which
torch's own kernel takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unime_st.modules.speed.tree_attention import computed_dtype
from unime_st.modules.speed.vision_cache import vision_tower

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

NAME = "unime_flash_images"
_USUAL = "sdpa"
_HALVES = (torch.float16, torch.bfloat16)


def attends_at_once(tower: Any, device: torch.device) -> bool:
    """Whether a vision tower can pass all images with their bounds, and the kernel is available."""
    config, blocks = getattr(tower, "config", None), getattr(tower, "blocks", None)
    if config is None or not isinstance(blocks, nn.ModuleList) or varlen_attn is None:
        return False
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    return (
        config._attn_implementation in (_USUAL, NAME)
        and all(getattr(attention, "config", None) is config for attention in attentions)
        and "cu_seqlens" in inspect.signature(attentions[0].forward).parameters
        and attentions[0].head_dim % 8 == 0
        and computed_dtype(next(tower.parameters()).dtype, device) in _HALVES
    )


def _is_on_gpu(states: Tensor) -> bool:
    return states.is_cuda


@contextmanager
def images_at_once(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context a model's vision tower, if it can, attends to all images of a pass in one call."""
    tower: Any = vision_tower(model) if device.type == "cuda" else None
    if tower is None or not attends_at_once(tower, device):
        yield
        return
    before = tower.config._attn_implementation
    tower.config._attn_implementation = NAME
    try:
        yield
    finally:
        again = any(
            isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing for part in tower.blocks
        )
        if not (again and tower.training):  # layers that run again in the backward pass must find it
            tower.config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: states (1, L, H, D), and no scores.

    Query, key and value of all images together are (1, H, L, D); ``cu_seq_lens_q`` (N + 1,) are the images' bounds.
    """
    bounds, longest = options.pop("cu_seq_lens_q", None), options.pop("max_length_q", None)
    for name in ("cu_seq_lens_k", "max_length_k"):
        options.pop(name, None)
    dtype = computed_dtype(value.dtype, value.device)
    if bounds is not None and _is_on_gpu(query) and varlen_attn is not None and dtype in _HALVES:
        packed: Any = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
        bounds = bounds.to(torch.int32)
        compute: Any = varlen_attn
        states = compute(*packed, bounds, bounds, longest, longest, scale=options.get("scaling"))
        return states[None], None
    usual = ALL_ATTENTION_FUNCTIONS[_USUAL]
    if bounds is None:
        return usual(module, query, key, value, attention_mask, **options)
    lengths = (bounds[1:] - bounds[:-1]).tolist()
    parts: Any = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([usual(module, *part, None, **options)[0] for part in parts], dim=1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_USUAL])
