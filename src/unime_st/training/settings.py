"""The settings of a run on pairs or on texts, and the Trainer's arguments that they make."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from unime_st.arguments import require_number
from unime_st.functional import KLDirection, check_direction
from unime_st.samplers import FalseNegativeAwareBatchSampler
from unime_st.token_budget import require_tokens

logger = logging.getLogger(__name__)

_EVALUATIONS = 4
_STEPS_THAT_ALLOW = 40  # evaluations while training; a shorter run has one before and one after
_SAVE_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run on pairs and one on texts have in common, see :class:`PairsTraining`."""

    per_device_train_batch_size: int = 32
    num_train_epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    rank: int = 16
    temperature: float = 0.02
    mini_batch_num_tokens: int | Literal["auto"] = 8192
    max_pixels: int | None = None
    max_seq_length: int | None = None
    save_steps: int | None = None
    dataloader_num_workers: int = 0
    bf16: bool | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        require_number("per_device_train_batch_size", self.per_device_train_batch_size, least=2)
        for name in ("num_train_epochs", "learning_rate", "temperature"):
            require_number(name, getattr(self, name), above=0, whole=False)
            if getattr(self, name) == math.inf:
                raise ValueError(f"`{name}=inf`, but it must be finite.")
        if self.max_steps != -1:
            require_number("max_steps", self.max_steps, least=1)
        require_number("rank", self.rank, least=1)
        if self.mini_batch_num_tokens is None:
            raise TypeError('`mini_batch_num_tokens=None`, but it must be a whole number or "auto".')
        require_tokens("mini_batch_num_tokens", self.mini_batch_num_tokens)
        for name in ("max_pixels", "max_seq_length", "save_steps"):
            require_number(name, getattr(self, name), least=1, optional=True)
        for name in ("dataloader_num_workers", "seed"):
            require_number(name, getattr(self, name), least=0)

    def steps(self, rows: int, world_size: int) -> int:
        """Steps of the run, at the most."""
        batch = self.per_device_train_batch_size * world_size
        return self.max_steps if self.max_steps > 0 else math.ceil(rows // batch * self.num_train_epochs)

    def arguments(
        self, output_dir: Path, rows: int, *, device: str | None = None
    ) -> SentenceTransformerTrainingArguments:
        """Make the Trainer's arguments, and with them the group of processes; a device not the Trainer's is refused."""
        use_cpu = device == "cpu"
        bf16 = self.bf16 if self.bf16 is not None else not use_cpu and torch.cuda.is_available()
        arguments = SentenceTransformerTrainingArguments(
            str(output_dir),
            per_device_train_batch_size=self.per_device_train_batch_size,
            num_train_epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            bf16=bool(bf16),
            use_cpu=use_cpu,
            dataloader_drop_last=True,
            dataloader_num_workers=self.dataloader_num_workers,
            save_total_limit=2,
            report_to="none",
            seed=self.seed,
        )
        if device not in (None, arguments.device.type):  # the Trainer asks nobody
            raise ValueError(
                f"`device={device!r}`, but training is on {arguments.device.type!r} here. Leave it out, or give 'cpu'; "
                "which GPU it is, CUDA_VISIBLE_DEVICES says."
            )
        steps = self.steps(rows, arguments.world_size)
        arguments.warmup_steps = round(self.warmup_ratio * steps)
        arguments.logging_steps = 1 if steps < _SAVE_STEPS else 5
        every = self.save_steps or min(_SAVE_STEPS, max(1, steps // _EVALUATIONS))
        arguments.save_steps = -(-every // arguments.logging_steps) * arguments.logging_steps
        return arguments

    def told(self) -> dict[str, Any]:
        """What decides the result, for comparison with a run before."""
        kept = {"save_steps", "dataloader_num_workers", "mini_batch_num_tokens"}
        return {name: value for name, value in vars(self).items() if name not in kept}


@dataclass(frozen=True, kw_only=True)
class PairsTraining(RunSettings):
    """Settings of :func:`~unime_st.training.train_pairs`; the paper's, where it prints any.

    Attributes:
        per_device_train_batch_size: Rows a step and process, which a query is compared with. Take hundreds if possible.
        num_train_epochs: Times that each row is drawn.
        max_steps: In place of epochs; -1 for none.
        learning_rate: Of AdamW.
        warmup_ratio: Share of the steps in which it rises.
        rank: Of LoRA on the language model.
        temperature: Of the loss.
        margin: Of its filter of false negatives; None switches it off.
        num_hard_negatives: Hardest negatives kept; None keeps all.
        mini_batch_num_tokens: Embedded at a time (GradCache): lower it when memory is short, the result is the same;
            ``"auto"`` chooses from the memory that is free, on one process.
        held_out: Share of the rows to evaluate on, which are not trained on.
        max_pixels: Bound on an image's pixels, for backbones that keep an image's own resolution.
        max_seq_length: Tokens of an input at the most.
        save_steps: Steps between checkpoints; None for 100, or a quarter of a short run.
        dataloader_num_workers: Processes that open images.
        bf16: Mixed precision; None where a GPU has it.
        seed: Of the split, LoRA's start and the order of rows.

    Raises:
        TypeError: When a setting that must be a number is not one.
        ValueError: When a number is out of range.
    """

    margin: float | None = 0.1
    num_hard_negatives: int | None = None
    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("num_hard_negatives", self.num_hard_negatives, least=1, optional=True)

    def arguments(
        self, output_dir: Path, rows: int, *, device: str | None = None
    ) -> SentenceTransformerTrainingArguments:
        """Add the sampler, and in a long run evaluations on the way."""
        arguments = super().arguments(output_dir, rows, device=device)
        arguments.batch_sampler = FalseNegativeAwareBatchSampler
        steps = self.steps(rows, arguments.world_size)
        if steps >= _STEPS_THAT_ALLOW:
            size = self.per_device_train_batch_size
            arguments.set_evaluate(strategy="steps", steps=steps // _EVALUATIONS, batch_size=size, delay=0)
        return arguments


@dataclass(frozen=True, kw_only=True)
class TextDistillation(RunSettings):
    """Settings of :func:`~unime_st.training.distill_texts`; the paper's, where it prints any.

    Those that are not named here are as in :class:`PairsTraining`.

    Attributes:
        temperature: Of both sides' similarities; the paper prints none.
        direction: Of the KL divergence, see :class:`~unime_st.losses.DistillKLLoss`.
        include_diagonal: Whether a text is compared with itself too, as in the paper.

    Raises:
        TypeError: When a setting that must be a number is not one.
        ValueError: When a setting is out of range.
    """

    learning_rate: float = 5e-4
    rank: int = 32
    temperature: float = 0.05
    direction: KLDirection = "teacher_student"
    include_diagonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_direction(self.direction)
