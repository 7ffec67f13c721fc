"""What the demo does, in numbers. Chosen on the validation split; the test split was only reported."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StageSettings:
    """One stage of training.

    Attributes:
        steps: of the optimiser.
        batch_size: rows a step.
        learning_rate: of the LoRA weights; falls linearly to 0 after a warm-up.
        temperature: of the loss.
    """

    steps: int
    batch_size: int
    learning_rate: float
    temperature: float


@dataclass(frozen=True)
class DemoSettings:
    """All settings of the demo.

    Attributes:
        layers: of SmolLM2's 30, those kept.
        image_size: pixels of an image's side; 160 make 25 visual tokens.
        align_layer: decoder layers passed by the states the projector is fitted to.
        align_penalty: of that ridge regression.
        folds: of the training concepts in stage 2; see `align`.
        adapted_layers: decoder layers that get LoRA: those above `align_layer`, so that the fit stays true.
        lora_rank: of both stages.
        stage1: text, against the teacher.
        stage2: multimodal pairs.
        margin: of stage 2's false-negative filter.
        num_hard_negatives: of stage 2; None keeps all. With 32 pairs a batch, a few of the hardest make the embeddings
            collapse early on (see `benchmarks/ablation.py`).
        num_explicit_negatives: columns of explicit negatives in stage 2.
        rows_per_subset: of each training subset, at most; bare captions are all used.
        eval_limit: rows of each MMEB-like task.
        swap_limit: rows of each set of attribute swaps.
        seed: of everything.
    """

    layers: tuple[int, ...] = tuple(range(24))
    image_size: int = 160
    align_layer: int = 16
    align_penalty: float = 1000.0
    folds: int = 5
    adapted_layers: tuple[int, ...] = tuple(range(16, 24))
    lora_rank: int = 16
    stage1: StageSettings = StageSettings(steps=40, batch_size=48, learning_rate=1e-3, temperature=0.05)
    stage2: StageSettings = StageSettings(steps=60, batch_size=32, learning_rate=1e-3, temperature=0.05)
    margin: float = 0.1
    num_hard_negatives: int | None = None
    num_explicit_negatives: int = 0
    rows_per_subset: int = 100
    eval_limit: int = 14
    swap_limit: int = 60
    seed: int = 0

    @property
    def is_short(self) -> bool:
        """Whether it trains for fewer steps, or looks at fewer rows, than the results are stated for."""
        full = DemoSettings()
        return (
            self.stage1.steps < full.stage1.steps
            or self.stage2.steps < full.stage2.steps
            or self.eval_limit < full.eval_limit
            or self.swap_limit < full.swap_limit
        )

    def key(self, *names: str) -> str:
        """Short digest of some settings, so that a cache made with others is not taken for its own."""
        values = {name: value for name, value in asdict(self).items() if name in names}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


SHORT = DemoSettings(
    stage1=StageSettings(steps=2, batch_size=8, learning_rate=5e-4, temperature=0.05),
    stage2=StageSettings(steps=2, batch_size=12, learning_rate=5e-4, temperature=0.05),
    rows_per_subset=20,
    eval_limit=4,
    swap_limit=4,
)
"""A few steps of everything, to see that it runs: its numbers mean nothing."""

MEANS_NOTHING = (
    "A short run, to see that every step works: it hardly trained and looked at few rows. Its numbers mean nothing."
)
"""Stands above the results of a short run."""
