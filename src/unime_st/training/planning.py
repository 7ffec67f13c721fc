"""What training asks of a machine, estimated before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

from unime_st.columns import training_columns
from unime_st.modules import saved
from unime_st.modules.text_only import VISION_PARTS

GIB = 2**30
_SAMPLE_ROWS = 16
_PASSES = 3  # with GradCache: a forward without gradients, one with, and the gradients of states; weights are frozen
_PROJECTORS = (
    *("multi_modal_projector", "connector", "merger", "deepstack_merger_list"),
    *("img_projection", "glb_GN", "sub_GN", "image_newline"),
)
_BACKBONE_WEIGHTS = ["model*.safetensors", "pytorch_model*", "consolidated*", "*.gguf", "*.onnx*"]
_TOWERS = (*VISION_PARTS, "img_processor")


@contextmanager
def without_weights() -> Iterator[None]:
    """Within this context transformers' models are made from their configs on the meta device; no weights are read.

    Of a published model or saved encoder on the Hub, the weights are not downloaded either. This holds for all threads:
    load no model in another one meanwhile.
    """

    def made(cls: Any, *_: Any, config: Any, dtype: Any = "auto", output_loading_info: bool = False, **__: Any) -> Any:
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model = cls._from_config(config, dtype=dtype or torch.float32)
        nothing: dict[str, set[str]] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, nothing) if output_loading_info else model

    before = PreTrainedModel.__dict__["from_pretrained"]
    download = saved.__dict__["snapshot_download"]
    setattr(PreTrainedModel, "from_pretrained", classmethod(made))  # noqa: B010
    setattr(saved, "snapshot_download", partial(download, ignore_patterns=_BACKBONE_WEIGHTS))  # noqa: B010
    try:
        yield
    finally:
        setattr(saved, "snapshot_download", download)  # noqa: B010
        setattr(PreTrainedModel, "from_pretrained", before)  # noqa: B010


def parameters_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count (trainable, frozen) parameters of the vision tower, projector, language model and LoRA."""
    counts = {part: [0, 0] for part in ("vision", "projector", "language model", "LoRA")}
    for name, weight in model.named_parameters():
        names = set(name.split("."))
        if "lora_" in name:
            part = "LoRA"
        elif names & set(_PROJECTORS):
            part = "projector"
        else:
            part = "vision" if names & set(_TOWERS) else "language model"
        counts[part][not weight.requires_grad] += weight.numel()
    return {part: (trainable, frozen) for part, (trainable, frozen) in counts.items()}


