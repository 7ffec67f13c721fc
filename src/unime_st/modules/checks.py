"""Checks that a model in memory holds the weights of its file, all of them and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from unime_st.modules.adapters import adapter_state, renamed
from unime_st.published import PublishedCheckpoint, PublishedReranker

_IMAGE_TOKENS = ("image_token_id", "image_token_index")
_HEAD = "lm_head."  # at the top or below the language model; an embedder has none


def check_loaded(name: str, report: dict[str, Any]) -> None:
    """Refuse a model that a checkpoint did not fill, by the report of ``from_pretrained(output_loading_info=True)``."""
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
    """Refuse a model whose LoRA weights are not those of the adapter file."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return  # on the Hub: transformers has fetched it; only a local file can be compared
    loaded = adapter_state(model)
    unfilled = set(loaded)
    wrong = []
    with safe_open(file, framework="pt") as tensors:
        values = {key: tensors.get_tensor(key) for key in tensors.keys() if _HEAD not in key}  # noqa: SIM118 (no dict)
    for key, stored in values.items():
        name = next((name for name in renamed(key.removeprefix("base_model.model.")) if name in loaded), key)
        unfilled.discard(name)
        value = loaded.get(name)
        if value is None or not torch.equal(value.cpu().float(), stored.float()):
            wrong.append(name)
    wrong += sorted(unfilled)
    if wrong:
        raise ValueError(
            f"The adapter in {folder} was not loaded: {len(wrong)} tensors differ or lack ({', '.join(wrong[:4])}). It "
            "belongs to another backbone, or peft and transformers disagree on names."
        )


def check_processor(model: PreTrainedModel, processor: Any, name: str) -> None:
    """Refuse another model's processor: it has more tokens than the model, or another placeholder of an image."""
    tokenizer = getattr(processor, "tokenizer", processor)
    embeddings: Any = model.get_input_embeddings()
    rows, tokens = len(embeddings.weight), len(tokenizer)
    wanted = next((getattr(model.config, key, None) for key in _IMAGE_TOKENS if hasattr(model.config, key)), None)
    # Gemma3's processor calls the mark before an image its token; the tokenizer knows the one that is repeated.
    owner = next((part for part in (tokenizer, processor) if getattr(part, "image_token", None) is not None), None)
    word = getattr(owner, "image_token", None)
    found = None if word is None else tokenizer.convert_tokens_to_ids(str(word))
    if tokens > rows or (wanted is not None and found is not None and found != wanted):
        raise ValueError(
            f"The processor in {name} is not the model's: it has {tokens} tokens and writes an image as {word!r} "
            f"({found}), while the model has {rows} embeddings and expects {wanted}. Restore the processor's files."
        )


def check_family(model: PreTrainedModel, known: PublishedCheckpoint | PublishedReranker) -> None:
    """Refuse a model of another architecture than the published one it was said to be."""
    if model.config.model_type != known.family:
        raise ValueError(
            f"{known.repo_id} is a {known.family}, but this folder holds a {model.config.model_type}. Check the "
            "folder, or the name in `published`."
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
