"""What the stages of training share: their data, their start, and one run of the Trainer."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import nn
from transformers import set_seed

from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.checkpoints import (
    CheckpointCallback,
    ResumingTrainer,
    checkpoints,
    explained_write_errors,
    last_complete_checkpoint,
)
from unime_st.data import load_judged_negatives, with_teacher_labels
from unime_st.distributed import from_rank_zero
from unime_st.losses import LossMetricsCallback, effective_negatives
from unime_st.modules import default_lora_config
from unime_st.samplers import SamplerEpochCallback

if TYPE_CHECKING:
    from recipe import Recipe


class HubTeacher:
    """Loads on first use: of several processes, and in later runs, only one that finds a text not in the cache does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: SentenceTransformer | None = None

    def encode(self, texts: list[str], /, **options: Any) -> np.ndarray:
        self.model = self.model or SentenceTransformer(self.name)
        return self.model.encode(texts, **options)


def teacher_labels(
    texts: Dataset,
    *,
    model: str,
    cache_dir: str,
    prompt: str | None = None,
    prompt_name: str | None = None,
    batch_size: int = 32,
) -> Dataset:
    """Labels by a sentence-transformers model, or from an .npy of embeddings: (N, D), or (N, n, D) for n columns."""
    if model.endswith(".npy"):
        return with_teacher_labels(texts, np.load(model))
    options: dict[str, Any] = {"prompt": prompt, "prompt_name": prompt_name, "batch_size": batch_size}
    options["show_progress_bar"] = True
    if Path(model).is_dir():
        return with_teacher_labels(texts, SentenceTransformer(model), cache_dir, **options)
    return with_teacher_labels(texts, HubTeacher(model), cache_dir, teacher_name=model, **options)


def judged_rows(
    folder: str,
    *,
    num_negatives: int = 8,
    image_root: str | None = None,
    image_size: int | None = None,
    max_pixels: int | None = None,
    max_bad_images: int = 0,
    bad_images_log: str | None = None,
) -> Dataset:
    """Judged negatives, of `examples/judge.py` or a released list; the paper trains with 8 of 10."""
    return load_judged_negatives(
        folder,
        num_negatives=num_negatives,
        image_root=image_root,
        image_size=image_size,
        max_pixels=max_pixels,
        max_bad_images=max_bad_images,
        bad_images_log=bad_images_log,
    )


def training_arguments(recipe: "Recipe", **defaults: Any) -> SentenceTransformerTrainingArguments:
    """Make these first: they start the processes' group, and tell each its device."""
    return SentenceTransformerTrainingArguments(f"{recipe.output}/checkpoints", **(defaults | recipe.training))


def load_start(recipe: "Recipe", arguments: SentenceTransformerTrainingArguments) -> SentenceTransformer:
    """Load what training starts from, a saved encoder or a backbone, with fresh LoRA weights."""
    set_seed(arguments.seed)  # the Trainer's comes too late for the LoRA weights
    device = str(arguments.device)
    lora = default_lora_config(**recipe.lora)
    if not (Path(recipe.backbone) / "modules.json").is_file():
        return build_encoder(recipe.backbone, peft_config=lora, device=device, **recipe.encoder)
    fixed = sorted(set(recipe.encoder) - set(inspect.signature(load_encoder).parameters))
    if fixed:
        raise ValueError(f"{recipe.backbone} is a saved encoder and keeps its {fixed}: leave them out of `encoder`.")
    model = load_encoder(recipe.backbone, device=device, **recipe.encoder)
    model.add_adapter(lora)
    return model


def count_negatives(loss: nn.Module, arguments: SentenceTransformerTrainingArguments, candidates_a_row: int) -> int:
    """Print how many others each query is compared with, and what makes them fewer than was meant."""
    found = effective_negatives(loss, arguments, candidates_a_row)
    if not arguments.process_index:
        terms = f"{found.rows} rows x {found.processes} process(es) x {candidates_a_row}"
        print(f"each query is compared with {found.number} others: {terms}")
        for warning in found.warnings:
            print(f"WARNING: {warning}")
    return found.number


def train(recipe: "Recipe", arguments: SentenceTransformerTrainingArguments, rows: Dataset, loss: nn.Module) -> Path:
    """Train, from the last whole checkpoint if there is one, and export the encoder with its adapters merged."""
    model = loss.model
    callbacks = [SamplerEpochCallback(), CheckpointCallback()]
    trainer = ResumingTrainer(model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=callbacks)
    LossMetricsCallback.attach(trainer)
    folder, encoder = Path(arguments.output_dir), Path(recipe.output) / "encoder"
    checkpoint = from_rank_zero(lambda: last_complete_checkpoint(folder))  # reads it: once is enough
    if trainer.is_world_process_zero():
        for path in checkpoints(folder):
            if checkpoint is None or int(path.name.rpartition("-")[2]) > int(checkpoint.name.rpartition("-")[2]):
                print(f"WARNING: {path} is half-written and passed over")
        if checkpoint:
            print(f"going on from {checkpoint}; give another output= to start anew")
    trainer.accelerator.wait_for_everyone()  # all have looked before one writes
    with explained_write_errors(folder):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if trainer.is_world_process_zero():
            print(f"wrote {export_encoder(model, encoder)}")
    trainer.accelerator.wait_for_everyone()
    return encoder
