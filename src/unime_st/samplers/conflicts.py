"""Which rows of a training set are false negatives of each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Conflicts:
    """Rows that may not meet: those that share a key, and pairs of neighbours.

    Attributes:
        keys: ``(N, kinds)`` numbers in [0, ``num_keys``), each kind with its own range; -1 where nobody shares it.
        num_keys: How many shared keys there are.
        starts: ``(N + 1,)``: row ``i``'s neighbours are ``neighbours[starts[i]:starts[i + 1]]``.
        neighbours: Row numbers.
    """

    keys: np.ndarray
    num_keys: int
    starts: np.ndarray
    neighbours: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def key_sizes(self) -> np.ndarray:
        """Rows that share each key, ``(num_keys,)``."""
        return np.bincount(self.keys[self.keys >= 0], minlength=self.num_keys)

    def degrees(self) -> np.ndarray:
        """How many rows each row conflicts with, at most; 0 for a row that fits anywhere. ``(N,)``."""
        return (self._sizes_by_row() - 1).sum(axis=1) + np.diff(self.starts)

    def heaviest_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """The most shared key of each row, -1 for none, and how many rows share it, 1 for none; both ``(N,)``."""
        if self.keys.shape[1] == 0:
            return np.full(len(self), -1), np.ones(len(self), dtype=np.int64)
        sizes = self._sizes_by_row()
        kind = sizes.argmax(axis=1)[:, None]
        return np.take_along_axis(self.keys, kind, 1)[:, 0], np.take_along_axis(sizes, kind, 1)[:, 0]

    def _sizes_by_row(self) -> np.ndarray:
        return np.append(self.key_sizes(), 1)[self.keys]  # the last stands for "no key"

    def take(self, rows: np.ndarray) -> Conflicts:
        """The conflicts among some rows, which are numbered anew in the order given; keys keep their numbers.

        Example:
            >>> every = find_conflicts([np.array([7, 8, 7, 8])], np.array([[1, 2], [0, 3]]), 4)
            >>> conflicts = every.take(np.array([2, 1]))
            >>> conflicts.keys.tolist(), conflicts.neighbours_of(0).tolist(), conflicts.neighbours_of(1).tolist()
            ([[0], [1]], [1], [0])
        """
        number = np.full(len(self), -1, dtype=np.int32)
        number[rows] = np.arange(len(rows), dtype=np.int32)
        lengths = np.diff(self.starts)[rows]
        ends = np.cumsum(lengths)
        at = np.repeat(self.starts[rows] - (ends - lengths), lengths) + np.arange(int(lengths.sum()))
        owners = np.repeat(np.arange(len(rows)), lengths)
        neighbours = number[self.neighbours[at]]
        inside = neighbours >= 0
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners[inside], minlength=len(rows)))])
        return Conflicts(self.keys[rows], self.num_keys, starts, neighbours[inside])

    def neighbours_of(self, row: int) -> np.ndarray:
        """Rows too similar to this one, by the guide."""
        return self.neighbours[self.starts[row] : self.starts[row + 1]]


def find_conflicts(identities: Iterable[np.ndarray], pairs: np.ndarray | None, rows: int) -> Conflicts:
    """Gather what is known about rows into one table.

    Args:
        identities: Arrays ``(N,)``; rows with an equal value in one of them conflict.
        pairs: ``(P, 2)`` further pairs of rows, in any order and direction.
        rows: ``N``.

    Example:
        >>> conflicts = find_conflicts([np.array([7, 8, 7])], np.array([[1, 2]]), 3)
        >>> conflicts.keys.tolist(), conflicts.neighbours_of(2).tolist(), conflicts.degrees().tolist()
        ([[0], [-1], [0]], [1], [1, 1, 2])
    """
    columns, num_keys = [], 0
    for values in identities:
        _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
        shared = counts > 1
        numbers = np.where(shared, np.cumsum(shared) - 1 + num_keys, -1)
        columns.append(numbers[codes].astype(np.int32))
        num_keys += int(shared.sum())
    keys = np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.int32)
    starts, neighbours = _both_ways(np.empty((0, 2), dtype=np.int64) if pairs is None else pairs, rows)
    return Conflicts(keys, num_keys, starts, neighbours)


def _both_ways(pairs: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's neighbours, whichever way round their pairs are; sorted in place, for there may be many millions."""
    count = len(pairs)
    flat = np.empty(2 * count, dtype=np.int64)
    for part, first in ((flat[:count], 0), (flat[count:], 1)):
        np.multiply(pairs[:, first], rows, out=part, dtype=np.int64)
        np.add(part, pairs[:, 1 - first], out=part)
    flat.sort()
    new = np.ones(len(flat), dtype=bool)
    new[1:] = flat[1:] != flat[:-1]
    new &= flat % (rows + 1) != 0  # row * rows + row: a row beside itself
    flat = flat[new]
    return np.searchsorted(flat, np.arange(rows + 1) * rows), (flat % max(rows, 1)).astype(np.int32)
