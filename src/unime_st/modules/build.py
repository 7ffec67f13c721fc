"""Making an encoder of a multimodal LLM, loading one, and exporting it as a stock checkpoint."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, prepare_model_for_kbit_training
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import AutoConfig

from unime_st.arguments import require_number
from unime_st.folders import new_folder, recover
from unime_st.modules.adapters import (
    attach_adapter,
    check_adapted,
    check_config,
    default_lora_config,
    merged_adapters,
)
from unime_st.modules.card_data import EncoderCardData, rows_hidden
from unime_st.modules.checks import check_family
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.modules.sentence_transformer import MultimodalSentenceTransformer
from unime_st.prompts import lacks_generation_prompt, with_generation_prompt
from unime_st.published import PUBLISHED, published_checkpoint

logger = logging.getLogger(__name__)

_MODEL_CONFIG = "config_sentence_transformers.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
        torch_dtype: of the weights; "auto" keeps the checkpoint's.
        attn_implementation: of transformers, e.g. "sdpa" or "flash_attention_2".
        device: where to put the model; None chooses.
        peft_config: adapters to train; True takes :func:`default_lora_config`.
        truncate_dim: keep that many numbers of each embedding, the first ones (Matryoshka). As in stock code this comes
            after normalisation: give ``encode`` ``normalize_embeddings=True`` for dot products.
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
        ValueError: weights are missing, the family has no template, it takes no ``max_pixels``, a size is not positive,
            or the adapters would not load again. Code in a checkpoint is refused, never asked about.
    """
    _check_sizes(max_pixels=max_pixels, max_seq_length=max_seq_length, truncate_dim=truncate_dim)
    require_number("vision_cache_bytes", vision_cache_bytes, least=0)
    _check_prompts(prompts)
    _check_device(device)
    _check_dtype(torch_dtype)
    if prompt_template is not None and not isinstance(prompt_template, str):
        raise TypeError(
            f"`prompt_template={prompt_template!r}`, but it must be a name or a Jinja chat template, or None."
        )
    if isinstance(peft_config, PeftConfig):
        check_config(peft_config)
    elif peft_config is not None and not isinstance(peft_config, bool):
        raise TypeError(f"`peft_config={peft_config!r}`, but it must be a `peft.PeftConfig`, True, or None.")
    name, adapter = str(backbone), Path(backbone)
    if (adapter / "adapter_config.json").is_file():
        name = str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    trusted = bool((model_kwargs or {}).get("trust_remote_code", False))
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    template = _opened(prompt_template or MultimodalEncoder.template_for(config), add_generation_prompt)
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
        modules=[encoder, pooling, Normalize()],
        device=device,
        prompts=dict(prompts or {}),
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
    )
    if peft_config:
        if getattr(encoder.model, "is_quantized", False):  # QLoRA
            prepare_model_for_kbit_training(encoder.model, use_gradient_checkpointing=False)  # the Trainer's to switch
        model.add_adapter(default_lora_config() if peft_config is True else peft_config)
        check_adapted(encoder.model)
    return model


