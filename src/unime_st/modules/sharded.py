"""Saving a model whose weights are split over processes (FSDP2, DeepSpeed ZeRO-3): gathered, and one writes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unime_st import distributed


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has a part of the weights only."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The whole weights of a model on the CPU, on rank 0, and nothing elsewhere; every process must call this."""
    kept: dict[str, Any] = {}
    weights = list(model.parameters())
    zero = [weight for weight in weights if hasattr(weight, "ds_id")]
    gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters(zero) if zero else nullcontext()
    with gathered:
        for name, value in model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if distributed.rank() == 0:
                kept[name] = whole.detach().cpu().clone() if isinstance(whole, Tensor) else whole
    return kept


@contextmanager
def saved_whole(model: nn.Module) -> Iterator[None]:
    """Within this context, on rank 0, a model whose weights are split says that its state is the whole one."""
    if not is_sharded(model):
        yield
        return
    whole = whole_state(model)
    model.state_dict = lambda *_, **__: whole  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.state_dict
