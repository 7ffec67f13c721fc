"""With how many others each query is compared, and the mistakes of a launch that make them fewer than meant."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from unime_st.losses.checks import few_of_a_small_batch
from unime_st.losses.hard_negative_info_nce import HardNegativeInfoNCELoss
from unime_st.losses.in_batch import InBatchLoss


class Negatives(NamedTuple):
    """What a step compares.

    Attributes:
        number: Others that each query is compared with, false negatives not yet left out.
        rows: Rows of each process's batch.
        processes: Number of processes whose rows are compared.
        warnings: What makes the number smaller than was meant, each with what to do.
    """

    number: int
    rows: int
    processes: int
    warnings: tuple[str, ...]


def effective_negatives(
    loss: InBatchLoss, arguments: SentenceTransformerTrainingArguments, candidates_a_row: int = 1
) -> Negatives:
    """Count the negatives of a query in a training step; the number decides what contrastive training is worth.

    Args:
        loss: The loss of the training.
        arguments: The Trainer's arguments, made in the process that trains: they start the group of processes.
        candidates_a_row: Positives and explicit negatives of a row; for stage 1, its texts.

    Returns:
        The number, and warnings.

    Example:
        >>> import tempfile
        >>> arguments = SentenceTransformerTrainingArguments(
        ...     tempfile.mkdtemp(), per_device_train_batch_size=4, use_cpu=True, gradient_accumulation_steps=2
        ... )
        >>> found = effective_negatives(HardNegativeInfoNCELoss(None, num_hard_negatives=8), arguments)
        >>> found.number, [text.partition(" ")[0] for text in found.warnings]
        (3, ['Accumulating', '`num_hard_negatives=8`'])
    """
    world = arguments.world_size
    processes = world if loss.gather_across_devices else 1
    rows = arguments.per_device_train_batch_size
    if loss.compares_own_candidates:
        return Negatives(candidates_a_row - 1, rows, world, ())
    number = rows * processes * candidates_a_row - 1
    warnings = []
    if processes < world:
        warnings.append(
            f"Each of {world} processes compares its own rows only, {number} in place of "
            f"{rows * world * candidates_a_row - 1}. Set `gather_across_devices=True`."
        )
    announced = int(os.environ.get("WORLD_SIZE") or 1)
    if announced > world:
        warnings.append(
            f"The environment speaks of {announced} processes, but this one is alone. Make the training arguments "
            "first, and start with `accelerate launch` or `torchrun`."
        )
    devices = 1 if torch.device(arguments.device).type == "cpu" else torch.cuda.device_count()
    if arguments.n_gpu > 1:
        warnings.append(
            f"One process drives {arguments.n_gpu} devices by DataParallel, which the losses do not span. Start with "
            f"`accelerate launch --num_processes {arguments.n_gpu}` or `torchrun`."
        )
    elif devices > 1 and world == 1:
        warnings.append(
            f"{devices} devices are there, but one process uses one of them. Start with `accelerate launch` or "
            "`torchrun`."
        )
    if arguments.gradient_accumulation_steps > 1:
        warnings.append(
            f"Accumulating gradients over {arguments.gradient_accumulation_steps} batches adds no negatives, for each "
            "batch is compared with itself. Raise `per_device_train_batch_size`, with `mini_batch_size` (GradCache)."
        )
    k = warmup = None
    if isinstance(loss, HardNegativeInfoNCELoss):
        k, warmup = loss.num_hard_negatives, loss.hard_negatives_warmup_steps
    if k is not None and k > number:
        warnings.append(f"`num_hard_negatives={k}` is more than the {number} there are, and training will refuse it.")
    elif not warmup and (advice := few_of_a_small_batch(k, number)):
        warnings.append(advice)
    return Negatives(number, rows, processes, tuple(warnings))
