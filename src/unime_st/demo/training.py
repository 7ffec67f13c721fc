"""The two stages on the miniature, by the code a user runs: Trainer, losses, sampler, loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from unime_st.data import ItemReader, load_mmeb_train
from unime_st.demo.emoji import EmojiBenchmark
from unime_st.demo.settings import DemoSettings, StageSettings
from unime_st.demo.tasks import TASKS, TRAIN_ONLY_TASKS
from unime_st.losses import HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.modules import default_lora_config, export_encoder, load_encoder
from unime_st.samplers import FalseNegativeAwareBatchSampler

LOG_FILE = "training_log.json"


def stage1_texts(benchmark: EmojiBenchmark, settings: DemoSettings) -> list[str]:
    """Texts of stage 1 in order of use: a quarter terms, a quarter their glosses, a half captions, batch by batch."""
    rows = settings.stage1.steps * settings.stage1.batch_size
    glosses = [gloss for gloss in benchmark.glosses("train", 20 * rows) if len(gloss.gloss.split()) <= 9]
    pairs = [text for gloss in glosses[: rows // 4] for text in (gloss.term, gloss.gloss)]
    captions = Dataset.from_dict({"text": benchmark.captions()}).shuffle(seed=settings.seed)["text"][:]
    mixed = [text for pair in zip(pairs, captions * (1 + rows // len(captions)), strict=False) for text in pair]
    return mixed[:rows]


def stage2_rows(benchmark: EmojiBenchmark, settings: DemoSettings) -> Dataset:
    """Training pairs of stage 2: every bare caption, and some rows of each subset with its own instruction."""
    subsets = []
    for name in (*TRAIN_ONLY_TASKS, *TASKS):
        rows = load_mmeb_train(
            benchmark.train_root, [name], image_root=benchmark.image_root, num_negatives=settings.num_explicit_negatives
        )
        rows = rows.shuffle(seed=settings.seed)
        if name in TASKS:
            rows = rows.select(range(min(len(rows), settings.rows_per_subset)))
        subsets.append(rows.with_format(None))
    return concatenate_datasets(subsets).with_transform(ItemReader(benchmark.image_root))


def with_lora(path: Path, settings: DemoSettings) -> SentenceTransformer:
    """Load an encoder with fresh LoRA weights on the adapted layers."""
    model = load_encoder(path, device="cpu")
    model.add_adapter(default_lora_config(rank=settings.lora_rank, layers=settings.adapted_layers))
    return model


def run_stage(  # noqa: PLR0917
    name: str,
    start: Path,
    rows: Dataset,
    loss_of: Any,
    stage: StageSettings,
    settings: DemoSettings,
    folder: Path,
    *,
    gather_false_negatives: bool = False,
) -> Path:
    """Train one stage, or go on where it was stopped; the result is a merged stock checkpoint in `folder/name`.

    Args:
        name: of the stage.
        start: the encoder to start from.
        rows: training data.
        loss_of: makes the loss of a model.
        stage: of this stage.
        settings: of the demo.
        folder: where checkpoints go.
        gather_false_negatives: keep false negatives out of the batches with our sampler.

    Returns:
        The checkpoint's folder, with the training log inside.
    """
    target = folder / name
    if (target / LOG_FILE).is_file():
        return target
    model = with_lora(start, settings)
    if stage.projector_learning_rate:
        encoder: Any = model[0]
        encoder.model.multi_modal_projector.requires_grad_(True)
    loss: nn.Module = loss_of(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / f"{name}-training"),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        learning_rate_mapping=(
            {r".*multi_modal_projector.*": stage.projector_learning_rate} if stage.projector_learning_rate else {}
        ),
        warmup_steps=max(1, stage.steps // 10),
        weight_decay=0.0,
        batch_sampler=FalseNegativeAwareBatchSampler if gather_false_negatives else "batch_sampler",
        dataloader_drop_last=True,
        save_strategy="steps",
        save_steps=max(1, stage.steps // 4),
        save_total_limit=1,
        logging_steps=1,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
    LossMetricsCallback.attach(trainer)
    training_folder = Path(arguments.output_dir or "")
    last = get_last_checkpoint(str(training_folder)) if training_folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    export_encoder(model, target)
    log = {"seconds": trainer.state.log_history[-1].get("train_runtime"), "log": trainer.state.log_history}
    partial = target / f"{LOG_FILE}.partial"
    partial.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    partial.replace(target / LOG_FILE)
    return target


def hard_negative_loss(stage: StageSettings, settings: DemoSettings, **options: Any) -> Any:
    """Stage 2's loss, as a function of the model."""
    options = {"margin": settings.margin, "num_hard_negatives": settings.num_hard_negatives, **options}
    return lambda model: HardNegativeInfoNCELoss(model, temperature=stage.temperature, **options)
