"""Making an encoder of a multimodal LLM, loading one, and exporting it as a stock checkpoint."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import snapshot_download
from peft import PeftConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import AutoConfig

from unime_st.files import write_atomically
from unime_st.modules.adapters import default_lora_config, merged_adapters, tuner_layers
from unime_st.modules.checks import loading_note
from unime_st.modules.multimodal_encoder import MultimodalEncoder

logger = logging.getLogger(__name__)

STOCK_MODULE = f"{Transformer.__module__}.{Transformer.__name__}"
_OURS = f"{MultimodalEncoder.__module__}.{MultimodalEncoder.__name__}"
_MODEL_CONFIG = "config_sentence_transformers.json"


class _CardData(SentenceTransformerModelCardData):
    """Card data whose widget examples are drawn from stored texts alone.

    Stock code (6.2) fails on several data sets whose rows are made by a transform, as images opened lazily are.
    """

    def set_widget_examples(self, dataset: Any) -> None:
        """Draw examples from the data sets that have no transform."""
        named = {"dataset": dataset} if isinstance(dataset, Dataset) else dataset
        stored = {name: rows for name, rows in named.items() if _is_stored(rows)}
        if stored:
            super().set_widget_examples(DatasetDict(stored))


def _is_stored(rows: Any) -> bool:
    return isinstance(rows, Dataset) and rows.format["type"] != "custom"


class MultimodalSentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` whose saved form names stock modules only.

    Whatever is saved (``save_pretrained``, the Trainer's checkpoints, ``push_to_hub``) loads in plain
    ``SentenceTransformer(path)`` without this package and without ``trust_remote_code``.
    An architecture that transformers lacks (phi3_v) needs ``import unime_st`` before that; its card says so.
    """

    model_card_data_class = _CardData

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Save; see :meth:`sentence_transformers.SentenceTransformer.save`."""
        super().save(path, *args, **kwargs)
        listing = Path(path) / "modules.json"
        modules = json.loads(listing.read_text(encoding="utf-8"))
        for module in modules:
            if module["type"] == _OURS:
                module["type"] = STOCK_MODULE
        write_atomically(listing, json.dumps(modules, indent=2))
        _add_loading_note(Path(path) / "README.md", self)


def build_encoder(
    backbone: str | Path,
    *,
    prompt_template: str | None = None,
    max_pixels: int | None = None,
    max_seq_length: int | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    peft_config: PeftConfig | bool | None = None,
    prompts: Mapping[str, str] | None = None,
    allow_remote_images: bool = False,
    vision_cache_bytes: int = 2**28,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Make an embedder of a multimodal LLM: last token of the last layer, L2-normalised (UniME, 3.2).

    The language-modelling head is not loaded.

    Args:
        backbone: a Hub name or a folder of a transformers checkpoint.
        prompt_template: a name of :data:`unime_st.prompts.TURN_FORMATS` or a Jinja chat template; None takes the
            family's.
        max_pixels: bound on an image's pixels, for families that keep an image's own resolution (Qwen-VL).
        max_seq_length: tokens of an input at the most; longer texts lose their last tokens, never the instruction.
        torch_dtype: of the weights; "auto" keeps the checkpoint's.
        attn_implementation: of transformers, e.g. "sdpa" or "flash_attention_2".
        device: where to put the model; None chooses.
        peft_config: adapters to train; True takes :func:`default_lora_config`.
        prompts: named instructions, for ``encode(prompt_name=...)``.
        allow_remote_images: open images at ``http(s)`` addresses.
        vision_cache_bytes: memory, where the model is, for features of a frozen vision tower; enough for the images of
            one step saves GradCache's second pass. 0 keeps none.
        model_kwargs: more arguments of ``from_pretrained``, e.g. ``quantization_config``.
        processor_kwargs: more arguments of the processor.

    Raises:
        ValueError: weights are missing, the family has no template, or it takes no ``max_pixels``.
    """
    name = str(backbone)
    config = AutoConfig.from_pretrained(name)
    template = prompt_template or MultimodalEncoder.template_for(config)
    weights: dict[str, Any] = {"dtype": torch_dtype, **(model_kwargs or {})}
    if attn_implementation is not None:
        weights["attn_implementation"] = attn_implementation
    encoder = MultimodalEncoder(
        name,
        prompt_template=template,
        allow_remote_images=allow_remote_images,
        vision_cache_bytes=vision_cache_bytes,
        model_kwargs=weights,
        processor_kwargs=dict(processor_kwargs or {}),
        max_seq_length=max_seq_length,
    )
    if max_pixels is not None:
        _bound_pixels(encoder, max_pixels)
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="lasttoken")
    model = MultimodalSentenceTransformer(
        modules=[encoder, pooling, Normalize()], device=device, prompts=dict(prompts or {}), similarity_fn_name="cosine"
    )
    if peft_config:
        model.add_adapter(default_lora_config() if peft_config is True else peft_config)
        if not tuner_layers(encoder):
            raise ValueError(
                f"`peft_config` adapts no layer of {type(encoder.model).__name__}. Check its `target_modules`."
            )
    return model


