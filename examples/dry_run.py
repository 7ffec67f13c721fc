"""The plan of a run, printed without loading weights: rows, steps, tokens, parameters and an estimate of memory."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from recipe import Recipe, SoftLabelsRecipe, Stage2Recipe
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from stage import count_negatives, load_start
from torch import nn
from transformers import AutoConfig, AutoModel

from unime_st.columns import SUBSET, training_columns
from unime_st.modules import default_lora_config
from unime_st.modules.text_only import VISION_PARTS
from unime_st.training import without_weights
from unime_st.training.planning import GIB, memory, parameters_by_part

SAMPLE_ROWS = 16
NOT_AT_HAND = (OSError, ValueError)  # what loaders raise when files are missing or there is no network


def planned_model(recipe: Recipe) -> tuple[nn.Module, SentenceTransformer | None]:
    """The model on the meta device, with its adapters: the backbone, and the encoder if its processor is at hand."""
    try:
        with without_weights():
            encoder = load_start(recipe, SimpleNamespace(seed=0, device="meta"))  # type: ignore[arg-type]
    except OSError:  # no processor, perhaps
        config = AutoConfig.from_pretrained(recipe.backbone, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=config.dtype)
        if recipe.encoder.get("text_only"):
            for name in set(VISION_PARTS) & {name for name, _ in model.named_children()}:
                delattr(model, name)
        model.add_adapter(default_lora_config(**recipe.lora))
        return model, None
    return encoder[0].model, encoder  # type: ignore[return-value]


def steps_an_epoch(sets: Counter[str], batch: int, *, homogeneous: bool, drop_last: bool) -> int:
    """Global batches of an epoch, at the most: rows that conflict too much to be placed are left out."""
    sizes = list(sets.values()) if homogeneous else [sets.total()]
    full = sum(size // batch for size in sizes)
    return full + (not drop_last and any(size % batch for size in sizes))


def sample_tokens(encoder: SentenceTransformer, rows: Dataset, columns: list[str]) -> dict[str, np.ndarray]:
    """Tokens of some rows' inputs, evenly spaced over the set, by column."""
    places = np.unique(np.linspace(0, len(rows) - 1, SAMPLE_ROWS).astype(int))
    drawn = [rows[int(place)] for place in places]
    module: Any = encoder[0]
    masks = {name: module.preprocess([row[name] for row in drawn])["attention_mask"] for name in columns}
    return {name: mask.sum(dim=1).numpy() for name, mask in masks.items()}


def dry_run(recipe: Recipe, processes: int | None = None) -> None:
    """Print the plan; what is not at hand is named, and the rest printed all the same."""
    given = {**recipe.training, "use_cpu": True}  # a plan needs no GPU
    arguments = SentenceTransformerTrainingArguments(f"{recipe.output}/checkpoints", **given)
    if arguments.process_index:
        return
    world = processes or arguments.world_size
    print(
        f"DRY RUN: no weights are loaded, nothing is written. {recipe.backbone} -> {recipe.output}, {world} process(es)"
    )
    rows = _or_missing("rows", lambda: _plan_rows(recipe))
    model, encoder = _or_missing("model", lambda: planned_model(recipe)) or (None, None)

    per_device = arguments.per_device_train_batch_size
    batch = per_device * world * arguments.gradient_accumulation_steps
    print(f"global batch: {batch} rows = {per_device} x {world} process(es) x {arguments.gradient_accumulation_steps}")
    names = [] if rows is None else [name for name in rows.column_names if name != SUBSET]
    if isinstance(recipe, Stage2Recipe | SoftLabelsRecipe):
        candidates = 1 + (len(training_columns(names).negatives) if names else recipe.data.get("num_negatives") or 0)
    else:
        candidates = len(names or recipe.data.get("columns") or [""])
    loss = recipe.sections["loss"](None, **recipe.loss)
    shape = SimpleNamespace(
        per_device_train_batch_size=per_device,
        world_size=world,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        process_index=0,
        device="cpu",  # of the run it is not known
        n_gpu=1,
    )
    count_negatives(loss, shape, candidates)  # type: ignore[arg-type]
    _print_steps(recipe, arguments, rows, batch)

    tokens: dict[str, np.ndarray] | None = None
    if rows is None or encoder is None:
        print("MISSING tokens: they need the rows and the backbone's processor")
    else:
        inputs = [name for name in names if name != "label"]
        tokens = _or_missing("tokens", lambda: sample_tokens(encoder, rows, inputs))
    if tokens:
        each = {name: f"{counts.mean():.0f} (at most {counts.max()})" for name, counts in tokens.items()}
        total = sum(counts.mean() for counts in tokens.values()) * batch
        print(f"tokens an input, of {len(next(iter(tokens.values())))} rows: {each}")
        print(f"tokens a step: about {total:,.0f}, {total / world:,.0f} a process")
    if model is not None:
        for part, (trainable, frozen) in parameters_by_part(model).items():
            print(f"parameters, {part}: {trainable:,} trainable, {frozen:,} frozen")
        _print_memory(recipe, arguments, model, tokens)


