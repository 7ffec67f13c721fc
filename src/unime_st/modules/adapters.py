"""LoRA for the language model, and merging it into the backbone."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper, get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

_LINEAR_LAYERS = "q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj"
_LANGUAGE_MODELS = r"((.*\.)?(language_model|text_model)\.|(model\.)?)"  # Phi-3-Vision is its own language model
_LOADED = "_hf_peft_config_loaded"  # how transformers marks a model with adapters
_HEADS = ("lm_head.", "model.lm_head.", "language_model.lm_head.", "model.language_model.lm_head.")
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_CHANGE_THE_BACKBONE = ("corda", "loftq", "lora_ga", "mica", "olora", "pissa")


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
        rank: rank of the update.
        alpha: scale of the update times the rank; None takes twice the rank, for the paper gives no number.
        dropout: dropout on the adapter's input.
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


def check_config(config: PeftConfig) -> None:
    """Refuse adapters that would train, and then not load, resume or merge as they were."""
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"`peft_config` is a {type(config).__name__}, but encoders take LoRA alone (DoRA and rank stabilisation "
            "among it): others do not merge into every family. Give a `LoraConfig`, e.g. `default_lora_config()`."
        )
    if config.bias != "none":
        raise ValueError(
            f"`bias={config.bias!r}` of the LoRA settings trains biases of the backbone, whose names in a file are not "
            'those in the model, so they would not load again. Use `bias="none"`.'
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BACKBONE):
        raise ValueError(
            f"`init_lora_weights={start!r}` changes the backbone's own weights, so the adapter would be wrong on the "
            'backbone it is loaded onto. Use True, "gaussian" or "eva".'
        )
    for option in ("layer_replication", "target_parameters", "alora_invocation_tokens", "megatron_config"):
        if getattr(config, option, None):
            raise ValueError(f"`{option}` of the LoRA settings is not supported by encoders. Leave it out.")


def tuner_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Find every adapted layer, and every module or embedding that is trained beside them, as (parent, name, layer)."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, _WRAPPERS) and not isinstance(parent, _WRAPPERS)
    ]


def check_adapted(model: nn.Module) -> None:
    """Refuse a model whose adapters sit where they would be lost, or nowhere."""
    layers = tuner_layers(model)
    if not layers:
        raise ValueError(f"`peft_config` adapts no layer of {type(model).__name__}. Check its `target_modules`.")
    for _, name, layer in layers:
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Embedding):
            raise ValueError(  # noqa: TRY004 (of the settings)
                f"`peft_config` adapts the embedding {name!r}, which peft then saves whole under a name that does not "
                "load again. Take it out of `target_modules`; to train new tokens, name them in "
                "`trainable_token_indices`, to train all, name it in `modules_to_save`."
            )


def _without_adapter(layer: nn.Module) -> nn.Module:
    """The plain layer that does what an adapted one does; its weights are changed in place."""
    if isinstance(layer, ModulesToSaveWrapper):
        if layer.disable_adapters or not layer.active_adapters:
            return layer.original_module
        return layer.modules_to_save[layer.active_adapters[0]]
    tuner: Any = layer.token_adapter if isinstance(layer, TrainableTokensWrapper) else layer
    tuner.merge(safe_merge=True)
    return tuner.get_base_layer()


def merge_adapters(model: nn.Module) -> int:
    """Merge the active adapters of every layer into its weights, in place, and forget them.

    Args:
        model: a SentenceTransformer, an encoder module or a transformers model.

    Returns:
        How many layers were merged.
    """
    layers = tuner_layers(model)
    for parent, name, layer in layers:
        setattr(parent, name, _without_adapter(layer))
    if layers:
        for module in model.modules():
            if getattr(module, _LOADED, False):
                module.__dict__[_LOADED] = False  # transformers has no public way back
                if hasattr(module, "peft_config"):
                    del module.peft_config
    return len(layers)


def attach_adapter(model: PreTrainedModel, folder: Path) -> int:
    """Attach a saved adapter to a backbone without a head, in place, and count the layers that it adapts.

    Adapters are usually trained on the model with its head, which calls the language model by another name.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds an adapter, but no adapter_model.safetensors. Convert its weights.")
    config = PeftConfig.from_pretrained(str(folder))
    check_config(config)
    stored = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    stored = {key: value for key, value in stored.items() if not key.startswith(_HEADS)}  # an encoder has none
    modules = {name for name, _ in model.named_modules() if name}
    placed: dict[str, Tensor] = {}
    owners: dict[str, str] = {}  # name in the model -> name in the file
    saved: list[str] = []
    homeless = []
    for key, value in stored.items():
        path, rest = _owner(key)
        owner = next((name for name in renamed(path) if name in modules), None)
        if owner is None:
            homeless.append(key)
            continue
        placed[f"{owner}.{rest}"] = value
        if "lora_" in rest:
            owners[owner] = path
        elif _is_saved(path, config):
            saved.append(owner)
    homeless += [f"{name}.lora_A" for name in _targets(model, config) if name not in owners]
    if not homeless:
        model.add_adapter(_for_these_names(config, owners, saved))
        own = adapter_state(model)
        homeless = [name for name, value in placed.items() if name not in own or own[name].shape != value.shape]
        homeless += sorted(set(own) - set(placed))
    if homeless:
        raise ValueError(
            f"The adapter in {folder} does not fit {type(model).__name__}: {len(homeless)} tensors have no place, lack "
            f"or differ in shape ({', '.join(homeless[:4])}). It belongs to another backbone: that of its "
            f"adapter_config.json is {config.base_model_name_or_path!r}."
        )
    set_peft_model_state_dict(model, placed)
    return len(owners)


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model's adapter, under the names they have in its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on embeddings, which it saves only when they are adapted
        return dict(get_peft_model_state_dict(model, adapter_name=model.active_adapters()[0]))


