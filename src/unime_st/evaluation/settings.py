"""What an evaluation was made with: the record that is kept in the files of its results by row."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from textwrap import shorten
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn
from torch.distributed.tensor import DTensor

from unime_st.identity.model import model_fingerprint

WEIGHTS = ("weights", "reranker_weights")
"""The settings that tell models apart: comparisons are made for their difference."""

NOT_TOLD = "not told"
_SPLIT = "not told: split over processes"
_SHOWN = 200  # characters of a value


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("unime_st", "sentence-transformers", "transformers", "torch", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def model_settings(model: Any) -> dict[str, Any]:
    """What is known of a model: its fingerprint, the sizes that its processor gives images, the frames of a video."""
    told: dict[str, Any] = {"weights": weights_of(model)}
    encoder: Any = model[0] if isinstance(model, SentenceTransformer) else None
    size = getattr(getattr(getattr(encoder, "processor", None), "image_processor", None), "size", None)
    if size is not None:
        told["processor_size"] = dict(size)
    if getattr(encoder, "videos", None) is not None:
        told["videos"] = asdict(encoder.videos)
    return told


def weights_of(model: Any) -> str:
    """A model's fingerprint; the name of its class where it has no weights to know it by."""
    if not isinstance(model, nn.Module):
        return type(model).__name__
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return _SPLIT
    return model_fingerprint(model)


def differing(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, tuple[str, str]]:
    """The settings that differ, with both values as text; under "" that a side does not tell its own.

    >>> differing({"prompt": "a", "versions": {"torch": "1"}}, {"versions": {"torch": "2"}})
    {'prompt': ('"a"', '-'), 'versions torch': ('"1"', '"2"')}
    >>> differing(None, {})
    {'': ('not told', 'told')}
    """
    if before is None or after is None:
        return {"": (NOT_TOLD if before is None else "told", NOT_TOLD if after is None else "told")}
    a, b = _flat(before), _flat(after)
    return {name: (a.get(name, "-"), b.get(name, "-")) for name in {**a, **b} if a.get(name) != b.get(name)}


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings one level deep, as text; a name in a mapping comes after that of the mapping."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        inner = {f"{name} {key}": own for key, own in value.items()} if isinstance(value, Mapping) else {name: value}
        flat |= {key: json.dumps(own, ensure_ascii=False) for key, own in inner.items()}
    return flat


def shown(value: str) -> str:
    """A value that fits into a cell of a table."""
    return shorten(value, _SHOWN, placeholder=" ...")
