"""LoRA for the language model, and merging it into the backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

_LINEAR_LAYERS = "q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj"
_LANGUAGE_MODELS = r"((.*\.)?(language_model|text_model)\.|(model\.)?)"  # Phi-3-Vision is its own language model
_LOADED = "_hf_peft_config_loaded"  # how transformers marks a model with adapters


def default_lora_config(
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    *,
    use_dora: bool = False,
) -> LoraConfig:
    """LoRA on all linear layers of the language model and nothing else (UniME, 3.2 and Table 6: rank 32, then 16).

    Args:
        rank: of the update.
        alpha: scale of the update times the rank; the paper gives none, None takes twice the rank.
        dropout: on the adapter's input.
        layers: indices of the decoder layers to adapt; None adapts all.
        use_dora: learn a magnitude for each output beside the low-rank direction (DoRA, arXiv 2402.09353).

    Example:
        >>> import re
        >>> config = default_lora_config(rank=8)
        >>> bool(re.fullmatch(config.target_modules, "model.language_model.layers.0.self_attn.q_proj"))
        True
        >>> bool(re.fullmatch(config.target_modules, "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"))
        False
    """
    chosen = r"\d+" if layers is None else "|".join(str(layer) for layer in layers)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        target_modules=rf"{_LANGUAGE_MODELS}layers\.({chosen})\.\w+\.({_LINEAR_LAYERS})",
    )


def tuner_layers(model: nn.Module) -> list[tuple[nn.Module, str, BaseTunerLayer]]:
    """(parent, name, layer) of every adapted layer."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer) and not isinstance(parent, BaseTunerLayer)
    ]


def merge_adapters(model: nn.Module) -> int:
    """Merge the active adapters of every layer into its weights, in place, and forget them.

    Args:
        model: a SentenceTransformer, an encoder module or a transformers model.

    Returns:
        How many layers were merged.
    """
    layers = tuner_layers(model)
    for parent, name, layer in layers:
        layer.merge(safe_merge=True)
        setattr(parent, name, layer.get_base_layer())
    if layers:
        for module in model.modules():
            if getattr(module, _LOADED, False):
                module.__dict__[_LOADED] = False  # transformers has no public way back
                if hasattr(module, "peft_config"):
                    del module.peft_config
    return len(layers)


def attach_adapter(model: PreTrainedModel, folder: Path) -> int:
    """Attach a saved adapter to a backbone whose modules may have other names than where it was trained.

    Adapters are usually trained on the model with its head, where the language model is ``model.language_model``, or
    ``language_model.model`` in older versions of transformers; an encoder has no head and calls it ``language_model``.

    Args:
        model: the backbone without a head, changed in place.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        How many layers were adapted.

    Raises:
        FileNotFoundError: there are no weights in safetensors.
        ValueError: some of its tensors have no place in the model, or do not fit: it belongs to another backbone.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds an adapter, but no adapter_model.safetensors. Convert its weights.")
    config = PeftConfig.from_pretrained(str(folder))
    linear = {name for name, module in model.named_modules() if name}
    placed: dict[str, Any] = {}
    homeless = []
    for key, value in load_file(file).items():
        path, mark, rest = adapter_tensor(key).partition(".lora_")
        owner = next((name for name in _renamed(path) if name in linear), None)
        if owner is None or not mark:
            homeless.append(key)
        else:
            placed[f"{owner}.lora_{rest}"] = value
    owners = {name.partition(".lora_")[0] for name in placed}
    homeless += [f"{name}.lora_A" for name in _targets(model, config) if name not in owners]
    if not homeless:
        config.target_modules = sorted(owners)
        model.add_adapter(config)
        own = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
        homeless = [name for name, value in placed.items() if name not in own or own[name].shape != value.shape]
        homeless += sorted(set(own) - set(placed))
    if homeless:
        raise ValueError(
            f"The adapter in {folder} does not fit {type(model).__name__}: {len(homeless)} tensors have no place, lack "
            f"or differ in shape ({', '.join(homeless[:4])}). It belongs to another backbone: that of its "
            f"adapter_config.json is {config.base_model_name_or_path!r}."
        )
    with torch.no_grad():
        for name, value in placed.items():
            own[name].copy_(value)
    return len(owners)


def _targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """Linear layers that an adapter's settings name, by any of their names; a file must hold them all."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    older = [(name, name.replace("language_model.", "language_model.model.", 1)) for name in linear]
    forms = {name: (name, f"model.{name}", old, f"model.{name.removeprefix('language_model.')}") for name, old in older}
    return [name for name in linear if any(check_target_module_exists(config, form) for form in forms[name])]


def adapter_tensor(key: str) -> str:
    """Name of a parameter, the adapter's own name left out, from its key in a file of peft's.

    >>> adapter_tensor("base_model.model.layers.0.mlp.up_proj.lora_magnitude_vector")
    'layers.0.mlp.up_proj.lora_magnitude_vector.weight'
    """
    name = key.removeprefix("base_model.model.")
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def _renamed(path: str) -> list[str]:
    """What a module of a model with a head may be called in the model without."""
    inner = path.removeprefix("model.")
    nested = path.replace("language_model.model.", "language_model.")
    return [path, inner, nested, f"language_model.{inner}", inner.replace(".vision_model.", ".")]


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model is as after :func:`merge_adapters`; afterwards it is exactly as before."""
    layers = tuner_layers(model)
    flags: list[tuple[nn.Module, Any]] = []
    try:
        for parent, name, layer in layers:
            merged = copy.deepcopy(layer)
            merged.merge(safe_merge=True)
            setattr(parent, name, merged.get_base_layer())
        for module in model.modules():
            if getattr(module, _LOADED, False):
                flags.append((module, module.__dict__.pop("peft_config", None)))
                module.__dict__[_LOADED] = False
        yield
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
        for module, config in flags:
            module.__dict__[_LOADED] = True
            if config is not None:
                module.peft_config = config
