"""Plans which rows meet in which global batch of each epoch, by the seed and the epoch's number only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unime_st.samplers.planning.conflicts import Conflicts
from unime_st.samplers.planning.packing import compatible, pack
from unime_st.samplers.planning.together import draw_clusters, draw_together

logger = logging.getLogger(__name__)

_EPOCH_TRIES = 3
_SLOW_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """One epoch, or one pool's part of it."""

    full: np.ndarray  # (bins, W * B) the rows of each global batch
    tail: np.ndarray  # rows of the last, smaller one; empty with drop_last

    @property
    def rows(self) -> int:
        """The number of rows in all batches."""
        return self.full.size + len(self.tail)


@dataclass(frozen=True)
class HardRows:
    """Rows that should meet where they may."""

    hardest: np.ndarray  # (N, k) as in Neighbors: one row stands for all its twins
    twins: np.ndarray  # (N,)

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The rows that each of these rows should meet, renumbered; a random twin stands for each of them."""
        number = np.full(len(self.twins), -1, dtype=np.int32)
        number[rows] = np.arange(len(rows), dtype=np.int32)
        order = rows[np.argsort(self.twins[rows], kind="stable")]
        firsts = self.twins[order]
        wanted = self.hardest[rows]
        start, end = np.searchsorted(firsts, wanted), np.searchsorted(firsts, wanted, side="right")
        chosen = start + (rng.random(wanted.shape, dtype=np.float32) * (end - start)).astype(np.int64)
        there = (wanted >= 0) & (end > start)
        return np.where(there, number[order[np.minimum(chosen, len(order) - 1)]], -1)


@dataclass(frozen=True)
class Clusters:
    """Rows that should meet, all of a cluster in one batch."""

    numbers: np.ndarray  # (N,) the cluster of each row, -1 for none
    size: int

    def whole(self, batches: np.ndarray) -> int:
        """How many clusters are whole in one of the batches ``(bins, W * B)``."""
        numbers = self.numbers[batches].astype(np.int64)
        keys = np.arange(len(batches))[:, None] * (int(self.numbers.max(initial=0)) + 1) + numbers
        _, counts = np.unique(keys[numbers >= 0], return_counts=True)
        return int((counts == self.size).sum())


class Planner:
    """Draws the plan of each epoch.

    ``size`` is the number of rows per global batch, ``W * B``; ``max_rows`` bounds the rows of each data set in an
    epoch.
    """

    def __init__(
        self,
        conflicts: Conflicts,
        size: int,
        drop_last: bool,
        seed: int,
        *,
        subsets: np.ndarray | None = None,  # (N,) the data set of each row
        homogeneous: bool = False,
        max_rows: int | None = None,
        hard_rows: HardRows | None = None,
        clusters: Clusters | None = None,
    ) -> None:
        self.conflicts, self.size, self.drop_last, self.seed = conflicts, size, drop_last, seed
        self.homogeneous, self.max_rows, self.hard_rows, self.clusters = homogeneous, max_rows, hard_rows, clusters
        everything = [np.arange(len(conflicts))]
        by_subset = everything if subsets is None else split_by(subsets)
        self.pools = [[rows] for rows in by_subset] if homogeneous else [by_subset]
        self.base = [self._base_of(number) for number in range(len(self.pools))]
        tails = [len(plan.tail) for plan in self.base]
        self.tail_pool = int(np.argmax(tails)) if tails else 0

    @property
    def num_full(self) -> int:
        """The number of full global batches per epoch."""
        return sum(len(plan.full) for plan in self.base)

    @property
    def num_tail(self) -> int:
        """The number of rows of the last, smaller global batch."""
        return len(self.base[self.tail_pool].tail) if self.base else 0

    @property
    def num_drawn(self) -> int:
        """The number of rows that an epoch would hold if they all fitted."""
        return sum(self._num_drawn(number) for number in range(len(self.pools)))

    def whole_clusters(self) -> float:
        """The share of the first epoch's rows, in full batches, that are there with their whole cluster."""
        whole = sum(self.clusters.whole(plan.full) * self.clusters.size for plan in self.base) if self.clusters else 0
        return whole / max(1, self.num_full * self.size)

    def conflicting(self) -> int:
        """How many rows an epoch leaves out for their conflicts, and not for a cap or an incomplete batch."""
        missing = 0
        for number, plan in enumerate(self.base):
            tailed = not self.drop_last and number == self.tail_pool
            drawn = self._num_drawn(number)
            missing += drawn - plan.full.size - (len(plan.tail) if tailed else drawn % self.size)
        return max(0, missing)

    def epoch(self, epoch: int) -> Plan:
        """The plan of an epoch, counted from 0."""
        parts = [self._epoch_of(number, epoch) for number in range(len(self.pools))]
        full = np.concatenate([part.full for part in parts])
        order = np.random.default_rng([self.seed, epoch]).permutation(len(full))
        return Plan(full[order], parts[self.tail_pool].tail[: self.num_tail])

    def _num_drawn(self, number: int) -> int:
        return sum(min(len(rows), self.max_rows or len(rows)) for rows in self.pools[number])

    def _rows(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """The rows of a pool for one epoch: as many per data set as the cap allows, different ones each time."""
        parts = self.pools[number]
        cap = self.max_rows
        if cap is not None:
            parts = [rows if len(rows) <= cap else rows[self._shuffled(rows, rng)[:cap]] for rows in parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _shuffled(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The places of rows in random order, cluster after cluster where there are any."""
        order = rng.permutation(len(rows))
        if self.clusters is None:
            return order
        clusters = self.clusters.numbers[rows[order]]
        alone = len(self.conflicts) + np.arange(len(rows))
        numbers, codes = np.unique(np.where(clusters < 0, alone, clusters), return_inverse=True)
        return order[np.argsort(rng.permutation(len(numbers))[codes], kind="stable")]

    def _base_of(self, number: int) -> Plan:
        """A pool's plan found once, whose size every epoch keeps; it is the plan of the first epoch."""
        num_bins = self._num_drawn(number) // self.size
        attempt = 0
        plan, placed = self._draw(number, num_bins, [0, number, attempt])
        while plan is None:  # this ends, for zero bins are always filled
            attempt += 1
            # In larger steps when small ones do not help.
            num_bins = min(max(0, placed // self.size - attempt // _SLOW_STEPS), num_bins)
            plan, placed = self._draw(number, num_bins, [0, number, attempt])
        return plan

    def _epoch_of(self, number: int, epoch: int) -> Plan:
        base = self.base[number]
        if epoch == 0:
            return base
        for attempt in range(_EPOCH_TRIES):
            everything = self.max_rows is not None and attempt == _EPOCH_TRIES - 1
            plan, _ = self._draw(number, len(base.full), [epoch, number, attempt], everything)
            if plan is not None and len(plan.tail) >= len(base.tail):
                return plan
        logger.info("Epoch %d repeats the first plan's batches in another order: no other was found.", epoch)
        rng = np.random.default_rng([self.seed, epoch, number, _EPOCH_TRIES])
        return Plan(rng.permuted(rng.permutation(base.full), axis=1), base.tail)

    def _draw(
        self, number: int, num_bins: int, key: Sequence[int], everything: bool = False
    ) -> tuple[Plan | None, int]:
        """Draw a plan with ``num_bins`` full batches, or None when that fails, and the number of rows placed."""
        rng = np.random.default_rng([self.seed, *key])
        rows = np.concatenate(self.pools[number]) if everything else self._rows(number, rng)
        whole = len(rows) == len(self.conflicts)
        conflicts = self.conflicts if whole else self.conflicts.take(rows)
        rows = np.arange(len(rows)) if whole else rows
        bins = pack(conflicts, num_bins, self.size, rng)
        placed = int((bins >= 0).sum())
        if placed < num_bins * self.size:
            return None, placed
        if self.hard_rows is not None:
            bins = draw_together(conflicts, bins, self.hard_rows.draw(rows, rng), rng)
        if self.clusters is not None:
            numbers, size = self.clusters.numbers[rows], self.clusters.size
            bins = draw_clusters(conflicts, bins, numbers, size=size, per_bin=self.size // size, rng=rng)
        order = self._shuffled(rows, rng)
        order = order[np.argsort(bins[order], kind="stable")]  # unplaced rows first, then bin after bin
        left, full = np.split(order, [len(bins) - placed])
        tail = left[:0] if self.drop_last else compatible(conflicts, left, self.size)
        return Plan(rows[full].reshape(num_bins, self.size), rows[tail]), placed


def split_by(numbers: np.ndarray) -> list[np.ndarray]:
    """The rows of each number, in the order of the numbers."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
