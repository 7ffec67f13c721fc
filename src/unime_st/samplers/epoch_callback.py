"""Tells batch samplers the epoch where the Trainer does not."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments


class SamplerEpochCallback(TrainerCallback):
    """Sets the epoch of the batch sampler, however deeply accelerate has wrapped it.

    It is needed only to resume in the middle of a second or later epoch on several processes: the Trainer
    (transformers 5) then fails to reach the sampler through the wrapper that skips batches around the one that shards
    them, and would resume in the order of the first epoch.

    Example:
        >>> from unime_st.samplers import SamplerEpochCallback
        >>> callbacks = [SamplerEpochCallback()]  # of SentenceTransformerTrainer(callbacks=...)
    """

    def on_epoch_begin(  # type: ignore[override]
        self, _args: TrainingArguments, state: TrainerState, *_: Any, train_dataloader: Any = None, **__: Any
    ) -> None:
        """Set the epoch through all wrappers; the Trainer calls this before it draws the epoch's first batch."""
        epoch = math.floor((state.epoch or 0.0) + 1e-6)
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None)
