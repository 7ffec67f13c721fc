"""The part files of an encoded corpus, in two formats; a part is there whole or not at all."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unime_st.files import checksum, write_atomically

_KEY_BYTES = 16
_CHECKSUM = "unime_st.checksum"


class DamagedPartError(ValueError):
    """A part file does not hold what was written."""


def part_checksum(keys: Sequence[bytes], embeddings: np.ndarray, ids: Sequence[Any] | None) -> str:
    """The checksum of the whole content of a part."""
    return checksum(b"".join(keys), embeddings, "" if ids is None else json.dumps(list(ids)))


class Parts(ABC):
    """The part files of one folder, numbered from 0; a part is there when its file of embeddings is.

    Each carries a checksum, compared when it is first read; parts of format version 1 have none (``verified=False``).
    """

    suffix: str

    def __init__(self, folder: Path, *, verified: bool = True) -> None:
        self.folder = folder
        self.verified = verified
        self._sound: set[int] = set()  # the parts whose checksum was compared

    def path(self, number: int) -> Path:
        """The file of a part's embeddings."""
        return self.folder / f"part-{number:06d}{self.suffix}"

    def numbers(self) -> list[int]:
        """The numbers of the parts that were written, in order."""
        names = [path.stem.partition("-")[2] for path in self.folder.glob(f"part-*{self.suffix}")]
        return sorted(int(name) for name in names if name.isdecimal())  # other tools may add files with other names

    @abstractmethod
    def write(self, number: int, start: int, keys: Sequence[bytes], embeddings: np.ndarray, ids: list | None) -> None:
        """Write a part: fingerprints, embeddings ``(n, D)`` and ids of the rows from ``start`` on."""

    def check(self, number: int) -> None:
        """Compare a part with its checksum, once, and raise ``DamagedPartError`` if they differ."""
        if self.verified and number not in self._sound:
            if self._stored_checksum(number) != self._checksum(number):
                raise self.unreadable(self.path(number), ValueError("its bytes are not those that were written"))
            self._sound.add(number)

    def recorded_checksum(self, number: int) -> str:
        """A part's checksum as it was written, from the head of its file; computed where none was."""
        return self._stored_checksum(number) if self.verified else self._checksum(number)

    def _checksum(self, number: int) -> str:
        ids = self._read_ids(number) if self._has_ids(number) else None
        return part_checksum(self._read_keys(number), self._read_embeddings(number), ids)

    def embeddings(self, number: int) -> np.ndarray:
        """Read a part's embeddings ``(n, D)``, through a memory map where the format allows it."""
        self.check(number)
        return self._read_embeddings(number)

    def keys(self, number: int) -> list[bytes]:
        """Read the fingerprints of a part's inputs."""
        self.check(number)
        return self._read_keys(number)

    def ids(self, number: int) -> list[Any]:
        """Read the ids of a part's inputs."""
        self.check(number)
        return self._read_ids(number)

    @abstractmethod
    def rows(self, number: int) -> int:
        """The number of rows of a part, from the head of its file."""

    @abstractmethod
    def _stored_checksum(self, number: int) -> str: ...

    @abstractmethod
    def _has_ids(self, number: int) -> bool: ...

    @abstractmethod
    def _read_embeddings(self, number: int) -> np.ndarray: ...

    @abstractmethod
    def _read_keys(self, number: int) -> list[bytes]: ...

    @abstractmethod
    def _read_ids(self, number: int) -> list[Any]: ...

    def _named(self, path: Path, error: Exception) -> Exception:
        """An error that names the file, for whatever a library raised; errors of the disk stay as they are."""
        of_disk = isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)
        return error if of_disk else self.unreadable(path, error)

    def unreadable(self, path: Path, error: Exception) -> Exception:
        """The error for a file that is missing or damaged."""
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(
                f"There is no {path}: it was deleted, or another process has yet to write it. Call `encode_corpus` as "
                "before to have it written."
            )
        return DamagedPartError(
            f"{path} is damaged ({error}). Delete {self.path(int(path.stem.partition('-')[2]))} and call "
            "`encode_corpus` again: that part alone is encoded anew."
        )


