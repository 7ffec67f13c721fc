"""Bringing rows and their hard negatives into the same bin, by exchanges that keep a packing valid."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from unime_st.samplers.conflicts import Conflicts, unit_rows

_VICTIMS = 4


def hardest_rows(queries: Any, targets: Any, margin: float, k: int, chunk: int = 1024) -> np.ndarray:
    """For each row, the rows whose targets are most similar to its query without being false negatives.

    Args:
        queries: ``(N, D)`` embeddings of the rows' queries.
        targets: ``(N, D)`` embeddings of their targets.
        margin: A target more similar than the row's own by over this is false, see
            :func:`~unime_st.samplers.conflicts.guide_pairs`.
        k: How many; fewer when there are not so many rows.
        chunk: Queries compared at a time.

    Returns:
        ``(N, k)`` rows, the hardest first; -1 where there are no more.

    Example:
        >>> corner = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> hardest_rows(corner, corner, margin=0.1, k=1).tolist()
        [[1], [0], [1]]
    """
    unit_queries, unit_targets = unit_rows("guide_queries", queries), unit_rows("guide_targets", targets)
    found = []
    for start in range(0, len(unit_queries), chunk):
        scores = unit_queries[start : start + chunk] @ unit_targets.T  # (chunk, N)
        rows = torch.arange(len(scores))
        own = scores[rows, rows + start]
        scores[scores > (own + margin)[:, None]] = -torch.inf
        scores[rows, rows + start] = -torch.inf
        best = scores.topk(min(k, scores.shape[1]), dim=1)
        found.append(torch.where(best.values > -torch.inf, best.indices, -1).numpy())
    return np.concatenate(found) if found else np.empty((0, k), dtype=np.int64)


def draw_together(conflicts: Conflicts, bins: np.ndarray, hardest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exchange rows between bins so that rows meet their hard negatives.

    Rows are visited at random; each fetches its hard negatives into its bin, where they stay, in exchange for rows of
    its bin that are not wanted there. An exchange that would bring conflicting rows together is not made, so bins stay
    as full and as free of conflicts as they were.

    Args:
        conflicts: Of ``N`` rows.
        bins: ``(N,)`` the bin of each row, -1 for none.
        hardest: ``(N, k)`` see :func:`hardest_rows`.
        rng: All choices are drawn from it.

    Returns:
        ``(N,)`` the new bins.
    """
    table = _Table(conflicts, bins)
    wanted = np.zeros(len(bins), dtype=bool)
    order = rng.permutation(len(bins))
    picks = rng.random((len(bins), hardest.shape[1], _VICTIMS))
    for row in order.tolist():
        if table.bins[row] < 0:
            continue
        wanted[row] = True
        for place, other in enumerate(hardest[row].tolist()):
            if other < 0 or wanted[other] or table.bins[other] < 0:
                continue
            if table.bins[other] == table.bins[row]:
                wanted[other] = True
                continue
            members = table.members[table.bins[row]]
            for pick in picks[row, place].tolist():
                victim = members[int(pick * len(members))]
                if not wanted[victim] and table.exchange(other, victim):
                    wanted[other] = True
                    break
    return table.bins


class _Table:
    """Who is in which bin, and which keys are taken there."""

    def __init__(self, conflicts: Conflicts, bins: np.ndarray) -> None:
        self.conflicts = conflicts
        self.bins = bins.copy()
        self.keys = [[key for key in row if key >= 0] for row in conflicts.keys.tolist()]
        count = int(bins.max(initial=-1)) + 1
        self.members: list[list[int]] = [[] for _ in range(count)]
        self.holder: list[dict[int, int]] = [{} for _ in range(count)]
        for row, number in enumerate(bins.tolist()):
            if number >= 0:
                self.members[number].append(row)
                self.holder[number].update(dict.fromkeys(self.keys[row], row))

    def exchange(self, first: int, second: int) -> bool:
        """Exchange the bins of two rows unless one would meet a row it conflicts with; whether it was done."""
        home, away = int(self.bins[first]), int(self.bins[second])
        if not (self._fits(first, away, second) and self._fits(second, home, first)):
            return False
        for row, source in ((first, home), (second, away)):
            for key in self.keys[row]:
                del self.holder[source][key]
        for row, other, target in ((first, second, away), (second, first, home)):
            self.members[target][self.members[target].index(other)] = row
            self.holder[target].update(dict.fromkeys(self.keys[row], row))
            self.bins[row] = target
        return True

    def _fits(self, row: int, target: int, leaving: int) -> bool:
        holder = self.holder[target]
        if any(holder.get(key, leaving) != leaving for key in self.keys[row]):
            return False
        neighbours = self.conflicts.neighbours_of(row)
        return not bool(((self.bins[neighbours] == target) & (neighbours != leaving)).any())
