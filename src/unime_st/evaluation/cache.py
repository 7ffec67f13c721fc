"""Embeddings on disk, so that nothing is encoded twice by the same model."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from unime_st.files import write_atomically
from unime_st.model_identity import model_fingerprint

logger = logging.getLogger(__name__)


class Section(Protocol):
    """Where embeddings of one model under one prompt are kept, on disk or in memory."""

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings, None where there is none."""

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings (N, D)."""


class MemorySection:
    """Keeps embeddings for as long as it lives: one evaluation's several tasks encode nothing twice."""

    def __init__(self) -> None:
        self._rows: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings, None where there is none."""
        return [self._rows.get(fingerprint) for fingerprint in fingerprints]

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings (N, D)."""
        self._rows.update(zip(fingerprints, embeddings, strict=True))


class EmbeddingCache:
    """A folder of embeddings, in one section for each model, prompt and set of further settings.

    A section is a folder of safetensors shards beside a ``section.json`` that says what it holds. Shards are written
    under a name of their own and renamed when complete: several processes may write into one cache, and what was
    written before a kill is found again.

    Args:
        folder: Where the cache is, or will be at the first write.

    Example:
        >>> import tempfile, torch
        >>> cache = EmbeddingCache(tempfile.mkdtemp())
        >>> section = cache.section(torch.nn.Linear(2, 2), prompt="Find: ")
        >>> section.add(["00ff"], np.ones((1, 3), dtype=np.float32))
        >>> section.get(["00ff", "aa11"])
        [array([1., 1., 1.], dtype=float32), None]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def section(
        self, model: nn.Module, *, prompt: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> CacheSection:
        """Open the part of the cache that belongs to a model in its present state.

        Args:
            model: The model; its weights are read once, see :func:`~unime_st.evaluation.model_fingerprint`.
            prompt: The prompt text (not its name) the embeddings are made with.
            settings: Whatever else decides the embeddings, e.g. arguments of ``encode``; must be JSON.

        Returns:
            The section; hold it only while the model stays as it is.

        Raises:
            TypeError: If the model is no ``torch.nn.Module``.
        """
        description = {"model": model_fingerprint(model), "prompt": prompt or "", "settings": dict(settings or {})}
        name = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
        return CacheSection(self.folder / name, description)

    def clear(self) -> None:
        """Delete every section. Other files in the folder stay."""
        for marker in self.folder.glob("*/section.json"):
            shutil.rmtree(marker.parent)


class CacheSection:
    """The embeddings of one model under one prompt; made by :meth:`EmbeddingCache.section`.

    Args:
        folder: The section's folder.
        description: What decides the embeddings, written beside them.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.description = dict(description)
        self._rows: dict[str, np.ndarray] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self._read(shard)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._rows

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings.

        Args:
            fingerprints: Hexadecimal content fingerprints.

        Returns:
            An array of shape (D,) for each, None where there is none.
        """
        return [self._rows.get(fingerprint) for fingerprint in fingerprints]

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings, as one shard.

        Args:
            fingerprints: N hexadecimal content fingerprints, all of one length.
            embeddings: Shape (N, D), finite.

        Raises:
            ValueError: If there are not as many embeddings as fingerprints, or some are not finite.
        """
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        if len(fingerprints) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings for {len(fingerprints)} fingerprints.")
        if not np.isfinite(embeddings).all():
            raise ValueError("An embedding holds NaN or infinity: it would be served again and again. Not stored.")
        if not len(fingerprints):
            return
        keys = np.frombuffer(bytes.fromhex("".join(fingerprints)), dtype=np.uint8).reshape(len(fingerprints), -1)
        marker = self.folder / "section.json"
        if not marker.exists():
            write_atomically(marker, json.dumps(self.description, indent=2, sort_keys=True))
        write_atomically(
            self.folder / f"{uuid.uuid4().hex}.safetensors", save({"keys": keys, "embeddings": embeddings})
        )
        self._rows.update(zip(fingerprints, embeddings, strict=True))

    def _read(self, shard: Path) -> None:
        try:
            tensors = load_file(shard)
            keys, embeddings = tensors["keys"], tensors["embeddings"]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s): its embeddings are made again. Delete it.", shard, error)
            return
        self._rows.update((bytes(key).hex(), row) for key, row in zip(keys, embeddings, strict=True))