class ParquetParts(Parts):
    """One parquet file per part: ``row``, ``id`` where there are ids, ``embedding``, ``fingerprint``."""

    suffix = ".parquet"

    def write(self, number: int, start: int, keys: Sequence[bytes], embeddings: np.ndarray, ids: list | None) -> None:
        """Write a part as one parquet file."""
        flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
        columns = {
            "row": pa.array(np.arange(start, start + len(keys))),
            **({} if ids is None else {"id": pa.array(ids, None if isinstance(ids[0], str) else pa.int64())}),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]),
            "fingerprint": pa.array(keys, pa.binary()),
        }
        sink = pa.BufferOutputStream()
        table = pa.table(columns).replace_schema_metadata({_CHECKSUM: part_checksum(keys, embeddings, ids)})
        # Neither a dictionary nor statistics help with embeddings.
        options: dict[str, Any] = {"use_dictionary": False, "write_statistics": ["row"], "write_page_checksum": True}
        pq.write_table(table, sink, **options)
        write_atomically(self.path(number), sink.getvalue().to_pybytes())
        self._sound.discard(number)

    def rows(self, number: int) -> int:
        """The number of rows of a part, from the parquet metadata."""
        return self._opened(number, lambda file: file.metadata.num_rows)

    def _stored_checksum(self, number: int) -> str:
        metadata = self._opened(number, lambda file: file.schema_arrow.metadata) or {}
        return metadata.get(_CHECKSUM.encode(), b"").decode("ascii", "replace")

    def _has_ids(self, number: int) -> bool:
        return "id" in self._opened(number, lambda file: file.schema_arrow.names)

    def _read_embeddings(self, number: int) -> np.ndarray:
        column = self._column(number, "embedding")
        if not pa.types.is_fixed_size_list(column.type):
            raise self.unreadable(self.path(number), ValueError(f"its embeddings are of type {column.type}"))
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)

    def _read_keys(self, number: int) -> list[bytes]:
        return self._column(number, "fingerprint").to_pylist()

    def _read_ids(self, number: int) -> list[Any]:
        return self._column(number, "id").to_pylist()

    def _column(self, number: int, name: str) -> Any:
        return self._opened(number, lambda file: pa.concat_arrays(file.read(columns=[name]).column(name).chunks))

    def _opened(self, number: int, read: Callable[[pq.ParquetFile], Any]) -> Any:
        path = self.path(number)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return read(file)
        except Exception as error:
            raise self._named(path, error) from error


class NpyParts(Parts):
    """One array ``(n, D)`` per part; in folders beside, ids and fingerprints ``(n + 1, 16)``, the last a checksum."""

    suffix = ".npy"

    def write(self, number: int, start: int, keys: Sequence[bytes], embeddings: np.ndarray, ids: list | None) -> None:  # noqa: ARG002 (its number says where it starts)
        """Write a part; the embeddings come last, because they make the part count as there."""
        name = self.path(number).name
        total = bytes.fromhex(part_checksum(keys, embeddings, ids))
        packed = np.frombuffer(b"".join([*keys, total]), dtype=np.uint8).reshape(len(keys) + 1, _KEY_BYTES)
        write_atomically(self.folder / "fingerprints" / name, packed)
        if ids is not None:
            write_atomically(self.folder / "ids" / name, np.array(ids, None if isinstance(ids[0], str) else np.int64))
        write_atomically(self.path(number), embeddings)
        self._sound.discard(number)

    def rows(self, number: int) -> int:
        """The number of rows of a part, from the header of its array."""
        return len(self._load(self.path(number)))

    def _stored_checksum(self, number: int) -> str:
        rows = self._fingerprints(number)
        return rows[-1].tobytes().hex() if len(rows) else ""

    def _has_ids(self, number: int) -> bool:
        return (self.folder / "ids" / self.path(number).name).exists()

    def _read_embeddings(self, number: int) -> np.ndarray:
        return self._load(self.path(number))

    def _read_keys(self, number: int) -> list[bytes]:
        rows = self._fingerprints(number)
        return [row.tobytes() for row in (rows[:-1] if self.verified else rows)]

    def _read_ids(self, number: int) -> list[Any]:
        return self._load(self.folder / "ids" / self.path(number).name).tolist()

    def _fingerprints(self, number: int) -> np.ndarray:
        return self._load(self.folder / "fingerprints" / self.path(number).name)

    def _load(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:
            raise self._named(path, error) from error


FORMATS: dict[str, type[Parts]] = {"parquet": ParquetParts, "npy": NpyParts}
