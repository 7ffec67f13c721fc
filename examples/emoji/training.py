"""The two stages on the miniature, by the code a user runs: Trainer, losses, sampler, loaders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from emoji.benchmark import EmojiBenchmark
from emoji.miniature import text_teacher
from emoji.packages import Fetched
from emoji.settings import DemoSettings, StageSettings
from unime_st import export_encoder, load_encoder
from unime_st.data import load_mmeb_train, teacher_embeddings, with_teacher_labels
from unime_st.files import write_atomically
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback

LOG_FILE = "training_log.json"


def stage1_texts(benchmark: EmojiBenchmark, stage: StageSettings, seed: int) -> list[str]:
    """Texts of stage 1, shuffled: of five, three terms of WordNet, one short gloss and one caption."""
    fifth = -(-stage.steps * stage.batch_size // 5)
    glosses = benchmark.glosses("train")
    terms = list(dict.fromkeys(entry.term for entry in glosses))[: 3 * fifth]
    meanings = [entry.gloss for entry in glosses if len(entry.gloss.split()) <= 9][:fifth]
    captions = benchmark.captions() * (1 + fifth // len(benchmark.captions()))
    texts = [*terms, *meanings, *captions[:fifth]]
    random.Random(seed).shuffle(texts)
    return texts


def stage2_rows(benchmark: EmojiBenchmark) -> Dataset:
    """Training pairs of stage 2: each drawing, some with a skin tone, some side by side, and its label."""
    return load_mmeb_train(benchmark.train_root, ["EmojiCaption"], image_root=benchmark.image_root, num_negatives=0)


def trainable(path: Path, settings: DemoSettings) -> SentenceTransformer:
    """Load an encoder to train projector and layers, not words or vision tower; the tower's features drop out."""
    model = load_encoder(path, device="cpu")
    backbone: Any = model[0].model  # type: ignore[index]
    backbone.vision_tower.requires_grad_(False)
    backbone.get_input_embeddings().requires_grad_(False)

    def dropped(projector: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return dropout(inputs[0], settings.feature_dropout, projector.training)

    backbone.multi_modal_projector.register_forward_pre_hook(dropped)
    return model


def run_stage(  # noqa: PLR0917
    name: str,
    start: Path,
    rows: Dataset,
    loss_of: Callable[[SentenceTransformer], nn.Module],
    stage: StageSettings,
    settings: DemoSettings,
    folder: Path,
    *,
    finish: Callable[[SentenceTransformer], None] | None = None,
    **options: Any,
) -> Path:
    """Train one stage, or go on where it was stopped; the result is a stock checkpoint in `folder/name`.

    Args:
        name: of the stage.
        start: the encoder to start from.
        rows: training data.
        loss_of: makes the loss of a model.
        stage: of this stage.
        settings: of the demo.
        folder: where checkpoints go.
        finish: what is done to the model before it is exported.
        options: more training arguments.
    """
    target = folder / name
    if (target / LOG_FILE).is_file():
        return target
    set_seed(settings.seed)
    model = trainable(start, settings)
    loss = loss_of(model)
    defaults: dict[str, Any] = {
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "warmup_steps": max(1, stage.steps // 10),
        "weight_decay": 0.0,
        "dataloader_drop_last": True,
        "save_strategy": "steps",
        "save_steps": max(1, stage.steps // 4),
        "save_total_limit": 1,
        "logging_steps": 1,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": "none",
        "use_cpu": True,
    }
    arguments = SentenceTransformerTrainingArguments(str(folder / f"{name}-training"), **(defaults | options))
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
    if isinstance(loss, (DistillKLLoss, HardNegativeInfoNCELoss)):
        trainer.add_callback(LossMetricsCallback(loss))
    training_folder = Path(arguments.output_dir or "")
    last = get_last_checkpoint(str(training_folder)) if training_folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if finish:
        finish(model)
    export_encoder(model, target)
    log = {"seconds": trainer.state.log_history[-1].get("train_runtime"), "log": trainer.state.log_history}
    write_atomically(target / LOG_FILE, json.dumps(log, indent=1) + "\n")
    return target


def run_stage1(  # noqa: PLR0917
    fetched: Fetched,
    benchmark: EmojiBenchmark,
    start: Path,
    settings: DemoSettings,
    folder: Path,
    cache: Path,
    **options: Any,
) -> Path:
    """Train stage 1 on texts against the teacher, whose embeddings are kept in `cache`; see `run_stage`."""
    texts = stage1_texts(benchmark, settings.stage1, settings.seed)
    targets = teacher_embeddings(text_teacher(fetched), texts, cache / "teacher")

    def loss(model: SentenceTransformer) -> DistillKLLoss:
        return DistillKLLoss(model, temperature=settings.stage1.temperature, include_diagonal=False)

    rows = with_teacher_labels(texts, targets)
    return run_stage("stage1", start, rows, loss, settings.stage1, settings, folder, **options)


def hard_negative_loss(settings: DemoSettings, **options: Any) -> Callable[[SentenceTransformer], nn.Module]:
    """Stage 2's loss, both ways, as a function of the model."""
    defaults: dict[str, Any] = {
        "temperature": settings.stage2.temperature,
        "margin": settings.margin,
        "num_hard_negatives": settings.num_hard_negatives,
        "hard_negatives_warmup_steps": settings.hard_negatives_warmup_steps,
        "directions": ("query_to_doc", "doc_to_query"),
        "mini_batch_size": settings.mini_batch_size,
    }
    return lambda model: HardNegativeInfoNCELoss(model, **(defaults | options))
