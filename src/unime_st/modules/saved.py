"""What is in the folder of a saved encoder: its modules, with ours in place of the stock one, and its settings."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from sentence_transformers.base.modules import Transformer
from torch import nn

from unime_st.folders import recover
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.videos import VideoSettings

_LISTING = "modules.json"
_MODEL_CONFIG = "config_sentence_transformers.json"
_SETTINGS = ("prompts", "default_prompt_name", "similarity_fn_name")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def trained_in(folder: Path) -> dict[str, Any]:
    """Arguments that load a checkpoint in the type that it was trained in, that of its adapters if it has any."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {"dtype": "auto"}
    with safe_open(file, framework="pt") as tensors:
        return {"dtype": tensors.get_tensor(next(iter(tensors.keys()))).dtype}


def folder_of(path: str | Path) -> Path:
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


def holds_saved_encoder(folder: Path) -> bool:
    """Whether a folder lists the modules of a sentence-transformers model."""
    return (folder / _LISTING).is_file()


def saved_parts(
    folder: Path,
    *,
    model_kwargs: Mapping[str, Any],
    kind: type[MultimodalEncoder] = MultimodalEncoder,
    processor_kwargs: Mapping[str, Any] | None = None,
    allow_remote_images: bool = False,
    videos: VideoSettings | None = None,
    late_media: int | None = None,
    text_only: bool = False,
    names: Sequence[str] = _SETTINGS,
) -> dict[str, Any]:
    """A folder's modules, with one of our ``kind`` in place of the stock Transformer, and its settings by name."""
    modules: list[nn.Module] = []
    for reference, source in _listed_modules(folder):
        if reference.rpartition(".")[2] == Transformer.__name__:
            with _damage_named(source):
                encoder = kind.load(
                    source,
                    model_kwargs=dict(model_kwargs),
                    processor_kwargs=dict(processor_kwargs or {}),
                    init_defaults={
                        "allow_remote_images": allow_remote_images,
                        "videos": videos,
                        "late_media": late_media,
                        "text_only": text_only,
                    },
                )
            modules.append(encoder)
        else:
            try:
                modules.append(_stock_class(reference).load(source))
            except TypeError as error:  # what its config.json tells is what the class is made with
                raise ValueError(
                    f"The config.json in {source} is missing, or does not fit {reference} ({error}). Restore it from "
                    "where the encoder was saved, or export it again."
                ) from error
    settings = _read_json(folder / _MODEL_CONFIG, dict) if (folder / _MODEL_CONFIG).is_file() else {}
    return {"modules": modules, **{name: settings.get(name) for name in names}}


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
    file = folder / _LISTING
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no modules.json, so it is no saved encoder. Make one of a backbone with "
            "`build_encoder`, or, if it is a copy of a published model, say of which with `published`."
        )
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
    """Within this context, the error of a library about a damaged file names the folder too."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A file of the encoder in {source} is damaged or cut short ({type(error).__name__}: {error}). Restore its "
            "weights and settings from where it was saved, or export it again."
        ) from error


def _stock_class(reference: str) -> Any:
    module, _, name = reference.rpartition(".")
    if not module.startswith("sentence_transformers."):
        raise ValueError(f"modules.json names {reference}, which is not part of sentence-transformers; refused.")
    return getattr(importlib.import_module(module), name)
