"""Brings rows and their hard negatives into the same bin, by exchanges that keep a packing valid."""

from __future__ import annotations

import numpy as np

from unime_st.samplers.planning.conflicts import Conflicts

_BLOCK = 4096
_VICTIMS = 4


def draw_together(conflicts: Conflicts, bins: np.ndarray, hardest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exchange rows between bins so that rows meet their hard negatives, and return the new bins ``(N,)``.

    Rows are visited at random; each fetches its hard negatives ``(N, k)`` (-1 for none) into its bin, where they stay,
    in exchange for rows that nobody wants there. An exchange that would bring conflicting rows together is not made, so
    bins ``(N,)`` (-1 for none) stay as full and as free of conflicts as they were.
    """
    table = _Table(conflicts, bins)
    wanted = bytearray(len(bins))
    order = rng.permutation(len(bins))
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        picks = rng.random((len(block), hardest.shape[1], _VICTIMS)).tolist()
        for row, others, row_picks in zip(block.tolist(), hardest[block].tolist(), picks, strict=True):
            if table.bins[row] >= 0:
                wanted[row] = 1
                _fetch(table, row, others, row_picks, wanted)
    return np.asarray(table.bins, dtype=bins.dtype)


def _fetch(table: _Table, row: int, others: list[int], picks: list[list[float]], wanted: bytearray) -> None:
    """Bring a row's hard negatives to it, where no other row wants them elsewhere."""
    home = table.bins[row]
    members = table.members[home]
    for other, other_picks in zip(others, picks, strict=True):
        if other < 0 or wanted[other] or table.bins[other] < 0:
            continue
        if table.bins[other] == home:
            wanted[other] = 1
            continue
        for pick in other_picks:
            victim = members[int(pick * len(members))]
            if not wanted[victim] and table.exchange(other, victim):
                wanted[other] = 1
                break


class _Table:
    """The rows and the taken keys of each bin, in plain lists, which are faster than arrays one element at a time."""

    def __init__(self, conflicts: Conflicts, bins: np.ndarray) -> None:
        self.neighbours, self.starts = conflicts.neighbours, conflicts.starts.tolist()
        self.bins: list[int] = bins.tolist()
        self.keys = [[key for key in row if key >= 0] for row in conflicts.keys.tolist()]
        count = int(bins.max(initial=-1)) + 1
        self.members: list[list[int]] = [[] for _ in range(count)]
        self.taken: list[set[int]] = [set() for _ in range(count)]
        self.place = [0] * len(self.bins)  # the position of each row among its bin's members
        for row, number in enumerate(self.bins):
            if number >= 0:
                self.place[row] = len(self.members[number])
                self.members[number].append(row)
                self.taken[number].update(self.keys[row])

    def exchange(self, first: int, second: int) -> bool:
        """Exchange the bins of two rows unless that makes a conflict; return whether it was done."""
        home, away = self.bins[first], self.bins[second]
        if not (self._fits(first, away, second) and self._fits(second, home, first)):
            return False
        self.taken[home].difference_update(self.keys[first])
        self.taken[away].difference_update(self.keys[second])
        self.taken[away].update(self.keys[first])
        self.taken[home].update(self.keys[second])
        self.place[first], self.place[second] = self.place[second], self.place[first]
        self.bins[first], self.bins[second] = away, home
        self.members[away][self.place[first]] = first
        self.members[home][self.place[second]] = second
        return True

    def _fits(self, row: int, target: int, leaving: int) -> bool:
        taken, bins = self.taken[target], self.bins
        for key in self.keys[row]:
            if key in taken and key not in self.keys[leaving]:
                return False
        start, end = self.starts[row], self.starts[row + 1]
        if start == end:
            return True
        return all(bins[other] != target or other == leaving for other in self.neighbours[start:end].tolist())
