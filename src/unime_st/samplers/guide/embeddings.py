"""Guide embeddings, in memory or in a file that is read piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_READ_ROWS = 16384


class GuideEmbeddings:
    """One embedding per row, read a piece at a time, so that a file is never whole in memory in its own format.

    ``name`` is the argument that errors speak of; ``given`` is ``(rows, D)``, or the path of an ``.npy`` file.
    """

    def __init__(self, name: str, given: Any, rows: int) -> None:
        if isinstance(given, torch.Tensor):  # numpy has no bfloat16
            given = given.detach().cpu().float().numpy()
        self.name, self._given, self.rows = name, given, rows
        if isinstance(given, (str, Path)) and not Path(given).is_file():
            raise FileNotFoundError(
                f"`{name}={str(given)!r}`, but there is no such file. Give an .npy file or an array."
            )
        try:
            opened: Any = self._open()
        except (EOFError, ValueError) as error:
            raise ValueError(f"`{name}={str(given)!r}` cannot be read as an .npy file: {error}") from error
        if not isinstance(opened, np.ndarray) or opened.dtype.kind not in "fiu":
            raise TypeError(f"`{name}` must be an array of numbers, or an .npy file of one.")
        shape = opened.shape
        if len(shape) != 2 or shape[0] != rows:
            raise ValueError(
                f"`{name}` has shape {tuple(shape)}, but one embedding a row is needed: ({rows}, D), in the data set's "
                "order."
            )
        self.dim = int(shape[1])

    def _open(self) -> np.ndarray:
        # Opened anew for each piece: pages of a map that is closed no longer count as this process's memory.
        return np.load(self._given, mmap_mode="r") if isinstance(self._given, (str, Path)) else np.asarray(self._given)

    def _pieces(self) -> Iterator[np.ndarray]:
        for start in range(0, self.rows, _READ_ROWS):
            yield np.ascontiguousarray(self._open()[start : start + _READ_ROWS])

    def digest(self) -> str:
        """The hash of the whole content."""
        total = hashlib.blake2b(digest_size=16)
        for piece in self._pieces():
            total.update(f"{piece.dtype.str}{piece.shape}".encode())
            total.update(piece.view(np.uint8).data)
        return total.hexdigest()

    def unit_rows(self) -> torch.Tensor:
        """The rows scaled to length 1, float32, ``(N, D)``; a row of zeros or of numbers not finite is refused."""
        unit = torch.empty(self.rows, self.dim)
        for number, piece in enumerate(self._pieces()):
            tensor, start = torch.from_numpy(piece.astype(np.float32)), number * _READ_ROWS
            lengths = torch.linalg.vector_norm(tensor, dim=1, keepdim=True)
            if not bool(torch.isfinite(lengths).all()):
                row = start + int((~torch.isfinite(lengths)).nonzero()[0, 0])
                raise ValueError(
                    f"`{self.name}` holds a number that is not finite, first in row {row}. Embed that row again."
                )
            if not bool(lengths.all()):
                row = start + int((lengths == 0).nonzero()[0, 0])
                raise ValueError(
                    f"`{self.name}` holds nothing but zeros in row {row}, which is like nothing. Embed that row again."
                )
            torch.div(tensor, lengths, out=unit[start : start + len(piece)])
        return unit

    def twins(self) -> np.ndarray:
        """For each row, the first row whose embedding is the same to the bit; ``(N,)``."""
        hashes = np.concatenate([_row_hashes(piece) for piece in self._pieces()] or [np.empty(0, np.uint64)])
        _, first, codes = np.unique(hashes, return_index=True, return_inverse=True)
        return first[codes]


def _row_hashes(rows: np.ndarray) -> np.ndarray:
    """A 64-bit hash per row: words are mixed, then summed with random factors (two rows collide by 2^-64)."""
    raw = rows.view(np.uint8).reshape(len(rows), -1)
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8)))
    words = np.ascontiguousarray(raw).view(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(32)
    words *= factors
    words ^= words >> np.uint64(29)
    return words.sum(axis=1, dtype=np.uint64)