def _or_missing(what: str, make: Any) -> Any:
    try:
        return make()
    except NOT_AT_HAND as error:
        reason = " ".join(str(error).split())
        print(f"MISSING {what}: {reason[:300]}")
        if what == "model":
            print("  A start that stage 1 has yet to make may be planned with its backbone: `backbone=<Hub name>`.")
        return None


def _plan_rows(recipe: Recipe) -> Dataset:
    options = dict(recipe.data)
    if isinstance(recipe, Stage2Recipe):  # the names of the sets; and a plan logs no images
        options |= {"subset_column": True, "max_bad_images": 0, "bad_images_log": None}
    if isinstance(recipe, SoftLabelsRecipe):
        options |= {"max_bad_images": 0, "bad_images_log": None}
    return recipe.sections["data"](**options)


def _rows_by_set(recipe: Recipe, rows: Dataset) -> Counter[str]:
    if SUBSET in rows.column_names:
        return Counter(rows.with_format(None)[SUBSET][:])
    return Counter({str(recipe.data.get("source") or recipe.data["folder"]): len(rows)})


def _print_steps(
    recipe: Recipe, arguments: SentenceTransformerTrainingArguments, rows: Dataset | None, batch: int
) -> None:
    fixed = f"{arguments.max_steps} (max_steps)" if arguments.max_steps > 0 else None
    if rows is None:
        print(f"steps: {fixed or 'unknown without the rows'}")
        return
    sets = _rows_by_set(recipe, rows)
    for name, count in sets.items():
        print(f"rows of {name}: {count:,}")
    print(f"rows: {sets.total():,}")
    sampler = getattr(recipe, "sampler", {})
    cap = sampler.get("max_rows_per_dataset")
    used = Counter({name: min(count, cap or count) for name, count in sets.items()})
    homogeneous = bool(sampler.get("homogeneous"))
    epoch = steps_an_epoch(used, batch, homogeneous=homogeneous, drop_last=arguments.dataloader_drop_last)
    if not epoch:
        print(f"WARNING: no {'set' if homogeneous else 'epoch'} fills a global batch of {batch} rows")
        return
    steps = int(np.ceil(epoch * arguments.num_train_epochs))
    print(f"steps: {fixed or steps}, an epoch has at most {epoch}")
    if fixed:
        print(f"epochs: {arguments.max_steps / epoch:.2f}")


def _print_memory(
    recipe: Recipe,
    arguments: SentenceTransformerTrainingArguments,
    model: nn.Module,
    tokens: dict[str, np.ndarray] | None,
) -> None:
    pass_tokens = recipe.loss.get("mini_batch_num_tokens")
    if tokens:
        longest = max(int(counts.max()) for counts in tokens.values())
        size = recipe.loss.get("mini_batch_size") or arguments.per_device_train_batch_size * len(tokens)
        pass_tokens = max(pass_tokens, longest) if pass_tokens else size * longest
    if not pass_tokens:
        print("MISSING memory of activations: it needs the tokens")
    parts = memory(model, pass_tokens or 0, checkpointing=arguments.gradient_checkpointing)
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    print(f"memory a GPU, roughly: {sum(parts.values()) / GIB:.2f} GiB = {listed} ({pass_tokens or 0:,} tokens a pass)")
