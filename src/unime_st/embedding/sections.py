"""Where embeddings are kept: in memory, or in a folder of a cache with a description of itself."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from unime_st.identity.model import is_outdated

logger = logging.getLogger(__name__)

MARKER = "section.json"
_GONE = ".evicted"


class Section(Protocol):
    """Keeps the embeddings of one model under one prompt, on disk or in memory."""

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings; None stands for a missing one."""

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings (N, D)."""


class MemorySection:
    """Keeps embeddings for as long as it lives, so that the tasks of one evaluation encode nothing twice."""

    def __init__(self) -> None:
        self._rows: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings; None stands for a missing one."""
        return [self._rows.get(fingerprint) for fingerprint in fingerprints]

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings (N, D)."""
        self._rows.update(zip(fingerprints, embeddings, strict=True))


@dataclass(frozen=True)
class SectionInfo:
    """The content of one section of a cache."""

    folder: Path
    model: str  # fingerprint, 64 hexadecimal digits
    prompt: str  # its text, "" for none
    settings: dict[str, Any]  # others that decide the embeddings, e.g. the resolution
    items: int  # number of embeddings, as far as its shards can be read
    num_bytes: int  # on disk
    last_used: float  # when it was last opened or written, in seconds since 1970

    @property
    def outdated(self) -> bool:
        """Whether its model was fingerprinted by another version's rule, so that no model finds it any more."""
        return is_outdated(self.model)


def read_description(marker: Path) -> dict[str, Any] | None:
    """The content of a section's ``section.json``; None, and a line in the log, if it is damaged."""
    try:
        told = json.loads(marker.read_bytes())
    except ValueError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("settings", {}), dict):
        logger.warning(
            "%s is damaged: it does not say what its section holds. It is written anew when a model opens the section; "
            "`cache clear` deletes it.", marker)  # fmt: skip
        return None
    return told


def section_info(marker: Path) -> SectionInfo | None:
    """The content of a section, or None when another process has just deleted it."""
    try:
        told = read_description(marker) or {}
        files = [path for path in marker.parent.iterdir() if path.is_file()]
        num_bytes = sum(path.stat().st_size for path in files)
        last_used = marker.stat().st_mtime
    except FileNotFoundError:
        return None
    items = 0
    for shard in (path for path in files if path.suffix == ".safetensors"):
        with contextlib.suppress(SafetensorError, OSError, IndexError), safe_open(shard, framework="np") as tensors:
            items += tensors.get_slice("keys").get_shape()[0]
    return SectionInfo(
        marker.parent,
        str(told.get("model", "")),
        str(told.get("prompt", "")),
        told.get("settings", {}),
        items,
        num_bytes,
        last_used,
    )


def remove_section(folder: Path) -> None:
    """Delete a section at once, even while others read or write there: it is renamed first, so that they find none."""
    with contextlib.suppress(OSError):  # it is gone already, or on a read-only disk
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{_GONE}")), ignore_errors=True)


def remove_half_deleted(folder: Path) -> None:
    """Delete what is left of sections whose deletion was killed."""
    for left in folder.glob(f".*{_GONE}"):
        shutil.rmtree(left, ignore_errors=True)
