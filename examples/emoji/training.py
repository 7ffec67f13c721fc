"""The two stages on the miniature, by the code a user runs: Trainer, losses, sampler, loaders."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.training_args import MultiDatasetBatchSamplers
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from emoji.align import FoldLoss, Projection
from emoji.benchmark import EmojiBenchmark
from emoji.miniature import text_teacher
from emoji.packages import Fetched
from emoji.settings import DemoSettings, StageSettings
from emoji.tasks import TASKS, TRAIN_ONLY_TASKS
from unime_st import export_encoder, load_encoder
from unime_st.data import ItemReader, load_mmeb_train, teacher_embeddings, with_teacher_labels
from unime_st.files import write_atomically
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.modules import default_lora_config

LOG_FILE = "training_log.json"


def stage1_texts(benchmark: EmojiBenchmark, settings: DemoSettings) -> list[str]:
    """Texts of stage 1 in order of use: a quarter terms, a quarter their glosses, a half captions, batch by batch."""
    rows = settings.stage1.steps * settings.stage1.batch_size
    glosses = [gloss for gloss in benchmark.glosses("train", 20 * rows) if len(gloss.gloss.split()) <= 9]
    pairs = [text for gloss in glosses[: rows // 4] for text in (gloss.term, gloss.gloss)]
    captions = Dataset.from_dict({"text": benchmark.captions()}).shuffle(seed=settings.seed)["text"][:]
    mixed = [text for pair in zip(pairs, captions * (1 + rows // len(captions)), strict=False) for text in pair]
    return mixed[:rows]


def stage2_rows(benchmark: EmojiBenchmark, settings: DemoSettings, folds: dict[str, int]) -> DatasetDict:
    """Training pairs of stage 2: every bare caption, and some rows of each subset with its own instruction.

    Batches are of one kind: all targets are texts, or all are images, since a text among images is too easy a negative.
    Every second caption is turned round, so that there is text->image too.

    There is a data set for each fold of `folds` (path of each plain drawing -> its fold) and kind of target. A pair
    whose drawings are of two folds is left out; one without plain drawings, a collage say, goes to any fold.
    """
    subsets = []
    for name in (*TRAIN_ONLY_TASKS, *TASKS):
        rows = load_mmeb_train(
            benchmark.train_root, [name], image_root=benchmark.image_root, num_negatives=settings.num_explicit_negatives
        )
        rows = rows.shuffle(seed=settings.seed)
        if name in TASKS:
            rows = rows.select(range(min(len(rows), settings.rows_per_subset)))
        else:
            rows = rows.with_format(None).map(_turned_round, with_indices=True)
        subsets.append(rows.with_format(None))
    rows = concatenate_datasets(subsets)
    members: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        fold = _fold(row, index, folds)
        if fold is not None:
            members[f"fold{fold}_{'image' if row['positive']['image'] else 'text'}"].append(index)
    reader = ItemReader(benchmark.image_root)
    return DatasetDict({name: rows.select(members[name]).with_transform(reader) for name in sorted(members)})


def _turned_round(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"anchor": row["positive"], "positive": row["anchor"]} if index % 2 else row


def _fold(row: dict[str, Any], index: int, folds: dict[str, int]) -> int | None:
    """The one fold of a row's plain drawings; any if it has none, None if they are of several."""
    paths = (row[column]["image"] for column in ("anchor", "positive"))
    of = {folds[path] for path in paths if path in folds}
    if not of:
        return index % (1 + max(folds.values()))
    return of.pop() if len(of) == 1 else None


def fold_of(name: str) -> int:
    """The fold in the name of a data set of `stage2_rows`.

    >>> fold_of("fold3_text")
    3
    """
    return int(name.removeprefix("fold").split("_")[0])


def with_lora(path: Path, settings: DemoSettings) -> SentenceTransformer:
    """Load an encoder with fresh LoRA weights on the adapted layers."""
    model = load_encoder(path, device="cpu")
    model.add_adapter(default_lora_config(rank=settings.lora_rank, layers=settings.adapted_layers))
    return model


def run_stage(  # noqa: PLR0917
    name: str,
    start: Path,
    rows: Dataset | DatasetDict,
    loss_of: Callable[[SentenceTransformer], nn.Module],
    stage: StageSettings,
    settings: DemoSettings,
    folder: Path,
    *,
    projections: Sequence[Projection] = (),
    **options: Any,
) -> Path:
    """Train one stage, or go on where it was stopped; the result is a merged stock checkpoint in `folder/name`.

    Args:
        name: of the stage.
        start: the encoder to start from.
        rows: training data; those of `stage2_rows` with `projections`.
        loss_of: makes the loss of a model.
        stage: of this stage.
        settings: of the demo.
        folder: where checkpoints go.
        projections: of `fit_projections`: a batch of a fold passes through the projector fitted without it, and the
            result holds the one fitted to all.
        options: more training arguments.
    """
    target = folder / name
    if (target / LOG_FILE).is_file():
        return target
    set_seed(settings.seed)
    model = with_lora(start, settings)
    loss = loss_of(model)
    defaults = {
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "warmup_steps": max(1, stage.steps // 10),
        "weight_decay": 0.0,
        "multi_dataset_batch_sampler": MultiDatasetBatchSamplers.ROUND_ROBIN,
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
    losses: Any = loss
    if projections:
        losses = {name: FoldLoss(loss, projections[1 + fold_of(name)]) for name in rows}
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=losses)
    if isinstance(loss, (DistillKLLoss, HardNegativeInfoNCELoss)):
        trainer.add_callback(LossMetricsCallback(loss))
    training_folder = Path(arguments.output_dir or "")
    last = get_last_checkpoint(str(training_folder)) if training_folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if projections:
        projections[0].write(model)
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
    texts = stage1_texts(benchmark, settings)
    targets = teacher_embeddings(text_teacher(fetched), texts, cache / "teacher")

    def loss(model: SentenceTransformer) -> DistillKLLoss:
        return DistillKLLoss(model, temperature=settings.stage1.temperature, include_diagonal=False)

    rows = with_teacher_labels(texts, targets)
    return run_stage("stage1", start, rows, loss, settings.stage1, settings, folder, **options)


def hard_negative_loss(stage: StageSettings, settings: DemoSettings, **options: Any) -> Any:
    """Stage 2's loss, as a function of the model."""
    options = {"margin": settings.margin, "num_hard_negatives": settings.num_hard_negatives, **options}
    return lambda model: HardNegativeInfoNCELoss(model, temperature=stage.temperature, **options)
