"""What a model is, as a hash: the same embeddings can be expected exactly when it is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IDENTITY_VERSION = 3
"""Of what a fingerprint covers and of how this package prepares inputs: raise it when embeddings of one model change.

2: all of the tokenizer and the processors; images are turned, laid onto white and scaled by :mod:`unime_st.images`."""

# What a model was loaded from, by or for changes no embedding, nor does what only its training goes by.
_IGNORED = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "base_model_name_or_path", "revision", "_commit_hash"}
    | {"architectures", "dtype", "torch_dtype"}  # the weights say themselves
    | {"inference_mode", "auto_mapping", "peft_version", "init_lora_weights"}
    | {"target_modules"}  # saved by their names in full, which the weights have too
    | {"processor_class", "_processor_class", "auto_map"}
    | {"chat_template"}  # of a processor and its tokenizer one is used, see `_settings`
)
_TOKENIZER_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "model_input_names",
    "special_tokens_map",
    "_add_bos_token",
    "_add_eos_token",
)
_OF_NO_TOKEN = _IGNORED | {"init_kwargs", "init_inputs", "verbose", "deprecation_warnings", "files_loaded", "cache"}
_CHUNK_BYTES = 1 << 26
_MARK_DIGITS = 8


def model_fingerprint(model: nn.Module) -> str:
    """Hash the weights and settings that decide a model's embeddings.

    Covered: every weight of the state dict (names, dtypes, shapes, values), LoRA settings and the active adapters, the
    kind and settings of each module inside, all of the tokenizers but what they decode by, the processors of images,
    videos and sound (so the resolution), chat templates, ``truncate_dim`` and the text of the default prompt. Where the
    model was loaded from is not, nor what a call leaves behind: a copy of a checkpoint has the same fingerprint.

    Nothing is remembered between calls, so weights changed in any way are seen; the cost is one pass over the weights
    (about a second per gigabyte and thread). Hold the result while the model stays as it is.

    Args:
        model: A ``SentenceTransformer``, or any module.

    Returns:
        64 hexadecimal digits; the last of them tell :data:`IDENTITY_VERSION`, see :func:`is_outdated`.

    Raises:
        TypeError: If ``model`` is no ``torch.nn.Module``.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = model_fingerprint(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> before == model_fingerprint(layer)
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A {type(model).__name__} cannot be told apart from a changed copy of itself: a cache needs a "
            "torch.nn.Module such as a SentenceTransformer. Evaluate without a cache."
        )
    digest = hashlib.sha256()
    state = model.state_dict()
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
        for name, value in zip(weights, pool.map(_tensor_digest, weights.values()), strict=True):
            digest.update(f"{name}\0".encode())
            digest.update(value)
    others = {name: value for name, value in state.items() if name not in weights}
    for settings in (others, *_settings(model)):
        digest.update(json.dumps(_plain(settings), sort_keys=True).encode("utf-8", "surrogatepass"))
    told = digest.hexdigest()[:-_MARK_DIGITS]
    return told + _mark(told)


def named_or_fingerprint(model: Any, name: str | None, argument: str) -> str:
    """Identity of a model: the name given by an argument, else its fingerprint, which only a module has."""
    if not name and not isinstance(model, nn.Module):
        raise TypeError(f"A {type(model).__name__} has no weights to know it by. Give `{argument}`.")
    return name or model_fingerprint(model)


def is_outdated(fingerprint: Any) -> bool:
    """Whether this is a fingerprint by the rule of another version, which no model has any more.

    >>> is_outdated(model_fingerprint(torch.nn.Linear(2, 2))), is_outdated("0" * 64), is_outdated("a name")
    (False, True, False)
    """
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        return False
    return fingerprint[-_MARK_DIGITS:] != _mark(fingerprint[:-_MARK_DIGITS])


def explain_outdated(fingerprint: Any) -> str:
    """A sentence for errors about embeddings of a model with such a fingerprint; "" for one of this version.

    >>> explain_outdated("a name"), explain_outdated("0" * 64)[:35]
    ('', ' It was made by an earlier version ')
    """
    if not is_outdated(fingerprint):
        return ""
    return (
        " It was made by an earlier version of unime_st, which knew models by less and prepared some images otherwise "
        "(transparent, 16-bit and turned ones): even the same model's embeddings may differ, so they are not mixed."
    )


