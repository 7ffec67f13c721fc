"""The one place that knows about processes: ranks, and gathering with gradients.

The convention of both losses is the usual one: each process averages the loss over its own rows, contrasted with the
candidates of all processes, and the data-parallel wrapper (DDP, FSDP, DeepSpeed) averages gradients over the ``W``
processes. With :func:`gather_columns` sending each embedding's gradient home, *summed* over the processes that used it,
the result is exactly the gradient of the mean loss over the global batch on one process.

sentence-transformers has ``all_gather_with_grad`` with the same gradient; it is not used because it gathers one tensor
a call, where one call a step is enough, and warns on a single process, where doing nothing is right.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SAY_EVERY = 60.0


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    return has_process_group() and dist.get_world_size() > 1


def has_process_group() -> bool:
    """Whether there is a process group, be it of one process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process in [0, W); 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, ``W``; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def gather(tensor: Tensor) -> Tensor:
    """Stack the tensors ``(B, ...)`` of all processes in rank order, ``(W * B, ...)``, without gradients."""
    tensor = tensor.detach()
    if not is_distributed():
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def sum_over_processes(table: Tensor, share: int) -> Tensor:
    """This process's rows, ``(share, ...)``, of the sum of all processes' tables ``(W * share, ...)``."""
    if not is_distributed():
        return table[:share]
    table = table.contiguous()
    if dist.get_backend() == dist.Backend.NCCL:
        own = torch.empty_like(table[:share])
        dist.reduce_scatter_tensor(own, table)
        return own
    # Gloo has no reduce-scatter in every supported torch; summing everything and keeping one part is the same.
    table = table.clone()
    dist.all_reduce(table)
    return table[rank() * share : (rank() + 1) * share]


def max_over_processes(value: int, device: torch.device) -> int:
    """Return the largest of the processes' integers; every process must call this.

    >>> max_over_processes(3, torch.device("cpu"))
    3
    """
    if not is_distributed():
        return value
    return int(gather(torch.tensor([value], device=device)).max())


def gather_objects(value: Any) -> list[Any]:
    """Collect a picklable object of each process, in rank order; every process must call this.

    Raises ``RuntimeError`` when another process has died, or does not come before the process group's time limit.

    >>> gather_objects({"a": 1})
    [{'a': 1}]
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    with _waiting("to exchange results"):
        dist.all_gather_object(values, value)
    return values


def from_rank_zero(make: Callable[[], T]) -> T:
    """Make something picklable on rank 0 and hand it to all; every process must call this.

    For what takes long, or what different processes might compute differently in the last bit. An error on rank 0 is
    raised on every process, so that none waits for what will never come.

    >>> from_rank_zero(lambda: [1, 2])
    [1, 2]
    """
    if not is_distributed():
        return make()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # noqa: BLE001 whatever it is, the others wait to hear of it
            failure = error
            outcome[1] = f"{type(error).__name__}: {error}"
    with _waiting("for what rank 0 computes"):
        dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"Rank 0 failed, so this process stops too: {outcome[1]}")
    return cast("T", outcome[0])


@contextmanager
def _waiting(purpose: str) -> Iterator[None]:
    """Within this context, which ends with what all processes do, one that waits says so, and what an end means."""
    began, since, done = time.monotonic(), time.strftime("%H:%M:%S"), threading.Event()
    own = f"Rank {rank()} of {world_size()}"

    def say() -> None:
        while not done.wait(_SAY_EVERY):
            logger.warning(
                "%s has waited %s since %s (%.0f s). It waits until the process group's time limit (`ddp_timeout` of "
                "the training arguments, `timeout` of init_process_group). Do the other processes still run?",
                own, purpose, since, time.monotonic() - began)  # fmt: skip

    threading.Thread(target=say, daemon=True, name="waiting").start()
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{own} waited {purpose} for {time.monotonic() - began:.0f} s, and another process has died or did not "
            f"come in time ({error}). Look for the first error among the outputs of all processes, end those that are "
            "left, and start again: what was written is kept."
        ) from error
    finally:
        done.set()


class _GatherWithGrad(torch.autograd.Function):
    """All-gather whose backward returns to each process the gradient of its own part, summed over all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return sum_over_processes(gradient, ctx.rows)


def gather_columns(columns: Sequence[Tensor]) -> list[Tensor]:
    """Gather columns ``(B, D)`` with gradients, in one collective call: ``(W * B, D)`` each, rows in rank order.

    >>> [column.shape for column in gather_columns([torch.zeros(2, 3), torch.ones(2, 3)])]
    [torch.Size([2, 3]), torch.Size([2, 3])]
    """
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) > 1:
        raise ValueError(f"Columns of one batch must have one shape to be gathered together, got {sorted(shapes)}.")
    if not is_distributed():
        return list(columns)
    batch = len(columns[0])
    gathered = _GatherWithGrad.apply(torch.cat(list(columns)))  # (W * n * B, D)
    by_rank = gathered.unflatten(0, (world_size(), len(columns), batch))  # (W, n, B, D)
    return [column.flatten(0, 1) for column in by_rank.unbind(1)]


def shared_seed(device: torch.device) -> Tensor:
    """Draw a 63-bit seed, an int64 scalar, from the global CPU generator and use rank 0's draw on every process.

    Every process draws, so their generators stay in step; the Trainer seeds them and keeps their state in checkpoints.
    """
    seed = torch.randint(2**63 - 1, (1,)).to(device)
    return gather(seed)[0]


def mean_over_processes(values: Tensor, present: Tensor | None = None) -> Tensor:
    """Average values ``(n,)`` over the processes that have them; NaN for none. Every process must call this."""
    counted = torch.ones_like(values) if present is None else present.to(values)
    own = torch.stack([values if present is None else values.masked_fill(~present, 0.0), counted])
    total, count = gather(own[None]).sum(dim=0)
    return total / count
