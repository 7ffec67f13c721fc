"""Embeddings on disk, so that nothing is encoded twice by the same model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from torch import nn

from unime_st.arguments import require_number, require_path
from unime_st.embedding.sections import (
    MARKER,
    SectionInfo,
    read_description,
    remove_half_deleted,
    remove_section,
    section_info,
)
from unime_st.files import checksum, remove_leftovers, write_atomically
from unime_st.identity.model import model_fingerprint

logger = logging.getLogger(__name__)

_MOST_SHARDS = 64  # of a section, before they are merged
_CHECKSUM = "checksum"
_TRIES = 20  # to write into a section that others delete
_DAMAGE = (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError)  # what is made of bad files
_told: set[tuple[str, Path]] = set()  # what was said in this process, and of which folder


class EmbeddingCache:
    """A folder of embeddings, in one section for each model, prompt and set of further settings.

    A section is a folder of safetensors shards beside a ``section.json`` that says what it holds. Shards are written
    under a name of their own and renamed when complete: several processes may write into one cache, and what was
    written before a kill is found again. Each has a checksum, compared when its section is opened; what is damaged is
    made again. Where nothing can be written, a cache serves what it has. ``python -m unime_st.evaluation cache info
    FOLDER`` shows a cache, ``cache clear FOLDER`` empties it.

    Args:
        folder: Where the cache is, or will be at the first write.
        max_bytes: Of all sections together; when a write exceeds it, the least recently used other sections are
            deleted, and a section too large by itself is kept in memory only from there on. None for no bound.

    Example:
        >>> import tempfile, torch
        >>> cache = EmbeddingCache(tempfile.mkdtemp())
        >>> section = cache.section(torch.nn.Linear(2, 2), prompt="Find: ")
        >>> section.add(["00ff"], np.ones((1, 3), dtype=np.float32))
        >>> section.get(["00ff", "aa11"])
        [array([1., 1., 1.], dtype=float32), None]
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None) -> None:
        require_number("max_bytes", max_bytes, least=1, whole=False, optional=True)
        self.folder = require_path("folder", folder)
        self.max_bytes = max_bytes

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
        self._tell_of_outdated()
        return CacheSection(self.folder / name, description, cache=self)

    def info(self) -> list[SectionInfo]:
        """List the sections, the one that was used last first.

        Example:
            >>> import tempfile, torch
            >>> cache = EmbeddingCache(tempfile.mkdtemp())
            >>> cache.section(torch.nn.Linear(2, 2)).add(["00ff"], np.ones((1, 3), dtype=np.float32))
            >>> [(section.items, section.prompt) for section in cache.info()]
            [(1, '')]
        """
        found = [section_info(marker) for marker in self._markers()]
        return sorted((info for info in found if info is not None), key=lambda info: -info.last_used)

    def clear(self, *, model: str = "", unused_for: float = 0.0, outdated: bool = False) -> int:
        """Delete sections. Other files in the folder stay.

        Args:
            model: Beginning of the model's fingerprint; "" for every model.
            unused_for: Delete only the sections that were not used for this many seconds.
            outdated: Delete only the sections that no model finds any more, see :attr:`SectionInfo.outdated`.

        Returns:
            Bytes freed.
        """
        now = time.time()
        gone = [info for info in self.info() if info.model.startswith(model) and now - info.last_used >= unused_for]
        gone = [info for info in gone if info.outdated or not outdated]
        for info in gone:
            remove_section(info.folder)
        return sum(info.num_bytes for info in gone)

    def make_room(self, section: Path, num_bytes: int) -> bool:
        """Delete least recently used sections until a section can grow by this many bytes; return whether it can."""
        if self.max_bytes is None:
            return True
        sections = self.info()
        used = sum(info.num_bytes for info in sections) + num_bytes
        for info in reversed(sections):
            if used <= self.max_bytes:
                break
            if info.folder != section:
                logger.info("%s is deleted to make room in the cache.", info.folder)
                remove_section(info.folder)
                used -= info.num_bytes
        return used <= self.max_bytes

    def _markers(self) -> list[Path]:
        return [marker for marker in self.folder.glob(f"*/{MARKER}") if not marker.parent.name.startswith(".")]

    def _tell_of_outdated(self) -> None:
        """Say in the log, once in each process, that there are sections which no model finds any more."""
        if ("outdated", self.folder) in _told:
            return
        _told.add(("outdated", self.folder))
        if count := sum(info.outdated for info in self.info()):
            logger.warning(
                "%d sections of %s are of an earlier version of unime_st, which knew models by less and prepared some "
                "images otherwise: they are not used any more. `python -m unime_st.evaluation cache clear --outdated "
                "%s` deletes them.", count, self.folder, self.folder)  # fmt: skip


