"""A folder of embeddings that only ever grows by whole files."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unime_st.columns import LABEL
from unime_st.files import remove_leftovers, write_atomically

_KEY_BYTES = 16


class EmbeddingStore:
    """A folder of embeddings, in files that are written whole.

    Each file is a numpy array of records ``(key, embedding)``. As a data set's transform, it replaces numbers in the
    ``label`` column by the embeddings with those numbers.

    Attributes:
        folder: Where it is.
        numbers: Key -> number of its embedding.
        dimension: Of the embeddings; None while there are none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers: dict[bytes, int] = {}
        self.dimension: int | None = None
        self._files: list[str] = []
        self._starts = [0]  # number of each file's first embedding
        self._open: dict[int, np.ndarray] = {}
        remove_leftovers(folder)
        for path in sorted(folder.glob("embeddings-*.npy")):
            self._register(path.name)

    def add(self, keys: Iterable[bytes], embeddings: np.ndarray) -> None:
        """Write one file; it is there when this returns, and not in parts before."""
        kind = np.dtype([("key", f"V{_KEY_BYTES}"), ("embedding", "<f4", (embeddings.shape[1],))])
        records = np.empty(len(embeddings), dtype=kind)
        records["key"] = np.array(list(keys), dtype=f"V{_KEY_BYTES}")
        records["embedding"] = embeddings
        name = f"embeddings-{len(self._files):06d}-{uuid.uuid4().hex[:8]}.npy"
        write_atomically(self.folder / name, records)
        self._register(name)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Read embeddings by number, ``(n, D)``."""
        numbers = np.asarray(numbers)
        out = np.empty((len(numbers), self.dimension or 0), dtype=np.float32)
        files = np.searchsorted(self._starts, numbers, side="right") - 1
        for file in np.unique(files).tolist():
            places = np.flatnonzero(files == file)
            out[places] = self._records(file)["embedding"][numbers[places] - self._starts[file]]
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
        return {**self.__dict__, "_open": {}, "numbers": {}}

    def _records(self, file: int) -> np.ndarray:
        if file not in self._open:
            path = self.folder / self._files[file]
            try:
                self._open[file] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{path} is damaged ({error}). Delete it; its texts are embedded again.") from error
        return self._open[file]

    def _register(self, name: str) -> None:
        self._files.append(name)
        records = self._records(len(self._files) - 1)
        dimension = records.dtype["embedding"].shape[0]
        if self.dimension not in (None, dimension):
            raise ValueError(
                f"{self.folder} holds embeddings of {self.dimension} and of {dimension} numbers ({name}). Two teachers "
                "have used one name: delete the folder, or give another `teacher_name`."
            )
        self.dimension = dimension
        for place, key in enumerate(records["key"].tolist()):
            self.numbers.setdefault(key, self._starts[-1] + place)
        self._starts.append(self._starts[-1] + len(records))