def _mark(told: str) -> str:
    return hashlib.sha256(f"identity {IDENTITY_VERSION} {told}".encode()).hexdigest()[:_MARK_DIGITS]


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    step = max(1, _CHUNK_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def _settings(model: nn.Module) -> Iterator[Any]:
    prompts = getattr(model, "prompts", None)
    named = prompts if isinstance(prompts, Mapping) else {}
    yield named.get(getattr(model, "default_prompt_name", None)) or ""
    yield getattr(model, "truncate_dim", None), getattr(model, "max_seq_length", None)
    seen: set[int] = set()  # the layers of a model share its config
    for name, module in model.named_modules():
        kind = type(module).__name__ if name else ""  # the whole may be a subclass that only counts, or logs
        yield name, kind, module.extra_repr()  # what has no weights, such as activations, too
        if hasattr(module, "get_config_dict"):
            yield module.get_config_dict()
        for part in ("processor", "tokenizer", "feature_extractor", "image_processor"):
            found = getattr(module, part, None)
            if found is not None and not isinstance(found, nn.Module) and id(found) not in seen:
                tokenizer = getattr(found, "tokenizer", None)
                seen |= {id(found), id(tokenizer)}
                template = getattr(found, "chat_template", None) or getattr(tokenizer, "chat_template", None)
                yield part, found, template
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config
        if isinstance(adapters := getattr(module, "peft_config", None), dict):
            yield adapters
        if isinstance(scaling := getattr(module, "scaling", None), dict):  # a LoRA layer
            yield scaling, _value(module, "active_adapters"), _value(module, "disable_adapters")


def _value(module: Any, name: str) -> Any:
    value = getattr(module, name, None)
    return value() if callable(value) else value


def _plain(value: Any, inside: tuple[int, ...] = ()) -> Any:  # noqa: PLR0911 one line a kind
    """Bring a setting into a form JSON can hold, the same in every process; ``inside`` is what it is part of."""
    if value is None or (isinstance(value, str | int | float | bool) and not isinstance(value, Enum)):
        return value
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, inside) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, inside) for item in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [_plain(item, inside) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value, inside)
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Tensor):
        return _tensor_digest(value).hex()
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, torch.dtype | re.Pattern):
        return str(value)
    return _plain_object(value, inside)


def _plain_object(value: Any, inside: tuple[int, ...]) -> Any:
    """The same for a tokenizer, a processor, a config or another object, with its class."""
    kind = type(value).__name__
    if hasattr(value, "serialized_model_proto"):  # sentencepiece
        return kind, hashlib.sha256(value.serialized_model_proto()).hexdigest()
    if hasattr(value, "to_str") and hasattr(value, "pre_tokenizer"):  # of the package tokenizers
        return _plain([_pipeline(value), value.truncation, value.padding], inside)
    if hasattr(value, "get_vocab") and hasattr(value, "special_tokens_map"):  # of transformers
        told = {name: getattr(value, name, None) for name in _TOKENIZER_SETTINGS}
        backend = getattr(value, "backend_tokenizer", None)
        if backend is not None:  # each call sets how it cuts and pads
            return _plain([told, _pipeline(backend)], inside)
        flags = {number: repr(token) for number, token in value.added_tokens_decoder.items()}
        own = {name: part for name, part in vars(value).items() if name not in _OF_NO_TOKEN and "file" not in name}
        return [kind, _plain([told, flags, value.get_vocab(), own], inside)]
    if isinstance(value, nn.Module | type) or inspect.isroutine(value):
        return getattr(value, "__qualname__", kind)
    held = getattr(value, "__dict__", {})
    if "tokenizer" not in held and hasattr(value, "to_dict"):  # a processor's would leave the tokenizer out
        held = value.to_dict()
    return [kind, {name: _plain(item, inside) for name, item in _deciding(held).items()}]


def _pipeline(tokenizer: Any) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, vocabulary, merges, added tokens and post-processor of a fast tokenizer."""
    parts = ("normalizer", "pre_tokenizer", "model", "post_processor")
    states = {name: _state(getattr(tokenizer, name)) for name in parts}
    added = {number: repr(token) for number, token in tokenizer.get_added_tokens_decoder().items()}
    return {**states, "added": added, "encode_special_tokens": tokenizer.encode_special_tokens}


def _state(part: Any) -> bytes:
    """What a part of a fast tokenizer gives to be sent to another process: JSON, which is too long to parse here."""
    try:
        return pickle.dumps(part)
    except Exception:  # noqa: BLE001 the library's own, of no class: a part written in Python, of which no more is told
        return type(part).__qualname__.encode()


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that change no embedding, at any depth."""
    return {
        name: _deciding(item) if isinstance(item, Mapping) else item
        for name, item in settings.items()
        if name not in _IGNORED
    }