def load_encoder(
    path: str | Path,
    *,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    allow_remote_images: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Load a saved encoder with our module in place of the stock one.

    Args:
        path: a folder, or a Hub name, of a saved encoder.
        torch_dtype: of the weights; "auto" keeps the checkpoint's.
        attn_implementation: of transformers.
        device: where to put the model; None chooses.
        allow_remote_images: open images at ``http(s)`` addresses.
        model_kwargs: more arguments of ``from_pretrained``.
        processor_kwargs: more arguments of the processor.

    Raises:
        FileNotFoundError: the folder holds no sentence-transformers checkpoint.
        ValueError: weights are missing, or an adapter was not loaded.
    """
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no modules.json, so it is no saved encoder. Make one of a backbone with `build_encoder`."
        )
    weights: dict[str, Any] = {"dtype": torch_dtype, **(model_kwargs or {})}
    if attn_implementation is not None:
        weights["attn_implementation"] = attn_implementation
    modules: list[nn.Module] = []
    for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        source = str(folder / entry["path"])
        if entry["type"].rpartition(".")[2] == Transformer.__name__:
            encoder = MultimodalEncoder.load(
                source,
                model_kwargs=weights,
                processor_kwargs=dict(processor_kwargs or {}),
                init_defaults={"allow_remote_images": allow_remote_images},
            )
            modules.append(encoder)
        else:
            modules.append(_stock_class(entry["type"]).load(source))
    settings = json.loads((folder / _MODEL_CONFIG).read_text(encoding="utf-8"))
    return MultimodalSentenceTransformer(
        modules=modules,
        device=device,
        prompts=settings.get("prompts"),
        default_prompt_name=settings.get("default_prompt_name"),
        similarity_fn_name=settings.get("similarity_fn_name"),
    )


def export_encoder(model: SentenceTransformer, path: str | Path, merge_adapters: bool = True) -> Path:
    """Write an encoder as a stock sentence-transformers folder; the model in memory stays as it is.

    The folder appears only when complete. An architecture that transformers lacks (phi3_v) loads in stock
    sentence-transformers only after ``import unime_st``; the folder's card says so.

    Args:
        model: the encoder.
        path: the folder to make.
        merge_adapters: merge LoRA weights into the backbone; False saves adapters alone, which then need the backbone.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and is no saved encoder.
    """
    target = Path(path)
    if target.exists() and any(target.iterdir()) and not (target / "modules.json").is_file():
        raise FileExistsError(f"{target} exists and holds something other than a saved encoder. Give another `path`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    replaced = scratch.with_name(f"{scratch.name}-replaced")
    try:
        with merged_adapters(model) if merge_adapters else nullcontext():
            model.save_pretrained(str(scratch))
        scratch.chmod(0o755)
        if target.exists():  # moved away whole: a kill while it is deleted must not leave half of it
            target.rename(replaced)
        scratch.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("Saved the encoder in %s", target)
    return target


def _add_loading_note(card: Path, model: SentenceTransformer) -> None:
    """Put the note of an architecture that transformers lacks above the text of a model card."""
    note = loading_note(model[0].model) if isinstance(model[0], MultimodalEncoder) else ""
    if not note or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    header, mark, body = text.partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    if note not in body:
        write_atomically(card, f"{header}{mark}\n{note}\n{body}")


def _stock_class(reference: str) -> Any:
    module, _, name = reference.rpartition(".")
    if not module.startswith("sentence_transformers."):
        raise ValueError(f"modules.json names {reference}, which is not part of sentence-transformers; refused.")
    return getattr(importlib.import_module(module), name)


def _bound_pixels(encoder: MultimodalEncoder, max_pixels: int) -> None:
    images: Any = getattr(encoder.processor, "image_processor", None)
    if not hasattr(images, "merge_size"):  # Qwen-VL's: its edges of `size` are numbers of pixels, not lengths
        raise ValueError(
            f"{type(images).__name__} takes no `max_pixels`: this family resizes images to sizes of its own. Pass "
            "`processor_kwargs` instead, e.g. a `size`."
        )
    images.size = {"shortest_edge": min(images.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
