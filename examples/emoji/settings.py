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
        learning_rate: falls linearly to 0 after a warm-up.
        temperature: of the loss.
    """

    steps: int
    batch_size: int
    learning_rate: float
    temperature: float = 0.05


@dataclass(frozen=True)
class DemoSettings:
    """All settings of the demo.

    Attributes:
        layers: of SmolLM2's 30, how many to keep, the first ones.
        image_size: pixels of an image's side; 96 make 9 visual tokens.
        penalty: of the ridge regression that the projector starts from.
        feature_dropout: share of the vision features left out in training, at the projector's input.
        stage1: text, against the teacher.
        stage2: images and labels.
        mini_batch_size: inputs that GradCache runs at a time in stage 2.
        margin: of stage 2's false-negative filter.
        num_hard_negatives: of stage 2; None keeps all.
        hard_negatives_warmup_steps: steps of stage 2 that keep all.
        swap_limit: rows of each set of attribute swaps.
        media_rows: rows of each task of videos and pages.
        seed: of everything.
    """

    layers: int = 4
    image_size: int = 96
    penalty: float = 1000.0
    feature_dropout: float = 0.5
    stage1: StageSettings = StageSettings(steps=80, batch_size=512, learning_rate=1e-3)
    stage2: StageSettings = StageSettings(steps=40, batch_size=512, learning_rate=3e-4)
    mini_batch_size: int = 128
    margin: float = 0.1
    num_hard_negatives: int | None = None
    hard_negatives_warmup_steps: int = 0
    swap_limit: int = 60
    media_rows: int = 80
    seed: int = 0

    @property
    def is_short(self) -> bool:
        """Whether it trains for fewer steps, or looks at fewer rows, than the results are stated for."""
        full = DemoSettings()
        stages = ((self.stage1, full.stage1), (self.stage2, full.stage2))
        fewer = self.swap_limit < full.swap_limit or self.media_rows < full.media_rows
        return fewer or any(own.steps < stated.steps for own, stated in stages)

    def key(self, *names: str) -> str:
        """Short digest of some settings, so that a cache made with others is not taken for its own."""
        values = {name: value for name, value in asdict(self).items() if name in names}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


SHORT = DemoSettings(
    stage1=StageSettings(steps=2, batch_size=8, learning_rate=3e-4),
    stage2=StageSettings(steps=2, batch_size=12, learning_rate=3e-4),
    swap_limit=4,
    media_rows=4,
)
"""A few steps of everything, to see that it runs: its numbers mean nothing."""

MEANS_NOTHING = (
    "A short run, to see that every step works: it hardly trained and looked at few rows. Its numbers mean nothing."
)
"""Stands above the results of a short run."""
