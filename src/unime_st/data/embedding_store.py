"""A folder of embeddings that only ever grows by whole files."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unime_st.columns import LABEL
from unime_st.files import remove_leftovers, write_atomically

KEY_BYTES = 16
_KEY = np.dtype(f"S{KEY_BYTES}")
_FILE_BYTES = 1 << 30
_OPEN_FILES = 256  # each map holds a file descriptor, and every worker of a data loader has its own


def key_array(keys: Iterable[bytes]) -> np.ndarray:
    """Pack keys of 16 bytes into an array ``(n,)``, a twentieth of what they take as Python objects.

    Example:
        >>> len(key_array([bytes(16), b"k" * 16]))
        2
    """
    return np.frombuffer(b"".join(keys), dtype=_KEY)


class EmbeddingStore:
    """A folder of embeddings, in files that are written whole and read through memory maps.

    Each file is one numpy record: first the keys ``(n,)``, then their embeddings ``(n, D)``. So the keys of a folder
    are found without reading its embeddings. As a data set's transform, it replaces numbers in the ``label`` column by
    the embeddings with those numbers.

    Attributes:
        folder: Where it is.
        dimension: Of the embeddings; None while there are none.

    Example:
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
        remove_leftovers(folder)
        self.refresh()

    def __len__(self) -> int:
        return self._starts[-1]

    def refresh(self) -> bool:
        """Take in the files that other processes have written; returns whether there were any."""
        known = set(self._files)
        names = sorted(path.name for path in self.folder.glob("shard-*.npy") if path.name not in known)
        for name in names:
            self._register(name)
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
        """Write embeddings ``(n, D)`` in one file; it is there when this returns, and not in parts before.

        Embeddings of more than a gigabyte become several files.
        """
        rows = max(1, _FILE_BYTES // (KEY_BYTES + 4 * embeddings.shape[1]))
        for start in range(0, len(keys), rows):
            part = slice(start, start + rows)
            shape = embeddings[part].shape
            record = np.empty(1, dtype=[("keys", _KEY, shape[:1]), ("embeddings", "<f4", shape)])
            record["keys"][0] = keys[part]
            record["embeddings"][0] = embeddings[part]
            name = f"shard-{len(self._files):06d}-{uuid.uuid4().hex[:8]}.npy"
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
        path = self.folder / self._files[file]
        try:
            self._open[file] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it; what it held is embedded again.") from error
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[file]

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


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Distinct values with the places of each, in one sort."""
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    if len(distinct):
        yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=True)
