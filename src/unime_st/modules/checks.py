"""That a model in memory holds the weights of its file, all of them and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

_HEAD = "lm_head."  # at the top or below the language model; an embedder has none


def check_loaded(name: str, report: dict[str, Any]) -> None:
    """Refuse a model some of whose weights were not in the checkpoint, or did not fit.

    Args:
        name: of the checkpoint, for the message.
        report: what ``from_pretrained(output_loading_info=True)`` returned beside the model.

    Raises:
        ValueError: with the tensors' names.
    """
    left_over = [key for key in report.get("unexpected_keys", ()) if _HEAD not in key]
    problems = {
        "missing": sorted(key for key in report.get("missing_keys", ()) if "lora_" not in key),
        "of another shape": sorted(str(key) for key in report.get("mismatched_keys", ())),
        "left over": sorted(left_over),
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"
             for what, keys in problems.items() if keys]  # fmt: skip
    if found:
        raise ValueError(
            f"The weights of {name} do not fill the model: {'; '.join(found)}. They would be random or unused. Check "
            "that the checkpoint is complete and that its config.json describes it."
        )


def check_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose LoRA weights are not those of the adapter file.

    Raises:
        ValueError: with the tensors' names.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return  # on the Hub: transformers has fetched it; only a local file can be compared
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    unfilled = {name for name in loaded if "lora_" in name}
    wrong = []
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            name = key.removeprefix("base_model.model.")
            value = loaded.get(name)
            unfilled.discard(name)
            if value is None or not torch.equal(value.cpu().float(), tensors.get_tensor(key).float()):
                wrong.append(name)
    wrong += sorted(unfilled)
    if wrong:
        raise ValueError(
            f"The adapter in {folder} was not loaded: {len(wrong)} tensors differ or lack ({', '.join(wrong[:4])}). It "
            "belongs to another backbone, or peft and transformers disagree on names."
        )


def loading_note(model: PreTrainedModel) -> str:
    """What a card must say about loading an architecture that transformers lacks; empty for all others."""
    if not type(model.config).__module__.startswith("unime_st."):
        return ""
    return (
        f"**Needs unime_st.** transformers does not know the architecture `{model.config.model_type}`, so "
        "sentence-transformers alone refuses this checkpoint. With the package `unime_st` installed and imported "
        "first, it loads like any other, without `trust_remote_code`; the tensors have the names of the architecture's "
        "published checkpoints."
    )