def _owner(key: str) -> tuple[str, str]:
    """The module that a stored tensor belongs to, and the rest of its name.

    >>> _owner("layers.0.q_proj.lora_A.weight"), _owner("norm.weight"), _owner("embed.token_adapter.trainable_tokens")
    (('layers.0.q_proj', 'lora_A.weight'), ('norm', 'weight'), ('embed', 'token_adapter.trainable_tokens'))
    """
    for mark in (".lora_", ".token_adapter."):
        path, found, rest = key.partition(mark)
        if found:
            return path, f"{mark[1:]}{rest}"
    path, _, rest = key.rpartition(".")
    return path, rest


def _is_saved(path: str, config: LoraConfig) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in config.modules_to_save or ())


def _for_these_names(config: LoraConfig, owners: Mapping[str, str], saved: Sequence[str]) -> LoraConfig:
    """Settings by the names of this model's modules, made of settings by the names that they had in training."""
    config = copy.copy(config)
    for option in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, option) or {}
        keys = {name: get_pattern_key(list(given), path) for name, path in owners.items()}
        named = {f"^{re.escape(name)}": given[key] for name, key in keys.items() if key in given}
        setattr(config, option, named)
    config.target_modules = sorted(owners)
    config.modules_to_save = sorted(set(saved)) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """Linear layers that an adapter's settings name, by any of their names; a file must hold them all."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    older = [(name, name.replace("language_model.", "language_model.model.", 1)) for name in linear]
    forms = {name: (name, f"model.{name}", old, f"model.{name.removeprefix('language_model.')}") for name, old in older}
    return [name for name in linear if any(check_target_module_exists(config, form) for form in forms[name])]


def renamed(path: str) -> list[str]:
    """Names that a module of a model with a head may have in the model without."""
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
            setattr(parent, name, _without_adapter(copy.deepcopy(layer)))
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


def check_merged(folder: Path) -> None:
    """Refuse weights under an adapter's names, as stock classes save what they loaded with one: none would load."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            if any(name.startswith("base_model.") for name in opened.keys()):  # noqa: SIM118 (no mapping)
                raise ValueError(
                    "The model was loaded with adapters by a stock class, which saves merged weights under names that "
                    "do not load. Load its folder by `load_encoder`, or `load_reranker`, and export that."
                )
