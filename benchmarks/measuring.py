"""How the speed benchmarks measure: contenders in turn, CPU time on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

from unime_st.modules.speed.prefixes import language_model
from unime_st.modules.speed.vision_cache import vision_tower


def alternating(
    contenders: dict[str, Callable[[], Any]],
    runs: int,
    report: Callable[[str], None] = print,
    clock: Callable[[], float] = time.process_time,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """CPU seconds of each contender in each run, in turn, the order reversed every other run; and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for run in range(runs):
        for name in contenders if run % 2 == 0 else reversed(contenders):
            started = clock()
            results[name] = contenders[name]()
            seconds[name].append(round(clock() - started, 3))
        report(f"  run {run + 1} of {runs}: " + ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in contenders))
    return seconds, results


def times_as_fast(seconds: dict[str, list[float]], ours: str, peer: str) -> dict[str, Any]:
    """Ratio of medians, and the least and the most of the runs' own ratios."""
    pairs = [a / b for a, b in zip(seconds[peer], seconds[ours], strict=True)]
    return {
        "times_as_fast": round(statistics.median(seconds[peer]) / statistics.median(seconds[ours]), 2),
        "spread": [round(min(pairs), 2), round(max(pairs), 2)],
    }


class Counts:
    """Counts forward calls of a model's language model, rows and places in them (padding included), and images.

    Example: ``with Counts(model) as counts: ...; counts.read()``.
    """

    def __init__(self, inner: nn.Module) -> None:
        self.calls = self.rows = self.places = self.images = 0
        self.decoder, self.tower = language_model(inner), vision_tower(inner)
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        first = self.decoder.layers[0]
        self._hooks = [first.register_forward_hook(self._seen)]
        if self.tower is not None:
            leaf = next(module for module in self.tower.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
            self._hooks.append(leaf.register_forward_hook(self._shown))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, _module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        self.calls += 1
        self.rows += args[0].shape[0]
        self.places += args[0].shape[0] * args[0].shape[1]

    def _shown(self, _module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        self.images += len(args[0])

    def read(self) -> dict[str, int]:
        return {"forward_calls": self.calls, "places": self.places, "images_or_patches": self.images}


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of a number, which says something only if rows differ among themselves."""
    if np.abs(one - one[0]).max() < 1e-3:
        raise ValueError("All embeddings are alike, so that they agree says nothing.")
    return float(np.abs(one - other).max())
