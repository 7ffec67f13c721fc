"""Attention of one sequence that holds many rows, row by row: it computes no padding, and no mask over all rows.

On a CPU a call costs little, while attention over a sequence of many rows costs as much as over one text of that
length; this takes the time of each row's own length. It is an attention implementation of transformers, in use within
:func:`by_branch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unime_st.modules.speed import tree_attention
from unime_st.modules.speed.token_tree import PackedTree

NAME = "unime_branches"
_USUAL = "sdpa"
_rows: ContextVar[Branches | None] = ContextVar("rows of the sequence", default=None)


class Branches:
    """The rows of a sequence, as :func:`attend` takes them."""

    def __init__(self, tree: PackedTree, dtype: torch.dtype) -> None:
        # The places of each row's own tokens, and those of the beginning it shares, if any.
        self.rows = [(slice(start, end), _places(before)) for start, end, before in tree.branches]
        sharing = [(end - start, len(before)) for start, end, before in tree.branches if len(before)]
        own = max((size for size, _ in sharing), default=0)
        self.longest = max((size for _, size in sharing), default=0)  # tokens of the longest shared beginning
        shape = own, self.longest + own
        # (M, longest + M), additive, for at most M own tokens: 0 for the beginning and up to the own diagonal.
        self.mask = torch.full(shape, torch.finfo(dtype).min, dtype=dtype).triu_(self.longest + 1)

    def mask_of(self, own: int, length: int) -> Tensor:
        """The mask (own, length) of a row with ``own`` tokens after its shared beginning, ``length`` in all."""
        return self.mask[:own, self.longest - (length - own) : self.longest + own]


def _places(before: np.ndarray) -> slice | Tensor | None:
    """Places as a slice, which copies nothing, if they are consecutive; None if there are none."""
    if not len(before):
        return None
    if int(before[-1] - before[0]) + 1 == len(before):  # they are ascending
        return slice(int(before[0]), int(before[-1]) + 1)
    return torch.from_numpy(before)


@contextmanager
def by_branch(decoder: Any, branches: Branches) -> Iterator[dict[str, Tensor]]:
    """Within this context, in this thread, a decoder attends by :func:`attend` over these rows.

    It yields an empty mask of four dimensions, which transformers passes on as it is, and any other attention refuses.
    """
    token = _rows.set(branches)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        yield {"attention_mask": torch.empty(1, 1, 0, 0)}
    finally:
        decoder.config._attn_implementation = before
        _rows.reset(token)


def attends_by_branch(decoder: Any) -> bool:
    """Whether :func:`by_branch` reaches all layers of a decoder, and may replace its attention."""
    attentions: Sequence[Any] = [getattr(layer, "self_attn", None) for layer in decoder.layers]
    return decoder.config._attn_implementation in (_USUAL, tree_attention.NAME) and all(
        getattr(attention, "config", None) is decoder.config for attention in attentions
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: states (1, L, H, D), and no scores; the mask is not read.

    The query is (1, H, L, D), key and value are (1, K, L, D), grouped when K < H. Outside of :func:`by_branch`, and so
    in other threads, it is the usual attention.
    """
    branches = _rows.get()
    if branches is None:
        return ALL_ATTENTION_FUNCTIONS[_USUAL](module, query, key, value, attention_mask, **options)
    found = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    common: dict[str, Any] = {"scale": options.get("scaling"), "enable_gqa": key.shape[1] != query.shape[1]}
    for own, before in branches.rows:
        keys, values = key[:, :, own], value[:, :, own]
        if before is None:
            states = scaled_dot_product_attention(query[:, :, own], keys, values, is_causal=True, **common)
        else:
            keys, values = (torch.cat([_at(whole, before), part], 2) for whole, part in ((key, keys), (value, values)))
            mask = branches.mask_of(own.stop - own.start, keys.shape[2])
            states = scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=mask, **common)
        found[:, own] = states.transpose(1, 2)
    return found, None


def _at(states: Tensor, places: slice | Tensor) -> Tensor:
    return states[:, :, places] if isinstance(places, slice) else states.index_select(2, places)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_USUAL])
