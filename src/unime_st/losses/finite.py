"""Stopping at the first loss that is not finite, with the rows that caused it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unime_st import distributed
from unime_st.losses.described import described

_MOST_ROWS = 5


def refuse_non_finite(
    loss: float, model: Any, columns: Sequence[Mapping[str, Any]], embeddings: Sequence[Tensor]
) -> None:
    """Refuse a loss that is NaN or infinite, before it reaches the weights; name the rows of ``(B, D)`` that are."""
    if math.isfinite(loss):
        return
    process = f" on process {distributed.rank()}" if distributed.is_distributed() else ""
    broken = [(~torch.isfinite(column)).any(dim=1).nonzero().flatten().tolist() for column in embeddings]
    total = sum(map(len, broken))
    if not total:
        raise FloatingPointError(
            f"The loss is {loss}{process}, though all embeddings of the batch's rows there are finite. With "
            "`gather_across_devices` see the other processes' errors; else raise the temperature, which divides "
            "similarities before they are exponentiated."
        )
    named = [
        f"row {row} of column {number} ({described(model, columns[number], row)})"
        for number, rows in enumerate(broken)
        for row in rows
    ]
    more = f" and {total - _MOST_ROWS} more" if total > _MOST_ROWS else ""
    everything = total == sum(len(column) for column in embeddings)
    advice = (
        "All of them: the weights themselves are no longer finite, most likely. Go back to the last checkpoint, and "
        "lower the learning rate or clip gradients (`max_grad_norm`)."
        if everything
        else "Look at these inputs and remove them, or train in bfloat16 in place of float16, which overflows."
    )
    raise FloatingPointError(
        f"The loss is {loss}{process}, since embeddings of {total} inputs of the batch are not finite: "
        f"{'; '.join(named[:_MOST_ROWS])}{more}. Nothing was learned from this batch. {advice}"
    )
