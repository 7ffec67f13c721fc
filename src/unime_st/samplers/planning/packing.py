"""Packing rows into bins of equal size, so that no two rows of a bin conflict."""

from __future__ import annotations

import heapq
from collections.abc import Set as AbstractSet

import numpy as np

from unime_st.samplers.planning.conflicts import Conflicts

_BLOCK = 4096
_LOOKS = 32
_NONE: frozenset[int] = frozenset()


def pack(conflicts: Conflicts, num_bins: int, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Place ``N`` rows into bins at random, and return the bin of each row ``(N,)``, -1 for rows that found no place.

    Rows with the most shared keys come first, each into the emptiest bin that it fits. Dealing out one class after the
    other keeps all bins equally full, so with a single kind of key this fills every bin whenever that is possible; with
    several kinds it does well. Rows that fit anywhere are dealt out last.
    """
    degrees = conflicts.degrees()
    key, weight = conflicts.heaviest_keys()
    weight = np.maximum(weight, 1 + np.diff(conflicts.starts))
    among_equals = np.append(rng.random(conflicts.num_keys), 1.0)[key]
    order = np.lexsort((rng.random(len(conflicts)), -degrees, among_equals, -weight))
    bound, free = np.split(order, [int((degrees > 0).sum())])
    bins = np.full(len(conflicts), -1, dtype=np.int64)
    fill = np.zeros(num_bins, dtype=np.int64)
    if num_bins:
        _place_bound(conflicts, bound, bins, fill, capacity=capacity, rng=rng)
    slots = rng.permutation(np.repeat(np.arange(num_bins), capacity - fill))
    placed = min(len(slots), len(free))
    bins[free[:placed]] = slots[:placed]
    return bins


def _place_bound(
    conflicts: Conflicts,
    bound: np.ndarray,
    bins: np.ndarray,
    fill: np.ndarray,
    *,
    capacity: int,
    rng: np.random.Generator,
) -> None:
    """Place the rows that conflict with some other; writes ``bins`` and ``fill``."""
    open_bins = _OpenBins(conflicts, fill, capacity, rng)
    noise = rng.random(len(bound)).tolist()
    near = (conflicts.starts[bound + 1] > conflicts.starts[bound]).tolist()
    position = 0
    for start in range(0, len(bound), _BLOCK):
        block = bound[start : start + _BLOCK]
        for row, row_keys in zip(block.tolist(), conflicts.keys[block].tolist(), strict=True):
            keys = [key for key in row_keys if key >= 0]
            best = open_bins.emptiest(
                keys, set(bins[conflicts.neighbours_of(row)].tolist()) if near[position] else _NONE
            )
            if best >= 0:
                bins[row] = best
                open_bins.put(best, keys, noise[position])
            position += 1


class _OpenBins:
    """The bins that are not full, emptiest first, and the keys in them."""

    def __init__(self, conflicts: Conflicts, fill: np.ndarray, capacity: int, rng: np.random.Generator) -> None:
        self.num_bins, self.fill, self.capacity = len(fill), fill, capacity
        self.priority = rng.random(len(fill))  # rows in the bin plus a random number below one; inf when full
        self.heap = list(zip(self.priority.tolist(), range(len(fill)), strict=True))
        heapq.heapify(self.heap)
        first = np.concatenate([[0], np.cumsum(conflicts.key_sizes())])
        self.held = np.empty(int(first[-1]), dtype=np.int32)  # the bins that hold a key: from `first` up to `end`
        self.first: list[int] = first.tolist()
        self.end = self.first[:-1]
        self.keys: list[set[int]] = [set() for _ in range(len(fill))]

    def emptiest(self, keys: list[int], closed: AbstractSet[int]) -> int:
        """The emptiest open bin that holds none of these keys and is not closed; -1 when there is none."""
        for key in keys:
            if self.end[key] - self.first[key] == self.num_bins:
                return -1
        passed: list[tuple[float, int]] = []
        best = -1
        while self.heap and len(passed) < _LOOKS:
            priority, number = self.heap[0]
            if priority != self.priority[number]:  # outdated, since a row was put there
                heapq.heappop(self.heap)
            elif number in closed or not self.keys[number].isdisjoint(keys):
                passed.append(heapq.heappop(self.heap))
            else:
                best = number
                break
        if best < 0 and self.heap:
            best = self._emptiest_of_all(keys, closed)
        for entry in passed:
            heapq.heappush(self.heap, entry)
        return best

    def _emptiest_of_all(self, keys: list[int], closed: AbstractSet[int]) -> int:
        """The same result by one look at every bin, for when many bins have to be passed over."""
        blocked = np.concatenate(
            [np.fromiter(closed - {-1}, dtype=np.int64), *(self.held[self.first[key] : self.end[key]] for key in keys)]
        )
        kept = self.priority[blocked]
        self.priority[blocked] = np.inf
        best = int(self.priority.argmin())
        found = self.priority[best] < np.inf
        self.priority[blocked] = kept
        return best if found else -1

    def put(self, number: int, keys: list[int], noise: float) -> None:
        """Count a row into a bin."""
        self.fill[number] += 1
        full = self.fill[number] == self.capacity
        self.priority[number] = priority = np.inf if full else float(self.fill[number]) + noise
        if not full:
            heapq.heappush(self.heap, (priority, number))
        self.keys[number].update(keys)
        for key in keys:
            self.held[self.end[key]] = number
            self.end[key] += 1


def compatible(conflicts: Conflicts, rows: np.ndarray, limit: int) -> np.ndarray:
    """The first rows, at most ``limit``, of which no two conflict.

    >>> from unime_st.samplers.planning.conflicts import find_conflicts
    >>> compatible(find_conflicts([np.array([5, 5, 6])], None, 3), np.array([0, 1, 2]), limit=3).tolist()
    [0, 2]
    """
    chosen: list[int] = []
    keys: set[int] = set()
    blocked: set[int] = set()
    for row in rows.tolist():
        if len(chosen) == limit:
            break
        own = {key for key in conflicts.keys[row].tolist() if key >= 0}
        if row in blocked or keys & own:
            continue
        chosen.append(row)
        keys |= own
        blocked.update(conflicts.neighbours_of(row).tolist())
    return np.asarray(chosen, dtype=np.int64)
