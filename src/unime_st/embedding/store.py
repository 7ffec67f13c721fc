"""A folder of embeddings that only ever grows by whole files."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch

from unime_st.columns import LABEL
from unime_st.embedding.full_disk import explained_full_disk
from unime_st.files import checksum, remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

KEY_BYTES = 16
_KEY = np.dtype(f"S{KEY_BYTES}")
_NUMBER = np.dtype("<f4")
_FIELDS = ("keys", "embeddings", "checksum")
_DAMAGE = (ValueError, EOFError, TypeError, SyntaxError, TokenError, OverflowError, MemoryError)  # what numpy says
_FILE_BYTES = 1 << 30
_PARSING = threading.Lock()  # numpy parses a header as Python, which CPython 3.11 cannot do in two threads at once
_OPEN_FILES = 256  # each map holds a file descriptor, and every worker of a data loader has its own


def key_array(keys: Iterable[bytes]) -> np.ndarray:
    """Pack keys of 16 bytes into an array ``(n,)``, which takes a twentieth of the memory of Python objects."""
    return np.frombuffer(b"".join(keys), dtype=_KEY)


class EmbeddingStore:
    """A folder of embeddings, in files that are written whole and read through memory maps.

    A file is one numpy record: keys ``(n,)``, embeddings ``(n, D)`` and a checksum of both, compared once, when the
    file is found; copies in other processes, such as a data loader's, rely on that. As a data set's transform, a store
    replaces numbers in the ``label`` column by their embeddings.

    >>> import tempfile
    >>> store = EmbeddingStore(Path(tempfile.mkdtemp()))
    >>> store.add(key_array([b"a" * 16, b"b" * 16]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> numbers = store.find(key_array([b"b" * 16, b"c" * 16]))
    >>> numbers.tolist(), store.rows(numbers[:1]).tolist()
    ([1, -1], [[3.0, 4.0]])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dimension: int | None = None
        self._files: list[str] = []
        self._starts = [0]  # number of each file's first embedding
        self._keys: list[np.ndarray] = []
        self._index: tuple[np.ndarray, np.ndarray] | None = None  # sorted keys, and the number of each
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._unverified = self._told = 0
        with contextlib.suppress(OSError):  # on a disk that is not to be written they stay
            remove_leftovers(folder)
        self.refresh()

    def __len__(self) -> int:
        return self._starts[-1]

    def refresh(self) -> bool:
        """Take in the files that other processes have written; returns whether there were any."""
        known = set(self._files)
        names = sorted(path.name for path in self.folder.glob("shard-*.npy") if path.name not in known)
        with ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
            for name, sound in zip(names, pool.map(self._verify, names), strict=True):
                self._register(name)
                self._unverified += not sound
        if self._unverified > self._told:
            logger.warning(
                "%d files of %s are of an earlier version, without checksums: damage to them would not be seen. Delete "
                "them to have what they hold embedded again.", self._unverified, self.folder)  # fmt: skip
            self._told = self._unverified
        return bool(names)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Look up keys: the number of each one's embedding, -1 where there is none. ``(n,)``."""
        if self._index is None:
            every = np.concatenate(self._keys) if self._keys else np.empty(0, dtype=_KEY)
            order = np.argsort(every, kind="stable")  # of two with one key, the first written counts
            self._index = every[order], order
        ordered, order = self._index
        if not len(ordered):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
        return np.where(ordered[places] == keys, order[places], -1)

    def add(self, keys: np.ndarray, embeddings: np.ndarray) -> None:
        """Write embeddings ``(n, D)`` in one file, more than a gigabyte in several; a file is there whole or not."""
        rows = max(1, _FILE_BYTES // (KEY_BYTES + 4 * embeddings.shape[1]))
        for start in range(0, len(keys), rows):
            part = slice(start, start + rows)
            shape = embeddings[part].shape
            record = np.empty(1, dtype=[("keys", _KEY, shape[:1]), ("embeddings", _NUMBER, shape), ("checksum", "S32")])
            record["keys"][0] = keys[part]
            record["embeddings"][0] = embeddings[part]
            record["checksum"] = checksum(record["keys"][0], record["embeddings"][0])
            name = f"shard-{len(self._files):06d}-{uuid.uuid4().hex[:8]}.npy"
            with explained_full_disk(self.folder):
                write_atomically(self.folder / name, record)
            self._register(name)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Read embeddings by number, ``(n, D)``."""
        numbers = np.asarray(numbers)
        out = np.empty((len(numbers), self.dimension or 0), dtype=np.float32)
        files = np.searchsorted(self._starts, numbers, side="right") - 1
        for file, places in _groups(files):
            out[places] = self._record(file)["embeddings"][0][numbers[places] - self._starts[file]]
        return out

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch's labels; the other columns pass through."""
        if LABEL not in batch:
            return batch
        numbers = np.array(batch[LABEL])  # (rows,) or (rows, columns)
        labels = torch.from_numpy(self.rows(numbers.reshape(-1))).unflatten(0, numbers.shape)
        return {**batch, LABEL: list(labels)}

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and the keys behind: workers open their own, and only read."""
        return {**self.__dict__, "_open": OrderedDict(), "_keys": [], "_index": None}

    def _record(self, file: int) -> np.ndarray:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        self._open[file] = self._load(self._files[file])
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[file]

    def _load(self, name: str) -> np.ndarray:
        path = self.folder / name
        try:
            with _PARSING:
                record = np.load(path, mmap_mode="r", allow_pickle=False)
            if unlike := _unlike(record):
                raise ValueError(unlike)
        except _DAMAGE as error:
            raise _damaged(path, error) from error
        return record

    def _verify(self, name: str) -> bool:
        """Compare a file with its checksum; return whether it has one."""
        record = self._load(name)
        if "checksum" not in (record.dtype.names or ()):
            return False
        told = bytes(record["checksum"][0]).decode("ascii", "replace")
        if told != checksum(record["keys"][0], record["embeddings"][0]):
            raise _damaged(self.folder / name, "its content differs from its checksum")
        return True

    def _register(self, name: str) -> None:
        self._files.append(name)
        record = self._record(len(self._files) - 1)
        rows, dimension = record.dtype["embeddings"].shape
        if self.dimension not in (None, dimension):
            raise ValueError(
                f"{self.folder} holds embeddings of {self.dimension} and of {dimension} numbers ({name}). Two models "
                "have used one name: delete the folder, or give another `teacher_name`."
            )
        self.dimension = dimension
        self._keys.append(np.array(record["keys"][0]))
        self._index = None
        self._starts.append(self._starts[-1] + rows)


def _damaged(path: Path, why: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged ({why}). Delete it; what it held is embedded again.")


def _unlike(record: np.ndarray) -> str:
    """How a file differs from one that a store writes, with a checksum or before there were any; "" for not at all."""
    names: Sequence[str] = record.dtype.names or ()
    if record.shape != (1,) or tuple(names) not in (_FIELDS, _FIELDS[:2]):
        return f"it holds {record.shape} x {record.dtype}, not one record of {', '.join(_FIELDS)}"
    keys, embeddings = record.dtype["keys"], record.dtype["embeddings"]
    kinds = (keys.base, embeddings.base) == (_KEY, _NUMBER)
    if not kinds or embeddings.ndim != 2 or keys.shape != embeddings.shape[:1]:
        return f"its keys are {keys}, its embeddings {embeddings}"
    return ""


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Distinct values with the places of each, in one sort."""
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    if len(distinct):
        yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=True)