def memory(model: nn.Module, tokens: float, *, checkpointing: bool = False) -> dict[str, float]:
    """Estimate bytes a GPU, when each holds the whole model (DDP).

    * weights: numbers times bytes each, as they are loaded;
    * gradients: as much as the trainable weights; AdamW: twice as much;
    * activations of the language model that a mini-batch of ``tokens`` tokens keeps for its backward pass: with hidden
      size h, intermediate size i and L layers, about ``tokens * L * (10 h + 4 i)`` numbers, counted on small models;
      with gradient checkpointing one layer's and ``tokens * L * h``; of 2 bytes, 4 for a model in float32.

    Left out: the frozen vision tower's, which keeps none, features of images (``vision_cache_bytes``), attention
    scores where attention is "eager", the loss's similarities, and what the allocator wastes. ZeRO-2 divides gradients
    and AdamW by the number of GPUs, FSDP2 the language model's weights too.
    """
    sizes = [(weight.numel() * weight.element_size(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layer = tokens * (10 * text.hidden_size + 4 * text.intermediate_size)
    layers = text.num_hidden_layers
    numbers = layer + tokens * layers * text.hidden_size if checkpointing else layer * layers
    width = 4 if next(iter(model.parameters())).dtype == torch.float32 else 2
    return {
        "weights": sum(size for size, _ in sizes),
        "gradients": trained,
        "AdamW": 2 * trained,
        "activations": numbers * width,
    }


@dataclass(frozen=True)
class TrainingPlan:
    """What a run asks of one GPU, roughly.

    Attributes:
        parameters: Part -> (trainable, frozen).
        tokens: Of a row, all its inputs together, in the mean of some rows; prompt and images count.
        patches: That the vision tower sees of a row, likewise.
        memory: What for -> bytes, of :func:`memory`.
        flops: Of a step.
        steps: Of the run, at the most.
    """

    parameters: dict[str, tuple[int, int]]
    tokens: float
    patches: float
    memory: dict[str, float]
    flops: float
    steps: int

    def __str__(self) -> str:
        trained, frozen = (sum(counts) for counts in zip(*self.parameters.values(), strict=True))
        sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.items() if size)
        whole = self.flops * self.steps
        arithmetic = f"{self.flops / 1e12:,.2f} TFLOP a step, {whole / 1e15:,.2f} PFLOP in all"
        return "\n".join(
            [
                f"  parameters: {trained:,} trained, {frozen:,} frozen",
                f"  memory of a GPU, roughly: {sum(self.memory.values()) / GIB:.2f} GiB = {sizes}",
                f"  time, roughly: {arithmetic}; a GPU that delivers 100 TFLOP/s takes {_span(whole / 1e14)}",
            ]
        )


def plan_training(
    model: SentenceTransformer,
    pairs: Dataset,
    *,
    batch_size: int,
    steps: int,
    mini_batch_num_tokens: int,
    checkpointing: bool = False,
) -> TrainingPlan:
    """Estimate what stage 2 with GradCache asks of a GPU, from the sizes of a model and some rows of the data.

    The arithmetic is that of matrix products alone: 2 a weight and token in the language model, three passes over it
    (its weights are frozen but for LoRA's), and 2 a weight and patch in the vision tower, which is passed once.

    Args:
        model: An encoder with LoRA; made :func:`without_weights`, it takes no memory.
        pairs: As for training; rows whose images cannot be read are passed over.
        batch_size: Rows a step and GPU.
        steps: Of the run.
        mini_batch_num_tokens: Of the loss.
        checkpointing: Whether activations are computed again.

    Raises:
        ValueError: if none of the rows looked at can be read.
    """
    backbone: Any = model[0].model
    tokens, patches = _of_a_row(model, pairs, backbone.config)
    flops = batch_size * flops_of_a_row(backbone, tokens, patches)
    used = memory(backbone, mini_batch_num_tokens, checkpointing=checkpointing)
    return TrainingPlan(parameters_by_part(backbone), tokens, patches, used, flops, steps)


def flops_of_a_row(backbone: Any, tokens: float, patches: float) -> float:
    """The arithmetic of a row of these tokens and patches in training, see :func:`plan_training`."""
    parts = parameters_by_part(backbone)
    embedding = backbone.get_input_embeddings().weight.numel()
    language = sum(sum(parts[part]) for part in ("language model", "LoRA")) - embedding
    return 2 * _PASSES * language * tokens + 2 * sum(parts["vision"]) * patches


def _of_a_row(model: SentenceTransformer, pairs: Dataset, config: Any) -> tuple[float, float]:
    columns = training_columns(pairs.column_names)
    sides = [side for side in (columns.anchor, columns.positive, *columns.negatives) if side is not None]
    found = []
    for place in np.unique(np.linspace(0, len(pairs) - 1, _SAMPLE_ROWS).astype(int)).tolist():
        try:
            row = pairs[place]
        except (FileNotFoundError, ValueError):
            continue  # a bad image, told by `check_pairs`
        found.append(_of_inputs(model, [row[side] for side in sides], config))
    if not found:
        raise ValueError("None of the rows looked at can be read, so nothing can be estimated.")
    tokens, patches = np.mean(found, axis=0)
    return float(tokens), float(patches)


def _of_inputs(model: SentenceTransformer, items: Sequence[Any], config: Any) -> tuple[int, int]:
    """Tokens and patches of some inputs, by what the processor makes of them."""
    tokens = patches = 0
    for item in items:
        features: Any = model.preprocess([{"text": item} if isinstance(item, str) else item], late_media=False)
        tokens += int(features["attention_mask"].sum())
        for kind in ("image", "video"):
            grid = features.get(f"{kind}_grid_thw")
            pixels = features.get("pixel_values" if kind == "image" else "pixel_values_videos")
            if grid is not None:
                patches += int(grid.prod(dim=-1).sum())
            elif pixels is not None:
                vision = getattr(config, "vision_config", None)
                patches += pixels.numel() // (3 * getattr(vision, "patch_size", 14) ** 2)
    return tokens, patches


def _span(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h.

    >>> _span(40), _span(720), _span(12600)
    ('40 s', '12 min', '3.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
