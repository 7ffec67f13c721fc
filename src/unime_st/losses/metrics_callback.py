"""The losses' own numbers in the Trainer's logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unime_st import distributed
from unime_st.losses.in_batch import InBatchLoss


class LossMetricsCallback(TrainerCallback):
    """Add the means of a loss's ``last_metrics`` since the last log event to the Trainer's logs, and count its steps.

    Means run over every training forward pass, those of gradient accumulation included, and over processes. They appear
    in ``trainer.state.log_history`` and in what later callbacks print. A tracker (TensorBoard, Weights & Biases, ...)
    is called before the callbacks passed to the Trainer, so use :meth:`attach` to have them there too.

    At the beginning of each step the loss's ``global_step`` becomes the Trainer's, which is the same on all processes,
    counts a step once however many forward passes it has, and is saved and resumed with checkpoints.

    Args:
        loss: The Trainer's loss: one of this package's, a wrapper around one such as ``MatryoshkaLoss`` (its means then
            run over its dimensions as well), or a dict of losses by data set, whose names then prefix the numbers.

    Raises:
        TypeError: When it is no loss.
        ValueError: When there is no loss of this package inside.

    Example:
        >>> from unime_st.losses import HardNegativeInfoNCELoss
        >>> callback = LossMetricsCallback(HardNegativeInfoNCELoss(None))
    """

    def __init__(self, loss: nn.Module | Mapping[str, nn.Module]) -> None:
        named = {f"{name}_": module for name, module in loss.items()} if isinstance(loss, Mapping) else {"": loss}
        if wrong := [module for module in named.values() if not isinstance(module, nn.Module)]:
            raise TypeError(f"`loss` is a {type(wrong[0]).__name__}, but a loss, or a dict of losses, is needed.")
        ours = {
            prefix: [part for part in module.modules() if isinstance(part, InBatchLoss)]
            for prefix, module in named.items()
        }
        self.losses = {prefix: inner[0] for prefix, inner in ours.items() if inner}
        self._counting = [part for inner in ours.values() for part in inner]
        if not self.losses:
            names = ", ".join(type(module).__name__ for module in named.values())
            raise ValueError(f"No loss with metrics in {names}: use one of `unime_st.losses`.")

    @classmethod
    def attach(cls, trainer: SentenceTransformerTrainer) -> LossMetricsCallback:
        """Add the callback for ``trainer.loss`` ahead of the trainer's other callbacks, trackers included."""
        callback = cls(trainer.loss)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_step_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Tell the losses the number of the step, and how many steps the learning rate rises."""
        rising = args.get_warmup_steps(state.max_steps)
        for loss in self._counting:
            loss.global_step, loss.rising_steps = state.global_step, rising

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Make the losses forget it: another training would start in the middle."""
        for loss in self._counting:
            loss.global_step = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 the Trainer's signature
        logs: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Add the means to the log event of a training step, which every process takes part in."""
        if logs is None or "loss" not in logs:
            return
        # All names, whether or not this process has seen the loss since: the others may have, and all must send alike.
        found: dict[str, torch.Tensor | None] = {}
        for prefix, loss in self.losses.items():
            own = loss.pop_mean_metrics()
            found |= {prefix + name: own.get(name) for name in sorted(loss.metric_names)}
        nothing = torch.zeros((), device=args.device)
        values = torch.stack([nothing if mean is None else mean.to(nothing) for mean in found.values()])
        present = torch.tensor([mean is not None for mean in found.values()], device=args.device)
        means = dict(zip(found, distributed.mean_over_processes(values, present).tolist(), strict=True))
        metrics = {
            name: round(mean, 6) for name, mean in means.items() if found[name] is not None or not math.isnan(mean)
        }
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)  # the Trainer stored its copy before this event
