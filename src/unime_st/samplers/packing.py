"""Packing rows into bins of equal size, so that no two rows of a bin conflict."""

from __future__ import annotations

import numpy as np

from unime_st.samplers.conflicts import Conflicts


def pack(conflicts: Conflicts, num_bins: int, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Place rows into bins at random: the most shared keys first, each row into the emptiest bin that it fits.

    Dealing out one class after the other keeps all bins equally full, so when there is one kind of key only, this fills
    every bin whenever that is possible; with several kinds it does well. Rows that fit anywhere are dealt out last.

    Args:
        conflicts: Of ``N`` rows.
        num_bins: Global batches to fill.
        capacity: Rows a bin.
        rng: All choices are drawn from it.

    Returns:
        ``(N,)`` the bin of each row, -1 for rows that found no place.

    Example:
        >>> from unime_st.samplers.conflicts import find_conflicts
        >>> two_labels = find_conflicts([np.array([0, 0, 1, 1])], None, 4)
        >>> bins = pack(two_labels, num_bins=2, capacity=2, rng=np.random.default_rng(0))
        >>> sorted(bins[:2].tolist()), sorted(bins[2:].tolist())
        ([0, 1], [0, 1])
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
    sizes = conflicts.key_sizes()
    first = np.concatenate([[0], np.cumsum(sizes)])  # where the list of bins that hold a key begins
    held = np.empty(int(first[-1]), dtype=np.int64)
    end = first[:-1].copy()
    noise = rng.random(len(bound))
    priority = rng.random(len(fill))  # rows in the bin, and less than one of chance; inf when full
    row_keys = [row[row >= 0].tolist() for row in conflicts.keys[bound]]
    for position, row in enumerate(bound.tolist()):
        taken = [held[first[key] : end[key]] for key in row_keys[position]]
        neighbours = bins[conflicts.neighbours_of(row)]
        taken.append(neighbours[neighbours >= 0])
        blocked = np.concatenate(taken)
        kept = priority[blocked]
        priority[blocked] = np.inf
        best = int(priority.argmin())
        found = priority[best] < np.inf
        priority[blocked] = kept
        if not found:
            continue
        bins[row] = best
        fill[best] += 1
        priority[best] = fill[best] + noise[position] if fill[best] < capacity else np.inf
        for key in row_keys[position]:
            held[end[key]] = best
            end[key] += 1


def compatible(conflicts: Conflicts, rows: np.ndarray, limit: int) -> np.ndarray:
    """The first rows, at most ``limit``, of which no two conflict.

    Example:
        >>> from unime_st.samplers.conflicts import find_conflicts
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
