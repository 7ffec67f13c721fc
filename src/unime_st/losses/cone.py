"""Watching whether embeddings stay in a cone: all point one way, and positives are no nearer than anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from unime_st.losses.checks import MORE_ROWS

STEPS = 12
"""Training steps that are judged together: all negatives open a cone in two to four."""

_ALIKE = 0.7  # encoders start at 0.8 to 0.9 after stage 1, and at 0.6 once the cone is open
_TOLD_APART = 0.1


class ConeWatch:
    """Averages similarities over windows of :data:`STEPS` steps, on the device, and judges each window that ends."""

    def __init__(self) -> None:
        self._last = -1  # the step of the last pass
        self._steps = 0  # of the window
        self._window: list[Tensor] = []  # sums of positives and of negatives, and how many
        self._ended: list[Tensor] = []

    def record(self, positive: Tensor, negative: Tensor, step: int | None) -> None:
        """Add a forward pass, of a training step by its number or, if nobody tells it, one more step."""
        step = self._last + 1 if step is None else step
        if step < self._last:  # a new training
            self._steps, self._window = 0, []
        if step != self._last and self._steps == STEPS:
            self._steps, self._ended, self._window = 0, self._window, []
        self._steps += step != self._last or not self._window
        self._last = step
        told = [positive, negative, positive.new_ones(())]
        self._window = [old + new for old, new in zip(self._window, told, strict=True)] if self._window else told

    def advice(self, num_hard_negatives: int | None, warmup_steps: int) -> str:
        """What was measured and what to do, when a window has ended in which embeddings stayed in a cone."""
        if not self._ended:
            return ""
        (positives, negatives, passes), self._ended = torch.stack(self._ended).tolist(), []
        positive, negative = positives / passes, negatives / passes
        if not (negative > _ALIKE and positive - negative < _TOLD_APART):
            return ""
        measured = (
            f"Over {STEPS} training steps different inputs have a mean cosine of {negative:.2f} and positives one of "
            f"{positive:.2f}: embeddings point one way, and positives are hardly told from negatives. "
        )
        if num_hard_negatives is None:
            return f"{measured}Compare more rows, or look whether the learning rate is too low. {MORE_ROWS}"
        longer = f"more than the {warmup_steps} of now" if warmup_steps else "e.g. 8"
        return (
            f"{measured}The `num_hard_negatives={num_hard_negatives}` hardest share their direction with the positive, "
            "so that little of it is unlearned. Compare with all negatives first, by `hard_negatives_warmup_steps` "
            f"({longer}), or always, by `num_hard_negatives=None`. Larger batches help too. {MORE_ROWS}"
        )
