"""Attention over a tree of tokens in one sequence, with FlexAttention: on a GPU, in inference and in training.

Rows stand in depth-first order, each shared beginning once. The tokens that attend to a token are then a run that
begins with it, so one number per token is the whole mask: token q attends to k if k <= q < end[k]. It travels as the
attention mask, which gradient checkpointing keeps for its second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
except ImportError:  # this build of torch lacks it
    BlockMask = flex_attention = None  # type: ignore[assignment, misc]

NAME = "unime_tree"
BLOCK = 128
"""Tokens per block, which FlexAttention computes or leaves out as a whole."""

_USUAL = "sdpa"
_STEPS = 8  # lengths between two powers of two: padding is an eighth at most, and each may be compiled for
_SINCE = (2, 7)  # version of torch; changing shapes fail before it, or the arguments differ
_VARIANTS = 64  # of one function, more than dtypes, heads, gradients and kinds of length can ask for
_LEAST_HEAD = 16  # the least dimension that the compiled kernel takes; it must be a power of two


def padded_length(length: int) -> int:
    """The length of a sequence with padding: whole blocks, and few different lengths."""
    step = max(BLOCK, (1 << max(length - 1, 1).bit_length() - 1) // _STEPS)
    return -(-length // step) * step


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, moved to a GPU without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def computed_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which attention is computed over states of another, under autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def tree_mask(end: np.ndarray, device: torch.device) -> Any:
    """The ``BlockMask`` (1, 1, L, L) of which tokens attend to which.

    ``end`` (L,) is one past the last token that attends to each token; L is a multiple of :data:`BLOCK`.
    """
    count = len(end) // BLOCK
    ends = end.reshape(count, BLOCK)
    first = np.arange(count) * BLOCK  # the first token of each block
    some = (first[:, None] >= first) & (first[:, None] < ends.max(axis=1))  # (queries, keys)
    whole = (first[:, None] > first) & (first[:, None] + BLOCK <= ends.min(axis=1))
    numbers: list[np.ndarray] = [end]
    for kind in (some & ~whole, whole):
        numbers += [kind.sum(axis=1), np.argsort(~kind, axis=1, kind="stable")]
    packed = moved(np.concatenate([part.reshape(-1) for part in numbers]).astype(np.int32), device)
    last, *blocks = packed.split([part.size for part in numbers])

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < last[key])

    some_counts, some_keys, whole_counts, whole_keys = blocks
    return BlockMask.from_kv_blocks(
        some_counts.view(1, 1, -1),
        some_keys.view(1, 1, count, count),
        whole_counts.view(1, 1, -1),
        whole_keys.view(1, 1, count, count),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
    )


def attends_by_tree(decoder: Any, device: torch.device) -> bool:
    """Whether attention over a tree reaches all layers of a decoder, on a device that has its kernels.

    A CPU has them for inference; in training the same mask is written out there.
    """
    config = decoder.config
    attentions: Sequence[Any] = [getattr(layer, "self_attn", None) for layer in decoder.layers]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    compiles = device.type == "cuda" and _can_compile() and head >= _LEAST_HEAD and head & (head - 1) == 0
    return (
        flex_attention is not None
        and (compiles or device.type == "cpu")
        and config._attn_implementation in (_USUAL, NAME)
        and all(getattr(attention, "config", None) is config for attention in attentions)
        and not (decoder.training and getattr(config, "attention_dropout", 0))
    )


@cache
def _can_compile() -> bool:
    return find_spec("triton") is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= _SINCE


@contextmanager
def by_tree(decoder: Any, end: np.ndarray, device: torch.device, *, computed_again: bool) -> Iterator[dict[str, Any]]:
    """Within this context a decoder attends by :func:`attend` over one tree; yields arguments for the decoder.

    Layers that are ``computed_again`` after it, by gradient checkpointing, must find the attention, so it stays in the
    configuration then; for all other masks it is the usual one.
    """
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        yield {"attention_mask": tree_mask(end, device)}
    finally:
        if not computed_again:
            decoder.config._attn_implementation = before


@cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention's kernel; beyond torch's limit of variants it would silently write out all scores."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), _VARIANTS))
    return torch.compile(flex_attention)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: states (1, L, H, D), and no scores.

    The query is (1, H, L, D), key and value are (1, K, L, D), grouped when K < H. For masks other than a ``BlockMask``
    it is the usual attention.
    """
    if BlockMask is None or not isinstance(attention_mask, BlockMask):
        return ALL_ATTENTION_FUNCTIONS[_USUAL](module, query, key, value, attention_mask, **options)
    kind = query.device.type
    dtype = computed_dtype(value.dtype, query.device)
    states = query.to(dtype), key.to(dtype), value.to(dtype)
    common: dict[str, Any] = {"scale": options.get("scaling"), "enable_gqa": key.shape[1] != query.shape[1]}
    if kind == "cpu" and any(part.requires_grad for part in states):  # FlexAttention has no backward pass there
        places = torch.arange(query.shape[2])
        allowed = attention_mask.mask_mod(places, places, places[:, None], places[None])
        found = scaled_dot_product_attention(*states, attn_mask=allowed, **common)
    else:
        compute: Any = flex_attention if kind == "cpu" else _compiled()
        found = compute(*states, block_mask=attention_mask, **common)
    return found.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_USUAL])
