"""Building an encoder of a multimodal LLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, prepare_model_for_kbit_training
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig

from unime_st.arguments import require_instructions, require_number
from unime_st.modules.adapters import attach_adapter, check_adapted, check_config, default_lora_config
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.modules.options import check_device, check_dtype, check_sizes, weight_options
from unime_st.modules.sentence_transformer import MultimodalSentenceTransformer
from unime_st.prompts import lacks_generation_prompt, with_generation_prompt
from unime_st.videos import VideoSettings

logger = logging.getLogger(__name__)


def build_encoder(
    backbone: str | Path,
    *,
    prompt_template: str | None = None,
    add_generation_prompt: bool | None = None,
    max_pixels: int | None = None,
    max_seq_length: int | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    peft_config: PeftConfig | bool | None = None,
    truncate_dim: int | None = None,
    prompts: Mapping[str, str] | None = None,
    allow_remote_images: bool = False,
    videos: VideoSettings | None = None,
    late_media: int | None = None,
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
        prompt_template: a name of :data:`unime_st.prompts.TURN_FORMATS` or ``PUBLISHED_FORMATS``, or a Jinja chat
            template; None takes the family's.
        add_generation_prompt: let a Jinja template of your own open the model's turn at the end, which chat templates
            do only on that argument; it is written into the template and so saved. False leaves it out, None too, with
            a warning. The named templates end where the model would answer in any case.
        max_pixels: bound on an image's pixels, for families that keep an image's own resolution (Qwen-VL).
        max_seq_length: tokens of an input at the most; longer texts lose their last tokens, never the instruction.
        torch_dtype: type of the weights; "auto" keeps the checkpoint's.
        attn_implementation: attention of transformers, e.g. "sdpa" or "flash_attention_2".
        device: where to put the model; None chooses.
        peft_config: adapters to train; True takes :func:`default_lora_config`.
        truncate_dim: keep that many numbers of each embedding, the first ones (Matryoshka). As in stock code this comes
            after normalisation: give ``encode`` ``normalize_embeddings=True`` for dot products.
        prompts: named instructions, for ``encode(prompt_name=...)``.
        allow_remote_images: open images at ``http(s)`` addresses.
        videos: which frames of a video are shown and how large, a :class:`~unime_st.videos.VideoSettings`; None takes
            its defaults. It is saved.
        late_media: open and process the media of a batch for training mini-batch by mini-batch, in a loss with
            GradCache, so that memory does not grow with the batch; the number is of mini-batches that a thread prepares
            ahead: 1 or 2 beside a GPU, 0 on the CPU, which it would take cores from. None processes a whole batch in
            the data collator, which its workers do faster. Loss and gradients are the same. Have the data leave its
            images closed too: ``late_images=True`` of :func:`~unime_st.data.with_images` and the loaders.
        vision_cache_bytes: memory, where the model is, for features of a frozen vision tower; enough for the images of
            one step saves GradCache's second pass. 0 keeps none.
        text_only: leave the vision tower and projector out of memory, for training on texts alone; what is exported is
            complete all the same, the missing weights being read from the backbone's files.
        model_kwargs: more arguments of ``from_pretrained``. With ``quantization_config``, as QLoRA has it, the frozen
            weights are prepared as peft asks; that takes bitsandbytes and a GPU, on which it has not been run. Merging
            adapters into 4-bit weights rounds them: save those alone, and merge into the backbone at full precision.
        processor_kwargs: more arguments of the processor.

    Raises:
        ValueError: weights are missing, the family has no template, it takes no ``max_pixels``, a size is not positive,
            or the adapters would not load again. Code in a checkpoint is refused, never asked about.
    """
    check_sizes(max_pixels=max_pixels, max_seq_length=max_seq_length, truncate_dim=truncate_dim)
    require_number("vision_cache_bytes", vision_cache_bytes, least=0)
    require_instructions("prompts", prompts)
    check_device(device)
    check_dtype(torch_dtype)
    _check_template(prompt_template)
    check_adapters(peft_config)
    name = _backbone_name(backbone)
    trusted = bool((model_kwargs or {}).get("trust_remote_code", False))
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    encoder = MultimodalEncoder(
        name,
        prompt_template=_opened(prompt_template or MultimodalEncoder.template_for(config), add_generation_prompt),
        allow_remote_images=allow_remote_images,
        videos=videos,
        late_media=late_media,
        vision_cache_bytes=vision_cache_bytes,
        text_only=text_only,
        model_kwargs=weight_options(torch_dtype, attn_implementation, model_kwargs),
        processor_kwargs=dict(processor_kwargs or {}),
        max_seq_length=max_seq_length,
    )
    if name != str(backbone):
        attach_adapter(encoder.model, Path(backbone))
    if max_pixels is not None:
        bound_pixels(encoder, max_pixels)
    model = MultimodalSentenceTransformer(
        modules=[encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()],
        device=device,
        prompts=dict(prompts or {}),
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
    )
    if peft_config:
        add_adapters(model, default_lora_config() if peft_config is True else peft_config)
    return model


def _check_template(template: str | None) -> None:
    if template is not None and not isinstance(template, str):
        raise TypeError(f"`prompt_template={template!r}`, but it must be a name or a Jinja chat template, or None.")


def check_adapters(config: PeftConfig | bool | None) -> None:
    """Refuse what is no setting of adapters."""
    if isinstance(config, PeftConfig):
        check_config(config)
    elif config is not None and not isinstance(config, bool):
        raise TypeError(f"`peft_config={config!r}`, but it must be a `peft.PeftConfig`, True, or None.")


def _backbone_name(backbone: str | Path) -> str:
    """The backbone itself, or the one that an adapter's folder names."""
    if (Path(backbone) / "adapter_config.json").is_file():
        return str(PeftConfig.from_pretrained(str(backbone)).base_model_name_or_path)
    return str(backbone)


def add_adapters(model: SentenceTransformer, config: PeftConfig) -> None:
    """Add adapters to train; frozen weights that are quantised (QLoRA) are prepared first."""
    backbone: Any = model[0].model
    if getattr(backbone, "is_quantized", False):
        prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)  # the Trainer's to switch
    model.add_adapter(config)
    check_adapted(backbone)


def _opened(template: str, asked: bool | None) -> str:
    """A prompt template, or its name, that opens the model's turn if that is asked for."""
    if "{" not in template:  # a name
        return template
    if asked and lacks_generation_prompt(template):
        return with_generation_prompt(template)
    if asked is None and lacks_generation_prompt(template):
        logger.warning(
            "The prompt template opens the model's turn only on `add_generation_prompt`, so inputs end before it. Pass "
            "`add_generation_prompt=True` to `build_encoder` to have it, or False if it is not wanted."
        )
    return template


def bound_pixels(encoder: MultimodalEncoder, max_pixels: int) -> None:
    """Bound the pixels of images, in families that keep their own resolution."""
    images: Any = getattr(encoder.processor, "image_processor", None)
    if not hasattr(images, "merge_size"):  # Qwen-VL's: its edges of `size` are numbers of pixels, not lengths
        raise ValueError(
            f"{type(images).__name__} takes no `max_pixels`: this family resizes images to sizes of its own. Pass "
            "`processor_kwargs` instead, e.g. a `size`."
        )
    images.size = {"shortest_edge": min(images.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
