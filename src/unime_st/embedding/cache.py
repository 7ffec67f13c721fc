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
from unime_st.embedding.shards import DAMAGE, Keys, Shard, just_written, key_array, open_shard, packed
from unime_st.files import remove_leftovers, write_atomically
from unime_st.identity.model import model_fingerprint

logger = logging.getLogger(__name__)

_MOST_SHARDS = 64  # small ones of a section, before they are merged
_MERGED_BYTES = 1 << 25  # of embeddings in a merged shard, at most; those of half of it are not small
_TRIES = 20  # to write into a section that others delete
_told: set[tuple[str, Path]] = set()  # what was said in this process, and of which folder


class EmbeddingCache:
    """A folder of embeddings, in one section for each model, prompt and set of further settings.

    A section is a folder of safetensors shards beside a ``section.json`` that says what it holds. Shards are written
    under a name of their own and renamed when complete: several processes may write into one cache, and what was
    written before a kill is found again. Each has a checksum, compared when its section is opened; what is damaged is
    made again. Embeddings stay on disk and are read as they are asked for, so a section may be larger than memory.
    Where nothing can be written, a cache serves what it has. ``python -m unime_st.evaluation cache info FOLDER`` shows
    a cache, ``cache clear FOLDER`` empties it.

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
        self._in_memory: dict[str, np.ndarray] = {}  # what could not be written
        self._keys = Keys()
        self._seen: set[Path] = set()
        with contextlib.suppress(OSError):  # on a disk that is not to be written they stay
            remove_leftovers(folder)
            remove_half_deleted(cache.folder)
        self._look()
        if self._seen:
            self._check_marker()
            self._touch()
        small = [shard for shard in self._keys.shards if shard.num_bytes < _MERGED_BYTES // 2]
        if len(small) > _MOST_SHARDS:
            self._merge(small)

    def __len__(self) -> int:
        return len(self._keys) + len(self._in_memory)

    def __contains__(self, fingerprint: str) -> bool:
        return self.get([fingerprint])[0] is not None

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings ``(D,)`` by hexadecimal content fingerprints; None where there is none."""
        asked = list(fingerprints)
        found = [self._in_memory.get(fingerprint) for fingerprint in asked]
        while not self._read(asked, found):  # another process has merged shards: they have new names
            self._look()
        return found

    def _read(self, asked: Sequence[str], found: list[np.ndarray | None]) -> bool:
        """Read what is found on disk into a list; whether all of it could be."""
        whole = True
        for shard, places, rows in self._keys.find(asked):
            try:
                embeddings = shard.rows(rows)
            except (OSError, ValueError):  # merged or deleted by another process
                self._keys.remove(shard)
                whole = False
                continue
            for place, embedding in zip(places.tolist(), embeddings, strict=True):
                found[place] = embedding
        return whole

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store finite embeddings ``(N, D)`` of N hexadecimal content fingerprints, all of one length, as one shard."""
        embeddings = np.ascontiguousarray(embeddings, dtype="<f4")
        if embeddings.ndim != 2 or not embeddings.shape[1]:
            raise ValueError(f"Embeddings of shape {embeddings.shape}, but they must be (N, D). Not stored.")
        if len(fingerprints) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings for {len(fingerprints)} fingerprints.")
        if len(set(map(len, fingerprints))) > 1:
            raise ValueError("The fingerprints differ in length, but all of one call must have one. Not stored.")
        if not np.isfinite(embeddings).all():
            raise ValueError("An embedding holds NaN or infinity: it would be served again and again. Not stored.")
        if len(fingerprints) and (self._full or not self._write(key_array(fingerprints), embeddings)):
            self._in_memory.update(zip(fingerprints, embeddings, strict=True))

    def _write(self, keys: np.ndarray, embeddings: np.ndarray) -> bool:
        """Write a shard; whether it could be."""
        content = packed(keys, embeddings)
        if not self.cache.make_room(self.folder, len(content)):
            logger.warning(
                "%s alone would be larger than the cache's `max_bytes=%s`: what is encoded from here on is not kept.",
                self.folder, self.cache.max_bytes)  # fmt: skip
            self._full = True
            return False
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            self._put(path.name, content)
            if not (self.folder / MARKER).exists():
                self._put(MARKER, json.dumps(self.description, indent=2, sort_keys=True))
        except OSError as error:
            self._full = True
            if ("unwritable", self.cache.folder) not in _told:
                _told.add(("unwritable", self.cache.folder))
                logger.warning(
                    "The cache %s cannot be written (%s): what is there is served, what is encoded from here on is not "
                    "kept. Make room, make it writable, or give another folder.", self.cache.folder, error)  # fmt: skip
            return False
        self._seen.add(path)
        with contextlib.suppress(FileNotFoundError):  # deleted already, to make room for others
            self._keys.add(just_written(path, keys))
        self._touch()
        return True

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

    def _merge(self, small: Sequence[Shard]) -> None:
        """Write small shards as fewer ones, then delete them; a kill in between leaves copies only."""
        groups: list[list[Shard]] = [[]]
        for shard in sorted(small, key=lambda shard: shard.keys.itemsize):  # of each, all keys have one length
            group = groups[-1]
            full = sum(other.num_bytes for other in group) + shard.num_bytes > _MERGED_BYTES
            if full or (group and group[0].keys.itemsize != shard.keys.itemsize):
                groups.append([])
            groups[-1].append(shard)
        for group in groups:
            if not self.cache.make_room(self.folder, sum(shard.num_bytes for shard in group)):
                return
            if not self._write_together(group):
                return
            for shard in group:
                self._keys.remove(shard)
                shard.path.unlink(missing_ok=True)

    def _write_together(self, group: Sequence[Shard]) -> bool:
        """Write the rows of shards as one, each key once; whether it could be."""
        keys, first = np.unique(np.concatenate([shard.keys for shard in group]), return_index=True)
        try:
            rows = np.concatenate([shard.rows() for shard in group])[first]
        except (OSError, ValueError):  # another process is merging them
            return False
        return self._write(keys, rows)

    def _look(self) -> bool:
        """Take in the shards that are new; whether there were any."""
        known = len(self._seen)
        while fresh := set(self.folder.glob("*.safetensors")) - self._seen:  # another process may merge them meanwhile
            for path in sorted(fresh):
                self._open(path)
            self._seen |= fresh
        return len(self._seen) > known

    def _open(self, path: Path) -> None:
        try:
            self._keys.add(open_shard(path))
        except FileNotFoundError:
            pass  # merged into another by a process that works beside this one
        except OSError as error:
            logger.warning("%s cannot be read (%s): its embeddings are made again.", path, error)
        except DAMAGE as error:
            logger.warning("%s cannot be read (%s): it is deleted, and its embeddings are made again.", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
