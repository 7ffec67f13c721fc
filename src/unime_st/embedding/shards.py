"""The files of a section: keys and embeddings in safetensors, compared with their checksum in parts, read by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from unime_st.files import StoredArray, checksum

DAMAGE = (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""What is raised on reading a file that is no shard."""

_CHECKSUM = "checksum"
_LONGEST_HEADER = 1 << 20
_DTYPES: dict[str, np.dtype] = {"U8": np.dtype(np.uint8), "F32": np.dtype("<f4")}


def key_array(fingerprints: Sequence[str]) -> np.ndarray:
    """Hexadecimal fingerprints, all of one length, as bytes ``(n,)``."""
    packed = bytes.fromhex("".join(fingerprints))
    return np.frombuffer(packed, dtype=f"S{len(packed) // len(fingerprints)}")


def packed(keys: np.ndarray, embeddings: np.ndarray) -> bytes:
    """The content of a shard of these keys ``(n,)`` and embeddings ``(n, D)``."""
    plain = keys.view(np.uint8).reshape(len(keys), -1)
    return save({"keys": plain, "embeddings": embeddings}, {_CHECKSUM: checksum(plain, embeddings)})


@dataclass(frozen=True, eq=False)
class Shard:
    """A file that is as it was written: its keys in memory, its embeddings on disk."""

    path: Path
    keys: np.ndarray  # (n,)
    embeddings: StoredArray  # (n, D)

    @property
    def num_bytes(self) -> int:
        """Bytes of its embeddings."""
        return self.embeddings.num_bytes

    def rows(self, numbers: np.ndarray | None = None) -> np.ndarray:
        """Read embeddings by number, or all, ``(m, D)``."""
        return self.embeddings.rows(np.arange(len(self.keys)) if numbers is None else numbers)


def open_shard(path: Path) -> Shard:
    """Open a file and compare it with its checksum, in parts.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged; see :data:`DAMAGE` for what else is raised then.
    """
    keys, embeddings, told = _layout(path)
    if keys.shape[0] != embeddings.shape[0] or 0 in (*keys.shape, *embeddings.shape):
        raise ValueError(f"it holds keys {keys.shape} and embeddings {embeddings.shape}")
    plain = keys.rows(np.arange(keys.shape[0]))
    if told != checksum(plain, embeddings):
        raise ValueError("its checksum is another")
    return Shard(path, plain.view(f"S{plain.shape[1]}").reshape(-1), embeddings)


def just_written(path: Path, keys: np.ndarray) -> Shard:
    """A shard that this process has written, of these keys ``(n,)``: its content is not read again."""
    _, embeddings, _ = _layout(path)
    return Shard(path, keys, embeddings)


def _layout(path: Path) -> tuple[StoredArray, StoredArray, Any]:
    """Where keys and embeddings lie, and the checksum that the file tells."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(file.read(length))
    arrays = [_stored(path, header[name], 8 + length, size) for name in ("keys", "embeddings")]
    return arrays[0], arrays[1], header.get("__metadata__", {}).get(_CHECKSUM)


def _stored(path: Path, told: dict[str, Any], start: int, size: int) -> StoredArray:
    first, last = told["data_offsets"]
    found = StoredArray(path, _DTYPES[told["dtype"]], tuple(told["shape"]), start + first)
    if len(found.shape) != 2 or found.num_bytes != last - first or not 0 <= first <= last <= size - start:
        raise ValueError(f"it holds {told}")
    return found


class Keys:
    """Which shard has which key: an index in memory of some 30 bytes a key."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self._index: tuple[np.ndarray, np.ndarray] | None = None  # distinct keys in order, and the number of each

    def __len__(self) -> int:
        return len(self._sorted()[0])

    def add(self, shard: Shard) -> None:
        """Take in a shard; of two with one key, the first counts."""
        self.shards.append(shard)
        self._index = None

    def remove(self, shard: Shard) -> None:
        """Leave out a shard that is gone."""
        self.shards.remove(shard)
        self._index = None

    def find(self, fingerprints: Sequence[str]) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each shard that has some of the fingerprints, with the places of these in the list and their rows in it."""
        keys, numbers = self._sorted()
        if not len(keys) or not len(fingerprints):
            return
        shards = list(self.shards)
        asked = np.array([bytes.fromhex(fingerprint) for fingerprint in fingerprints])
        at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        places = np.flatnonzero(keys[at] == asked)
        numbers = numbers[at[places]]
        starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        of = np.searchsorted(starts, numbers, side="right") - 1
        for number in np.unique(of):
            own = of == number
            yield shards[number], places[own], numbers[own] - starts[number]

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        if self._index is None:
            every = [shard.keys for shard in self.shards]
            self._index = np.unique(np.concatenate(every) if every else np.empty(0, "S1"), return_index=True)
        return self._index
