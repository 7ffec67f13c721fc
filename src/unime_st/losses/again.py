"""What a step needs to be done again as if nothing had been: random states to go back to, and gradients all or none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class Randomness:
    """The state of the random generators of Python (``MatryoshkaLoss``), the CPU and a device, to go back to."""

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._devices = get_device_states(torch.empty(0, device=device))

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        set_device_states(*self._devices)


@contextmanager
def all_gradients_or_none(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context gradients begin at nothing; at its end they are added to those before, after an error not."""
    before: list[Tensor | None] = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        raise
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