def load_encoder(
    path: str | Path,
    *,
    published: str | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    truncate_dim: int | None = None,
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
        truncate_dim: as in :func:`build_encoder`; it is not saved, as in stock code.
        allow_remote_images: open images at ``http(s)`` addresses; a checkpoint's own settings never allow it.
        text_only: as in :func:`build_encoder`.
        model_kwargs: more arguments of ``from_pretrained``.
        processor_kwargs: more arguments of the processor.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no sentence-transformers checkpoint and no published
            model is named.
        ValueError: weights are missing, a file is damaged, an adapter was not loaded, or the folder holds another model
            than `published`.
    """
    _check_sizes(truncate_dim=truncate_dim)
    _check_device(device)
    _check_dtype(torch_dtype)
    folder = _folder_of(path)
    if not (folder / "modules.json").is_file():
        if published is None and str(path) not in PUBLISHED:
            raise FileNotFoundError(
                f"{folder} has no modules.json, so it is no saved encoder. Make one of a backbone with "
                "`build_encoder`, or, if it is a copy of a published UniME model, say of which with `published`."
            )
        known = published_checkpoint(published or str(path))
        model = build_encoder(
            folder,
            prompt_template=known.prompts,
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            device=device,
            truncate_dim=truncate_dim,
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
    for kind, source in _listed_modules(folder):
        if kind.rpartition(".")[2] == Transformer.__name__:
            with _damage_named(source):
                encoder = MultimodalEncoder.load(
                    source,
                    model_kwargs=weights,
                    processor_kwargs=dict(processor_kwargs or {}),
                    init_defaults={"allow_remote_images": allow_remote_images, "text_only": text_only},
                )
            modules.append(encoder)
        else:
            modules.append(_stock_class(kind).load(source))
    settings = _read_json(folder / _MODEL_CONFIG, dict) if (folder / _MODEL_CONFIG).is_file() else {}
    return MultimodalSentenceTransformer(
        modules=modules,
        device=device,
        prompts=settings.get("prompts"),
        default_prompt_name=settings.get("default_prompt_name"),
        similarity_fn_name=settings.get("similarity_fn_name"),
        truncate_dim=truncate_dim,
    )


def export_encoder(
    model: SentenceTransformer, path: str | Path, merge_adapters: bool = True, *, widget_images: bool | None = None
) -> Path:
    """Write an encoder as a stock sentence-transformers folder; the model in memory stays as it is.

    The folder appears only when complete; one that it replaces is there until then. An architecture that transformers
    lacks (phi3_v) loads in stock sentence-transformers only after ``import unime_st``; the folder's card says so.

    Args:
        model: the encoder.
        path: the folder to make.
        merge_adapters: merge LoRA weights into the backbone; False saves adapters alone, which then need the backbone.
        widget_images: show rows of the training set, images (copied into ``assets/``) and texts, in the card, as stock
            code does. None follows ``model.model_card_data.widget_images``, which is False at first.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and is no saved encoder.
    """
    if not isinstance(model, SentenceTransformer):
        raise TypeError(f"`model` is a {type(model).__name__}, but an encoder of `build_encoder` is needed.")
    target = Path(path)
    if target.exists() and any(target.iterdir()) and not (target / "modules.json").is_file():
        raise FileExistsError(f"{target} exists and holds something other than a saved encoder. Give another `path`.")
    shown = _card_shows_rows(model, widget_images)
    with shown, new_folder(target) as scratch, merged_adapters(model) if merge_adapters else nullcontext():
        model.save_pretrained(str(scratch))
    logger.info("Saved the encoder in %s", target)
    return target


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


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"`{name}={size!r}`, but it must be a whole number of at least 1, or None for no limit.")


def _check_prompts(prompts: Mapping[str, str] | None) -> None:
    if prompts is not None and not isinstance(prompts, Mapping):
        raise TypeError(f"`prompts={prompts!r}`, but they must be a mapping of names to instructions, or None.")
    for name, prompt in (prompts or {}).items():
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise TypeError(f"`prompts` has {name!r}: {prompt!r}, but names and prompts are strings.")


def _check_device(device: str | None) -> None:
    try:
        torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device={device!r}` is no device of torch, such as 'cpu' or 'cuda:0': {error}") from error


def _check_dtype(dtype: Any) -> None:
    known = dtype == "auto" if isinstance(dtype, str) else isinstance(dtype, torch.dtype)
    if not known and not (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)):
        raise ValueError(
            f"`torch_dtype={dtype!r}`, but it must be 'auto', a type of torch such as 'bfloat16', or its name."
        )


def _folder_of(path: str | Path) -> Path:
    """The folder of a path, or of a name on the Hub."""
    if str(path) == "":
        raise ValueError("`path` is empty; give a folder or a name on the Hub.")
    given = Path(path)
    recover(given)
    if given.is_dir():
        return given
    text = str(path)
    is_name = isinstance(path, str) and _HUB_NAME.fullmatch(text) and not text.endswith(".")
    beside = given.parent if given.parent.is_dir() else None
    near = difflib.get_close_matches(given.name, [entry.name for entry in beside.iterdir()] if beside else [], n=3)
    if not is_name or near:
        hint = f" Beside it there is {', '.join(near)}." if near else ""
        raise FileNotFoundError(f"There is no folder {text!r}.{hint} Check the path, or give a name on the Hub.")
    return Path(snapshot_download(text))


def _read_json(file: Path, kind: type) -> Any:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Restore it from where the encoder was saved.") from error
    if not isinstance(found, kind):
        raise ValueError(f"{file} is damaged: it holds a {type(found).__name__}. Restore it.")  # noqa: TRY004 (of a file)
    return found


def _listed_modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of each module of a saved encoder."""
    file = folder / "modules.json"
    listed = _read_json(file, list)
    for entry in listed:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("type", "path")):
            raise ValueError(f"{file} is damaged: {entry!r} lacks the `type` and `path` of a module. Restore it.")
        if not (folder / entry["path"]).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{file} names the module folder {entry['path']!r}, which lies outside of {folder}; refused."
            )
    return [(entry["type"], str(folder / entry["path"])) for entry in listed]


@contextmanager
def _damage_named(source: str) -> Iterator[None]:
    """Within this context, what libraries say of a damaged file is said of the folder too."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A file of the encoder in {source} is damaged or cut short ({type(error).__name__}: {error}). Restore its "
            "weights and settings from where it was saved, or export it again."
        ) from error


@contextmanager
def _card_shows_rows(model: SentenceTransformer, asked: bool | None) -> Iterator[None]:
    """Within this context the model's card shows rows of data sets if that is asked for, and else does not."""
    card: Any = model.model_card_data
    before = getattr(card, "widget_images", False)
    wanted = before if asked is None else asked
    if not isinstance(card, EncoderCardData):  # stock card data always show them
        with nullcontext() if wanted else rows_hidden(card):
            yield
        return
    card.widget_images = wanted
    try:
        yield
    finally:
        card.widget_images = before


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
