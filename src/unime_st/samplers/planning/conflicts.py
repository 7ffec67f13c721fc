"""Finds which rows of a training set are false negatives of each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Conflicts:
    """Rows that may not meet: rows that share a key, and pairs of neighbours."""

    keys: np.ndarray  # (N, kinds) in [0, num_keys), a range of its own for each kind; -1 where no other row shares it
    num_keys: int
    starts: np.ndarray  # (N + 1,) the neighbours of row i are neighbours[starts[i]:starts[i + 1]]
    neighbours: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def key_sizes(self) -> np.ndarray:
        """The number of rows that share each key, ``(num_keys,)``."""
        return np.bincount(self.keys[self.keys >= 0], minlength=self.num_keys)

    def degrees(self) -> np.ndarray:
        """An upper bound on the rows that each row conflicts with; 0 for a row that fits anywhere. ``(N,)``."""
        return (self._sizes_by_row() - 1).sum(axis=1) + np.diff(self.starts)

    def heaviest_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Each row's most shared key (-1 for none), and how many rows share it (1 for none); both ``(N,)``."""
        if self.keys.shape[1] == 0:
            return np.full(len(self), -1), np.ones(len(self), dtype=np.int64)
        sizes = self._sizes_by_row()
        kind = sizes.argmax(axis=1)[:, None]
        return np.take_along_axis(self.keys, kind, 1)[:, 0], np.take_along_axis(sizes, kind, 1)[:, 0]

    def _sizes_by_row(self) -> np.ndarray:
        return np.append(self.key_sizes(), 1)[self.keys]  # the appended entry stands for "no key"

    def take(self, rows: np.ndarray) -> Conflicts:
        """The conflicts among some rows, which are renumbered in the order given; keys keep their numbers.

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
        """The rows that the guide finds too similar to this one."""
        return self.neighbours[self.starts[row] : self.starts[row + 1]]


def find_conflicts(identities: Iterable[np.ndarray], pairs: np.ndarray | None, rows: int) -> Conflicts:
    """Gather the conflicts of ``N`` rows.

    Rows conflict when they have an equal value in one of the ``identities`` ``(N,)``, or are one of the ``pairs``
    ``(P, 2)``, which may come in any order and direction.
    """
    columns, num_keys = [], 0
    for values in identities:
        _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
        shared = counts > 1
        numbers = np.where(shared, np.cumsum(shared) - 1 + num_keys, -1)
        columns.append(numbers[codes].astype(np.int32))
        num_keys += int(shared.sum())
    keys = np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.int32)
    starts, neighbours = both_ways(np.empty((0, 2), dtype=np.int64) if pairs is None else pairs, rows)
    return Conflicts(keys, num_keys, starts, neighbours)


def both_ways(pairs: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The starts and neighbours of each row from undirected pairs; sorted in place, to spare memory."""
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
