"""LoRA for the language model, and merging it into the backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_LINEAR_LAYERS = "q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj"
_LANGUAGE_MODELS = r"((.*\.)?(language_model|text_model)\.|(model\.)?)"  # Phi-3-Vision is its own language model
_LOADED = "_hf_peft_config_loaded"  # how transformers marks a model with adapters


def default_lora_config(
    rank: int = 16, alpha: int | None = None, dropout: float = 0.0, layers: Sequence[int] | None = None
) -> LoraConfig:
    """LoRA on all linear layers of the language model and nothing else (UniME, 3.2 and Table 6: rank 32, then 16).

    Args:
        rank: of the update.
        alpha: scale of the update times the rank; the paper gives none, None takes twice the rank.
        dropout: on the adapter's input.
        layers: indices of the decoder layers to adapt; None adapts all.

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
