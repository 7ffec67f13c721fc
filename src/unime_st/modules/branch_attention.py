"""Attention of one sequence that holds many rows, row by row: no padding, and no mask over all of them.

On the CPU a call costs little, while attention over sequences of many rows costs as much as if all of their tokens were
one text: this takes the time of each row's own length. It is an attention implementation of transformers, in use while
:func:`by_branch` lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from unime_st.modules.token_tree import PackedTree

NAME = "unime_branches"


class Branches:
    """Rows of a sequence, as :func:`attend` takes them.

    Attributes:
        rows: Places of a row's own tokens, and those of the beginning it shares, if it shares one.
        mask: What is added to attention scores, (L, L) for L tokens of the longest row: nothing up to the diagonal.
    """

    def __init__(self, tree: PackedTree, dtype: torch.dtype) -> None:
        self.rows = [(slice(start, end), _places(before)) for start, end, before in tree.branches]
        longest = int(tree.depth.max()) + 1
        self.mask = torch.full((longest, longest), torch.finfo(dtype).min, dtype=dtype).triu_(1)


def _places(before: np.ndarray) -> slice | Tensor | None:
    """Places as a slice, which copies nothing, if they follow each other; None for none."""
    if not len(before):
        return None
    if int(before[-1] - before[0]) + 1 == len(before):  # they only grow
        return slice(int(before[0]), int(before[-1]) + 1)
    return torch.from_numpy(before)


@contextmanager
def by_branch(decoder: Any) -> Iterator[None]:
    """Within this context a decoder's attention is :func:`attend`; it is to be called with ``branches=``."""
    usual = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = usual


def attends_by_branch(decoder: Any) -> bool:
    """Whether :func:`by_branch` reaches all layers of a decoder, and its attention is one that ours stands for."""
    attentions: Sequence[Any] = [getattr(layer, "self_attn", None) for layer in decoder.layers]
    return decoder.config._attn_implementation == "sdpa" and all(
        getattr(attention, "config", None) is decoder.config for attention in attentions
    )


def attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    branches: Branches,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: Of H heads, shape (1, H, L, D).
        key: Of as many heads or, grouped, fewer, shape (1, K, L, D).
        value: As ``key``.
        branches: The rows.
        scaling: Of the scores; None for one over the square root of D.

    Returns:
        States, shape (1, L, H, D), and no scores.
    """
    found = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for own, before in branches.rows:
        options: dict[str, Any] = {"is_causal": True}
        keys, values = key[:, :, own], value[:, :, own]
        if before is not None:
            keys, values = (torch.cat([_at(whole, before), part], 2) for whole, part in ((key, keys), (value, values)))
            length, asked = keys.shape[2], own.stop - own.start
            options = {"attn_mask": branches.mask[length - asked : length, :length]}
        states = scaled_dot_product_attention(
            query[:, :, own], keys, values, scale=scaling, enable_gqa=key.shape[1] != query.shape[1], **options
        )
        found[:, own] = states.transpose(1, 2)
    return found, None


def _at(states: Tensor, places: slice | Tensor) -> Tensor:
    return states[:, :, places] if isinstance(places, slice) else states.index_select(2, places)


AttentionInterface.register(NAME, attend)
