"""How many tokens a pass may have when told ``"auto"``: chosen from the memory that the device has free.

On CUDA the first passes are small and measured, and what follows fills most of what is free; a pass that runs out of
memory all the same is cut in two and tried again. A CPU is fastest with small passes, so there it is always
:data:`CPU_TOKENS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from unime_st.arguments import require_number

logger = logging.getLogger(__name__)

T = TypeVar("T")

AUTO = "auto"
CPU_TOKENS = 1024
"""Tokens per pass on the CPU: its caches do not hold the states of more, which costs up to a tenth of the time."""

_AT_FIRST = 2048
_GROWTH = 4  # from one measured pass to the next: what it takes is known of smaller ones only
_SHARE = 0.8  # of what is free; the rest is for fragments, and for what other passes take beside their tokens
_MOST_MEASURED = 16  # passes, where none reaches what there is room for


class DeviceMemory(Protocol):
    """What is asked of a device."""

    def free(self) -> int:
        """Bytes that can be had now."""

    def start(self) -> None:
        """Begin to watch."""

    def peak(self) -> int:
        """The most bytes in use since :meth:`start`, beyond those in use then."""

    def release(self) -> None:
        """Give back what nothing uses."""


class CudaMemory:
    """The memory of a CUDA device; :meth:`start` resets torch's statistic of the most that was allocated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def free(self) -> int:
        """Bytes free on the device, and those that torch holds and does not use."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def start(self) -> None:
        """Begin to watch."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Bytes allocated beyond those at the start."""
        return torch.cuda.max_memory_allocated(self.device) - self._before

    def release(self) -> None:
        """Give back what torch holds and does not use."""
        torch.cuda.empty_cache()


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of a device; None on the CPU, where none is watched."""
    if device.type == "cuda":
        return CudaMemory(device)
    if device.type == "cpu":
        return None
    raise ValueError(f'"auto" measures the memory of CUDA devices, but this is {device}. Give a number of tokens.')


class TokenBudget:
    """The tokens that a pass may have on a device, as told by the passes before.

    Args:
        device: Where passes run.
        passes: What is counted, for the log.
    """

    def __init__(self, device: torch.device, passes: str = "a pass") -> None:
        self.device, self.passes = device, passes
        self.memory = memory_of(device)
        self.tokens = CPU_TOKENS if self.memory is None else _AT_FIRST
        self.halvings = 0
        self._measured: list[tuple[int, int]] = []  # tokens and bytes of a pass
        self._settled = self.memory is None

    def start(self) -> None:
        """Watch what the next pass takes, while that is to be learned; what is free now bounds it."""
        if self.memory is None:
            return
        if self._measured:
            self.tokens = min(self.tokens, self._affordable(self.memory))
        if not self._settled:
            self.memory.start()

    def learn(self, tokens: int) -> None:
        """Take into account what a pass of so many tokens took, which began with :meth:`start` and is over."""
        if (
            self._settled or self.memory is None or _GROWTH * tokens < _AT_FIRST
        ):  # else a workspace outweighs its tokens
            return
        self._measured.append((tokens, max(1, self.memory.peak())))
        affordable = self._affordable(self.memory)
        self.tokens = min(affordable, max(self.tokens, _GROWTH * tokens))
        self._settled = affordable <= _GROWTH * tokens or len(self._measured) == _MOST_MEASURED
        if self._settled:
            logger.info("%s: %d tokens, by %.3g MB a token of %.3g GB that are free.", self.passes.capitalize(),
                        self.tokens, self._bytes() / 1e6, self.memory.free() / 1e9)  # fmt: skip

    def halve(self, tokens: int) -> None:
        """Allow half of the tokens of a pass that ran out of memory, from here on."""
        if not self.halvings:
            logger.warning(
                "Out of memory with %d tokens: %s has %d from here on, and half of them each time that it happens "
                "again. Nothing is lost. This is said once.", tokens, self.passes, max(1, min(self.tokens, tokens) // 2)
            )  # fmt: skip
        self.halvings += 1
        self.tokens = max(1, min(self.tokens, tokens) // 2)
        self._settled = True
        if self.memory is not None:
            self.memory.release()

    def tried(self, work: Callable[[], T], tokens: int, *, several: bool) -> T | None:
        """What a pass gives; None if it ran out of memory, so that its rows, where ``several``, are to be parted."""
        self.start()
        try:
            found = work()
        except torch.OutOfMemoryError:
            if not several:
                raise
        else:
            self.learn(tokens)
            return found
        self.halve(tokens)  # here, since the error held what the pass had allocated
        return None

    def _bytes(self) -> float:
        """Bytes a token: the most of the larger passes, since what does not grow with tokens weighs on small ones."""
        largest = max(tokens for tokens, _ in self._measured)
        return max(taken / tokens for tokens, taken in self._measured if 2 * tokens >= largest)

    def _affordable(self, memory: DeviceMemory) -> int:
        return max(1, int(_SHARE * memory.free() / self._bytes()))


def require_tokens(name: str, value: Any) -> None:
    """Refuse a number of tokens that is neither ``"auto"``, None nor a whole number of at least 1.

    >>> require_tokens("batch_num_tokens", "all")
    Traceback (most recent call last):
    ...
    TypeError: `batch_num_tokens='all'`, but it must be a whole number, None or "auto".
    """
    if isinstance(value, str):
        if value != AUTO:
            raise TypeError(f'`{name}={value!r}`, but it must be a whole number, None or "auto".')
        return
    require_number(name, value, least=1, optional=True)
