"""What a model is, as a hash: the same embeddings can be expected exactly when it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

# What a model was loaded from or by changes no embedding.
_IGNORED = frozenset({"_name_or_path", "name_or_path", "transformers_version", "base_model_name_or_path", "revision"})
_CHUNK_BYTES = 1 << 26


def model_fingerprint(model: nn.Module) -> str:
    """Hash the weights and settings that decide a model's embeddings.

    Covered: every weight of the state dict (names, dtypes, shapes, values), LoRA settings and the active adapters, the
    settings of each module, the processor's image settings (so the resolution), chat template and vocabulary, and
    ``truncate_dim``. Where the model was loaded from is not: a copy of a checkpoint has the same fingerprint.

    Nothing is remembered between calls, so weights changed in any way are seen; the cost is one pass over the weights
    (about a second per gigabyte and thread). Hold the result while the model stays as it is.

    Args:
        model: A ``SentenceTransformer``, or any module.

    Returns:
        64 hexadecimal digits.

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
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
        for name, value in zip(weights, pool.map(_tensor_digest, weights.values()), strict=True):
            digest.update(f"{name}\0".encode())
            digest.update(value)
    for settings in _settings(model):
        digest.update(json.dumps(_plain(settings), sort_keys=True).encode())
    return digest.hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    step = max(1, _CHUNK_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def _settings(model: nn.Module) -> Iterator[Any]:
    yield getattr(model, "truncate_dim", None)
    seen: set[int] = set()  # the layers of a model share its config
    for name, module in model.named_modules():
        if hasattr(module, "get_config_dict"):
            yield name, type(module).__name__, module.get_config_dict()
        if hasattr(module, "processor"):
            yield name, list(_processor_settings(module.processor))
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield name, config.to_dict()
        if isinstance(adapters := getattr(module, "peft_config", None), dict):
            yield name, {key: config.to_dict() for key, config in adapters.items()}
        if isinstance(scaling := getattr(module, "scaling", None), dict):  # a LoRA layer
            yield name, scaling, _value(module, "active_adapters"), _value(module, "disable_adapters")


def _processor_settings(processor: Any) -> Iterator[Any]:
    """Templates, image sizes and vocabulary of a processor or a lone tokenizer; state left by a call is left out."""
    yield getattr(processor, "chat_template", None)
    image_processor: Any = getattr(processor, "image_processor", None)
    if hasattr(image_processor, "to_dict"):
        yield image_processor.to_dict()
    tokenizer = getattr(processor, "tokenizer", processor)
    if hasattr(tokenizer, "get_vocab"):
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        yield hashlib.sha256(vocabulary).hexdigest(), tokenizer.chat_template, tokenizer.model_max_length


def _value(module: Any, name: str) -> Any:
    value = getattr(module, name, None)
    return value() if callable(value) else value


def _plain(value: Any) -> Any:
    """Bring settings into a form JSON can hold, the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _IGNORED}
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "value", None) or type(value).__name__
