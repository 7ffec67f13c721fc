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
from huggingface_hub import snapshot_download
from peft import PeftConfig, prepare_model_for_kbit_training
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import AutoConfig

from unime_st.modules.adapters import attach_adapter, default_lora_config, merged_adapters, tuner_layers
from unime_st.modules.checks import check_family
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.modules.sentence_transformer import MultimodalSentenceTransformer
from unime_st.published import PUBLISHED, published_checkpoint

logger = logging.getLogger(__name__)

_MODEL_CONFIG = "config_sentence_transformers.json"


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
    text_only: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Make an embedder of a multimodal LLM: last token of the last layer, L2-normalised (UniME, 3.2).

    The language-modelling head is not loaded.

    Args:
        backbone: a Hub name or a folder of a transformers checkpoint; a folder with an adapter alone is attached to the
            backbone that its ``adapter_config.json`` names.
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
        text_only: leave the vision tower and projector out of memory, for training on texts alone; what is exported is
            complete all the same, the missing weights being read from the backbone's files.
        model_kwargs: more arguments of ``from_pretrained``. With ``quantization_config``, as QLoRA has it, the frozen
            weights are prepared as peft asks; that takes bitsandbytes and a GPU, on which it has not been run. Merging
            adapters into 4-bit weights rounds them: save those alone, and merge into the backbone at full precision.
        processor_kwargs: more arguments of the processor.

    Raises:
        ValueError: weights are missing, the family has no template, or it takes no ``max_pixels``.
    """
    name, adapter = str(backbone), Path(backbone)
    if (adapter / "adapter_config.json").is_file():
        name = str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
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
        text_only=text_only,
        model_kwargs=weights,
        processor_kwargs=dict(processor_kwargs or {}),
        max_seq_length=max_seq_length,
    )
    if name != str(backbone):
        attach_adapter(encoder.model, adapter)
    if max_pixels is not None:
        _bound_pixels(encoder, max_pixels)
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="lasttoken")
    model = MultimodalSentenceTransformer(
        modules=[encoder, pooling, Normalize()], device=device, prompts=dict(prompts or {}), similarity_fn_name="cosine"
    )
    if peft_config:
        if getattr(encoder.model, "is_quantized", False):  # QLoRA
            prepare_model_for_kbit_training(encoder.model, use_gradient_checkpointing=False)  # the Trainer's to switch
        model.add_adapter(default_lora_config() if peft_config is True else peft_config)
        if not tuner_layers(encoder):
            raise ValueError(
                f"`peft_config` adapts no layer of {type(encoder.model).__name__}. Check its `target_modules`."
            )
    return model


def load_encoder(
    path: str | Path,
    *,
    published: str | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    allow_remote_images: bool = False,
    text_only: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Load a saved encoder with our module in place of the stock one, or a published UniME model.

    Args:
        path: a folder, or a Hub name, of a saved encoder; or of a model of :data:`unime_st.published.PUBLISHED`, which
            is a plain transformers repository.
        published: the Hub name of the published model that the folder is a copy of.
        torch_dtype: of the weights; "auto" keeps the checkpoint's.
        attn_implementation: of transformers.
        device: where to put the model; None chooses.
        allow_remote_images: open images at ``http(s)`` addresses.
        text_only: as in :func:`build_encoder`.
        model_kwargs: more arguments of ``from_pretrained``.
        processor_kwargs: more arguments of the processor.

    Raises:
        FileNotFoundError: the folder holds no sentence-transformers checkpoint, and no published model is named.
        ValueError: weights are missing, an adapter was not loaded, or the folder holds another model than
            `published`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))
    if not (folder / "modules.json").is_file():
        if published is None and str(path) not in PUBLISHED:
            raise FileNotFoundError(
                f"{folder} has no modules.json, so it is no saved encoder. Make one of a backbone with "
                "`build_encoder`, or, if it is a copy of a published UniME model, say of which with `published`."
            )
        known = published_checkpoint(published or str(path))
        model = build_encoder(
            folder,
            prompt_template=known.family,
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            device=device,
            allow_remote_images=allow_remote_images,
            text_only=text_only,
            model_kwargs=model_kwargs,
            processor_kwargs=processor_kwargs,
        )
        backbone: Any = model[0].model
        check_family(backbone, known)
        return model
    if published is not None:
        raise ValueError(f"{folder} is a saved encoder, which knows its prompts. Leave `published` out.")
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
                init_defaults={"allow_remote_images": allow_remote_images, "text_only": text_only},
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
