"""What every run has: a folder of its own, a start with fresh LoRA weights, a Trainer that goes on after a kill."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from transformers import set_seed

from unime_st.checkpoints import (
    CheckpointCallback,
    ResumingTrainer,
    checkpoints,
    explained_write_errors,
    last_complete_checkpoint,
)
from unime_st.distributed import from_rank_zero
from unime_st.files import FolderLock, one_at_a_time, write_atomically
from unime_st.losses import LossMetricsCallback
from unime_st.losses.in_batch import InBatchLoss
from unime_st.modules import build_encoder, default_lora_config, load_encoder
from unime_st.published import PUBLISHED
from unime_st.samplers import SamplerEpochCallback
from unime_st.training.settings import RunSettings

logger = logging.getLogger(__name__)

PROVENANCE = "training.json"
"""In the exported encoder: what it was trained from, on how many rows, by which settings, and its scores."""

_RUN = "run.json"


def claim_folder(
    output: Path, told: dict[str, Any], stack: ExitStack, *, made_before_a_step: str | None = None
) -> None:
    """Write down what a run is of, or compare it with what is there; a run that never took a step is no run."""
    with one_at_a_time(output):
        if stack.enter_context(FolderLock(output)).others():
            raise ValueError(f"Another run is at work in {output}. Wait until it has ended, or give another folder.")
    path = output / _RUN
    was = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else told
    if was != json.loads(json.dumps(told)):
        if checkpoints(output / "checkpoints") or (output / "encoder").exists():
            differing = "; ".join(
                f"`{name}` was {was.get(name)!r} and is {told.get(name)!r}"
                for name in {**was, **told}
                if was.get(name) != told.get(name)
            )
            raise ValueError(
                f"{output} holds a run with other data or settings: {differing}. Give them as before to go on with it, "
                "or another output folder."
            )
        if made_before_a_step is not None:
            (output / made_before_a_step).unlink(missing_ok=True)
    write_atomically(path, json.dumps(told, indent=1) + "\n")


def start_model(
    backbone: str | Path, settings: RunSettings, device: str, *, text_only: bool = False
) -> SentenceTransformer:
    """The backbone or saved encoder with fresh LoRA weights."""
    if (Path(backbone) / "adapter_config.json").is_file():
        raise ValueError(
            f"{backbone} holds adapters of its own. Merge them first: unime export {backbone} --output merged"
        )
    set_seed(settings.seed)  # the Trainer's comes too late for them
    lora = default_lora_config(settings.rank)
    if str(backbone) not in PUBLISHED and not (Path(backbone) / "modules.json").is_file():
        return build_encoder(
            backbone,
            peft_config=lora,
            device=device,
            max_pixels=settings.max_pixels,
            max_seq_length=settings.max_seq_length,
            text_only=text_only,
        )
    if settings.max_pixels is not None:
        raise ValueError(f"{backbone} is a saved encoder, which keeps its `max_pixels`. Leave it out.")
    model = load_encoder(backbone, device=device, text_only=text_only)
    if settings.max_seq_length is not None:
        model.max_seq_length = settings.max_seq_length
    model.add_adapter(lora)
    return model


def run_trainer(
    loss: InBatchLoss,
    rows: Dataset,
    arguments: SentenceTransformerTrainingArguments,
    evaluator: SentenceEvaluator | None = None,
) -> list[dict[str, Any]]:
    """Train, from the last whole checkpoint if there is one; returns the Trainer's log."""
    folder = Path(str(arguments.output_dir))
    trainer = ResumingTrainer(
        model=loss.model,
        args=arguments,
        train_dataset=rows,
        loss=loss,
        evaluator=evaluator,
        callbacks=[SamplerEpochCallback(), CheckpointCallback()],
    )
    LossMetricsCallback.attach(trainer)
    checkpoint = from_rank_zero(lambda: last_complete_checkpoint(folder))  # reads it: once is enough
    if checkpoint is not None:
        logger.info("Going on from %s", checkpoint)
    with explained_write_errors(folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state.log_history