class CacheSection:
    """The embeddings of one model under one prompt; made by :meth:`EmbeddingCache.section`."""

    def __init__(self, folder: Path, description: Mapping[str, Any], cache: EmbeddingCache) -> None:
        self.folder = folder
        self.description = dict(description)
        self.cache = cache
        self._full = False
        self._rows: dict[str, np.ndarray] = {}
        with contextlib.suppress(OSError):  # on a disk that is not to be written they stay
            remove_leftovers(folder)
            remove_half_deleted(cache.folder)
        shards: set[Path] = set()
        while fresh := set(folder.glob("*.safetensors")) - shards:  # another process may merge them meanwhile
            for shard in sorted(fresh):
                self._read(shard)
            shards |= fresh
        if shards:
            self._check_marker()
            self._touch()
        if len(shards) > _MOST_SHARDS:
            self._merge(shards)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._rows

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings ``(D,)`` by hexadecimal content fingerprints; None where there is none."""
        return [self._rows.get(fingerprint) for fingerprint in fingerprints]

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store finite embeddings ``(N, D)`` of N hexadecimal content fingerprints, all of one length, as one shard."""
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        if len(fingerprints) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings for {len(fingerprints)} fingerprints.")
        if not np.isfinite(embeddings).all():
            raise ValueError("An embedding holds NaN or infinity: it would be served again and again. Not stored.")
        if not len(fingerprints):
            return
        self._rows.update(zip(fingerprints, embeddings, strict=True))
        if not self._full:
            self._write(fingerprints, embeddings)

    def _write(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        keys = np.frombuffer(bytes.fromhex("".join(fingerprints)), dtype=np.uint8).reshape(len(fingerprints), -1)
        shard = save({"keys": keys, "embeddings": embeddings}, {_CHECKSUM: checksum(keys, embeddings)})
        if not self.cache.make_room(self.folder, len(shard)):
            logger.warning(
                "%s alone would be larger than the cache's `max_bytes=%s`: what is encoded from here on is not kept.",
                self.folder, self.cache.max_bytes)  # fmt: skip
            self._full = True
            return
        try:
            self._put(f"{uuid.uuid4().hex}.safetensors", shard)
            if not (self.folder / MARKER).exists():
                self._put(MARKER, json.dumps(self.description, indent=2, sort_keys=True))
        except OSError as error:
            self._full = True
            if ("unwritable", self.cache.folder) not in _told:
                _told.add(("unwritable", self.cache.folder))
                logger.warning(
                    "The cache %s cannot be written (%s): what is there is served, what is encoded from here on is not "
                    "kept. Make room, make it writable, or give another folder.", self.cache.folder, error)  # fmt: skip
            return
        self._touch()

    def _put(self, name: str, content: bytes | str) -> None:
        """Write a file, and write it again when another process deletes the section meanwhile to make room."""
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                write_atomically(self.folder / name, content)
                return
        raise FileNotFoundError(f"{self.folder} was deleted {_TRIES} times while it was written")

    def _check_marker(self) -> None:
        """Write the note of what the section holds anew where it is gone or damaged."""
        with contextlib.suppress(OSError):
            marker = self.folder / MARKER
            if not marker.exists() or read_description(marker) != self.description:
                self._put(MARKER, json.dumps(self.description, indent=2, sort_keys=True))

    def _touch(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.folder / MARKER)

    def _merge(self, shards: Iterable[Path]) -> None:
        """Write all rows as one shard, then delete those they came from; a kill in between leaves copies only."""
        if self.cache.make_room(self.folder, sum(row.nbytes for row in self._rows.values())):
            self._write(list(self._rows), np.stack(list(self._rows.values())))
            if self._full:
                return
            for shard in shards:
                shard.unlink(missing_ok=True)

    def _read(self, shard: Path) -> None:
        try:
            tensors = load_file(shard)
            with safe_open(shard, framework="np") as opened:
                told = (opened.metadata() or {}).get(_CHECKSUM)
            keys, embeddings = tensors["keys"], tensors["embeddings"]
            why = "" if told == checksum(keys, embeddings) else "its checksum is another"
        except FileNotFoundError:
            return  # merged into another by a process that works beside this one
        except OSError as error:
            logger.warning("%s cannot be read (%s): its embeddings are made again.", shard, error)
            return
        except _DAMAGE as error:
            why = str(error)
        if why:
            logger.warning("%s cannot be read (%s): it is deleted, and its embeddings are made again.", shard, why)
            with contextlib.suppress(OSError):
                shard.unlink()
            return
        self._rows.update((bytes(key).hex(), row) for key, row in zip(keys, embeddings, strict=True))
