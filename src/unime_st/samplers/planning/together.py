"""Brings rows that should meet into the same bin, by exchanges that keep a packing valid."""

from __future__ import annotations

import numpy as np

from unime_st.samplers.planning.conflicts import Conflicts

_BLOCK = 4096
_VICTIMS = 4
_PASSES = 4
_LOOKS = 16
_BINS = 8


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


def draw_clusters(
    conflicts: Conflicts, bins: np.ndarray, clusters: np.ndarray, *, size: int, per_bin: int, rng: np.random.Generator
) -> np.ndarray:
    """Exchange rows between full bins so that clusters are whole, and return the new bins ``(N,)``.

    Random ones of the ``clusters`` ``(N,)`` (-1 for none) that are here with all their ``size`` rows, or of the rows in
    none where they are fewer, get a bin as their home, ``per_bin`` each. Their rows come to it in exchange for rows
    that are not at home there. As in :func:`draw_together`, bins stay full and free of conflicts: a row that conflicts
    with one that is at home stays away.
    """
    homes = _homes(conflicts, clusters, np.repeat(np.arange(int(bins.max(initial=-1)) + 1), per_bin), size, rng)
    table = _Table(conflicts, bins)
    strangers: list[list[int]] = [[] for _ in table.members]
    for row in rng.permutation(len(bins)).tolist():
        if homes[row] != table.bins[row]:
            strangers[table.bins[row]].append(row)
    for _ in range(_PASSES):
        for row in rng.permutation(len(bins)).tolist():
            if homes[row] not in (-1, table.bins[row]):
                _bring_home(table, row, homes, strangers)
    return np.asarray(table.bins, dtype=bins.dtype)


def _homes(
    conflicts: Conflicts, clusters: np.ndarray, slots: np.ndarray, size: int, rng: np.random.Generator
) -> list[int]:
    """The bin that each row should come to, one of the ``slots``, or -1 where it may be anywhere; ``(N,)``.

    Of a few random bins with room a cluster gets the one that has the fewest of its keys.
    """
    homes = np.full(len(clusters), -1)
    order = np.argsort(clusters, kind="stable")
    numbers, first, counts = np.unique(clusters[order], return_index=True, return_counts=True)
    # The rows in no cluster, fewer than one holds, come together too: strangers everywhere, they would never be drawn.
    units = rng.permutation(np.flatnonzero(np.where(numbers < 0, counts < size, counts == size)))
    taken: list[set[int]] = [set() for _ in range(int(slots.max(initial=-1)) + 1)]
    left = rng.permutation(slots).tolist()
    for unit, picks in zip(units.tolist(), rng.random((len(units), _BINS)).tolist(), strict=True):
        if not left:
            break
        rows = order[first[unit] : first[unit] + counts[unit]]
        keys = set(conflicts.keys[rows].ravel().tolist()) - {-1}
        place = min((int(pick * len(left)) for pick in picks), key=lambda at: len(keys & taken[left[at]]))
        left[place], left[-1] = left[-1], left[place]
        homes[rows] = home = left.pop()
        taken[home] |= keys
    return homes.tolist()


def _bring_home(table: _Table, row: int, homes: list[int], strangers: list[list[int]]) -> None:
    """Exchange a row with a stranger in its home; ``strangers`` of a bin may name rows that have left it since."""
    home, away = homes[row], table.bins[row]
    refused: list[int] = []
    while strangers[home] and len(refused) < _LOOKS:
        other = strangers[home].pop()
        if table.bins[other] != home or homes[other] == home:
            continue
        if table.exchange(row, other):
            if homes[other] != away:
                strangers[away].append(other)
            break
        refused.append(other)
    strangers[home].extend(reversed(refused))


class _Table:
    """The rows and the taken keys of each bin, in plain lists, which are faster than arrays one element at a time.

    A bin more, of number -1, has the rows in no bin, which may conflict.
    """

    def __init__(self, conflicts: Conflicts, bins: np.ndarray) -> None:
        self.neighbours, self.starts = conflicts.neighbours, conflicts.starts.tolist()
        self.bins: list[int] = bins.tolist()
        self.keys = [[key for key in row if key >= 0] for row in conflicts.keys.tolist()]
        count = int(bins.max(initial=-1)) + 1
        self.members: list[list[int]] = [[] for _ in range(count + 1)]
        self.taken: list[set[int]] = [set() for _ in range(count + 1)]
        self.place = [0] * len(self.bins)  # the position of each row among its bin's members
        for row, number in enumerate(self.bins):
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
        if target < 0:
            return True
        taken, bins = self.taken[target], self.bins
        for key in self.keys[row]:
            if key in taken and key not in self.keys[leaving]:
                return False
        start, end = self.starts[row], self.starts[row + 1]
        if start == end:
            return True
        return all(bins[other] != target or other == leaving for other in self.neighbours[start:end].tolist())
