"""The part files of an encoded corpus, in two formats: there whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unime_st.files import write_atomically

_KEY_BYTES = 16
_UNREADABLE = (ValueError, EOFError, pa.ArrowInvalid, FileNotFoundError)


class Parts(ABC):
    """The part files of one folder, numbered from 0; a part is there when its file of embeddings is.

    Args:
        folder: Where they are.
    """

    suffix: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        """File that holds a part's embeddings."""
        return self.folder / f"part-{number:06d}{self.suffix}"

    def exists(self, number: int) -> bool:
        """Whether a part was written."""
        return self.path(number).exists()

    def numbers(self) -> list[int]:
        """The parts that were written, in order."""
        return sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob(f"part-*{self.suffix}"))

    @abstractmethod
    def write(self, number: int, start: int, keys: Sequence[bytes], embeddings: np.ndarray, ids: list | None) -> None:
        """Write a part: fingerprints, embeddings ``(n, D)`` and ids of the rows from ``start`` on."""

    @abstractmethod
    def embeddings(self, number: int) -> np.ndarray:
        """Read a part's embeddings ``(n, D)``, through a memory map where the format allows it."""

    @abstractmethod
    def keys(self, number: int) -> list[bytes]:
        """Read the fingerprints of a part's inputs."""

    @abstractmethod
    def ids(self, number: int) -> list[Any]:
        """Read the ids of a part's inputs."""

    def unreadable(self, path: Path, error: Exception) -> Exception:
        """The error for a file that is missing or damaged."""
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(
                f"There is no {path}: it was deleted, or another process has yet to write it. Call `encode_corpus` as "
                "before to have it written."
            )
        return ValueError(
            f"{path} is damaged ({error}). Delete {self.path(int(path.stem.partition('-')[2]))} and call "
            "`encode_corpus` again: that part alone is encoded anew."
        )


class ParquetParts(Parts):
    """One parquet file a part: ``row``, ``id`` where there are ids, ``embedding``, ``fingerprint``."""

    suffix = ".parquet"

    def write(self, number: int, start: int, keys: Sequence[bytes], embeddings: np.ndarray, ids: list | None) -> None:
        """See :meth:`Parts.write`."""
        flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
        columns = {
            "row": pa.array(np.arange(start, start + len(keys))),
            **({} if ids is None else {"id": pa.array(ids, None if isinstance(ids[0], str) else pa.int64())}),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]),
            "fingerprint": pa.array(keys, pa.binary()),
        }
        sink = pa.BufferOutputStream()
        # Neither a dictionary nor statistics help with embeddings.
        options: dict[str, Any] = {"use_dictionary": False, "write_statistics": ["row"], "write_page_checksum": True}
        pq.write_table(pa.table(columns), sink, **options)
        write_atomically(self.path(number), sink.getvalue().to_pybytes())

    def embeddings(self, number: int) -> np.ndarray:
        """See :meth:`Parts.embeddings`."""
        column = self._column(number, "embedding")
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)

    def keys(self, number: int) -> list[bytes]:
        """See :meth:`Parts.keys`."""
        return self._column(number, "fingerprint").to_pylist()

    def ids(self, number: int) -> list[Any]:
        """See :meth:`Parts.ids`."""
        return self._column(number, "id").to_pylist()

    def _column(self, number: int, name: str) -> Any:
        path = self.path(number)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return pa.concat_arrays(file.read(columns=[name]).column(name).chunks)
        except OSError as error:
            if error.errno is not None:  # of the disk; pyarrow's own have none
                raise self.unreadable(path, error) if isinstance(error, FileNotFoundError) else error from error
            raise self.unreadable(path, error) from error
        except _UNREADABLE as error:
            raise self.unreadable(path, error) from error


class NpyParts(Parts):
    """One array ``(n, D)`` a part; fingerprints ``(n, 16)`` and ids in folders beside."""

    suffix = ".npy"

    def write(self, number: int, start: int, keys: Sequence[bytes], embeddings: np.ndarray, ids: list | None) -> None:  # noqa: ARG002 (its place says where it starts)
        """See :meth:`Parts.write`; the embeddings come last, for with them the part is there."""
        name = self.path(number).name
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), _KEY_BYTES)
        write_atomically(self.folder / "fingerprints" / name, packed)
        if ids is not None:
            write_atomically(self.folder / "ids" / name, np.array(ids, None if isinstance(ids[0], str) else np.int64))
        write_atomically(self.path(number), embeddings)

    def embeddings(self, number: int) -> np.ndarray:
        """See :meth:`Parts.embeddings`."""
        return self._load(self.path(number))

    def keys(self, number: int) -> list[bytes]:
        """See :meth:`Parts.keys`."""
        return [row.tobytes() for row in self._load(self.folder / "fingerprints" / self.path(number).name)]

    def ids(self, number: int) -> list[Any]:
        """See :meth:`Parts.ids`."""
        return self._load(self.folder / "ids" / self.path(number).name).tolist()

    def _load(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except _UNREADABLE as error:
            raise self.unreadable(path, error) from error


FORMATS: dict[str, type[Parts]] = {"parquet": ParquetParts, "npy": NpyParts}
