"""``unime info``: what a model is, from its files, without loading weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unime_st.cli.options import say

HELP = "tell what a model is: backbone, prompts, dimensions, what it was trained from; no weights are loaded"
EXAMPLE = "unime info photos_encoder/encoder"

_SMALL = ["*.json", "*.jinja"]
_WEIGHTS = ("*.safetensors", "*.bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="a saved encoder or a backbone: Hub name or folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(given: argparse.Namespace) -> int:
    """Describe, and print."""
    told = describe(given.model)
    if given.json:
        say(json.dumps(told, indent=1, ensure_ascii=False))
        return 0
    for name, value in told.items():
        shown = ", ".join(f"{key} {own}" for key, own in value.items()) if isinstance(value, dict) else value
        say(f"{name.replace('_', ' '):<16} {'–' if shown in (None, '', []) else shown}")
    return 0


def describe(model: str) -> dict[str, Any]:
    """Read what the small files of a model, in a folder or on the Hub, say."""
    folder = _folder(model)
    config, adapter = _json(folder / "config.json"), _json(folder / "adapter_config.json")
    if not config and not adapter:
        raise FileNotFoundError(f"{folder} has no config.json, so it is no model. Give that of an encoder or backbone.")
    text = config.get("text_config") or config
    settings = _json(folder / "config_sentence_transformers.json")
    module = _json(folder / "sentence_bert_config.json")
    tokenizer = _json(folder / "tokenizer_config.json")
    trained = _json(folder / "training.json")
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    return {
        "model": model,
        "kind": "encoder" if (folder / "modules.json").is_file() else "adapter" if adapter else "backbone",
        "adapter_of": adapter.get("base_model_name_or_path"),
        "family": config.get("model_type"),
        "dimensions": text.get("hidden_size"),
        "layers": text.get("num_hidden_layers"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "max_seq_length": module.get("max_seq_length") or tokenizer.get("model_max_length"),
        "similarity": settings.get("similarity_fn_name"),
        "modules": [entry["type"].rpartition(".")[2] for entry in _json(folder / "modules.json") or []],
        "prompts": settings.get("prompts") or {},
        "instructions": _instructions(folder),
        "weights_gb": round(sum(path.stat().st_size for path in weights) / 1e9, 3) if weights else None,
        "trained_from": trained.get("backbone"),
        "trained_on": {key: trained[key] for key in ("data", "rows") if key in trained},
        "held_out": {key: round(value, 4) for key, value in trained.get("after", {}).items() if "recall@" in key},
        "versions": settings.get("__version__") or {"transformers": config.get("transformers_version")},
    }


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_SMALL))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"There is no folder {model!r}, and no such model on the Hub ({error}).") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _instructions(folder: Path) -> dict[str, str]:
    """Those of UniME's that the chat template asks, by what an input holds."""
    from unime_st.prompts import INSTRUCTIONS

    found = [file.read_text(encoding="utf-8") for file in folder.glob("chat_template.jinja")]
    said = "".join([*found, json.dumps(_json(folder / "tokenizer_config.json").get("chat_template") or "")])
    return {kind: told.strip() for kind, told in INSTRUCTIONS.items() if told.strip() in said}
