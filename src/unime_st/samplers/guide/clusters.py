"""Clusters of rows that find each other's targets hard: B3 (arXiv 2505.11293, section 3), by METIS."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from unime_st.samplers.planning.conflicts import Conflicts, both_ways
from unime_st.samplers.planning.plan import split_by

logger = logging.getLogger(__name__)

_SEED = 0
_WITHOUT_PYMETIS = '`cluster_size` needs METIS: `pip install "unime_st[b3]"` (or pymetis).'


@dataclass(frozen=True)
class RankGraph:
    """Rows, with an edge between two that have each other's target among the ranks kept."""

    starts: np.ndarray  # (N + 1,) row i is joined to neighbours[starts[i]:starts[i + 1]]
    neighbours: np.ndarray  # ascending for each row; each edge is there from both ends

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def owners(self) -> np.ndarray:
        """The row at the near end of each entry of ``neighbours``."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))

    def within(self, parts: np.ndarray) -> np.ndarray:
        """For each entry of ``neighbours``, whether both ends are in one of the ``parts`` ``(N,)`` (-1 for none)."""
        near = np.repeat(parts, np.diff(self.starts))
        return (near == parts[self.neighbours]) & (near >= 0)


def find_clusters(
    ranked: np.ndarray, twins: np.ndarray, conflicts: Conflicts, size: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Part ``N`` rows into clusters of exactly ``size``, and return the number of each row's ``(N,)``, -1 for none.

    ``ranked`` ``(N, m)`` and ``twins`` ``(N,)`` are as in ``Neighbors``, the first ranks cut off. A cluster holds rows
    of one of the ``groups`` ``(N,)``, whose rows beyond a multiple of ``size`` are in none, and rows that may meet as
    far as that can be.
    """
    clusters = np.full(len(twins), -1, dtype=np.int32)
    pools = [np.arange(len(twins))] if groups is None else split_by(groups)
    count = edges = inside = 0
    for members in (pool for pool in pools if len(pool) >= size):
        graph = rank_graph(ranked[members], twins[members])
        if len(graph.neighbours) == 0:
            continue
        parts = exact_parts(graph, metis_parts(graph, len(members) // size), conflicts.take(members), size)
        edges, inside = edges + len(graph.neighbours), inside + int(graph.within(parts).sum())
        clusters[members] = np.where(parts < 0, -1, parts + count)
        count += len(members) // size
    if count:
        logger.info("%d clusters of %d rows hold %.1f %% of the rank graph's edges.", count, size, 100 * inside / edges)
    elif any(len(pool) >= size for pool in pools):
        raise ValueError(
            f"No two rows have each other's target among the {ranked.shape[1]} ranks from `range_min` to `range_max`: "
            "there is nothing to cluster. Lower `range_min`, raise `range_max`, or check that the guide's embeddings "
            "are in the data set's order."
        )
    return clusters


def rank_graph(ranked: np.ndarray, twins: np.ndarray) -> RankGraph:
    """Keep the edges that go both ways: row i ranks the target of row j, and j that of i.

    A target that several rows have stands in ``ranked`` ``(N, m)`` as its first row. The rows of one target that rank
    another are then joined to those that rank it in return one to one, in order, and not all to all: they may not meet
    each other, so that a cluster can hold but one of them.
    """
    targets = _Targets(twins)
    arrows = targets.arrows(ranked)
    kinds, places = np.divmod(arrows, targets.most)
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    counts, kinds = np.diff(starts, append=len(kinds)), kinds[starts]
    there = np.flatnonzero((kinds[:-1] % 2 == 0) & (np.diff(kinds) == 1))  # those followed by the arrows in return
    edges = np.maximum(counts[there], counts[there + 1])
    number = np.arange(int(edges.sum())) - np.repeat(np.cumsum(edges) - edges, edges)
    ends = []
    for kind, target in zip((there, there + 1), np.divmod(kinds[there] // 2, len(targets)), strict=True):
        at = np.repeat(starts[kind], edges) + number % np.repeat(counts[kind], edges)
        ends.append(targets.rows(np.repeat(target, edges), places[at]))
    return RankGraph(*both_ways(np.stack(ends, axis=1), len(ranked)))


class _Targets:
    """The ``T`` distinct targets of ``N`` rows, and the rows that have each."""

    def __init__(self, twins: np.ndarray) -> None:
        self.first, own, self.counts = np.unique(twins, return_inverse=True, return_counts=True)
        self.own = own.astype(np.int32)  # (N,) in [0, T)
        self.by_target = np.argsort(own, kind="stable")
        self.starts = np.cumsum(self.counts) - self.counts
        self.most = int(self.counts.max(initial=1))
        if 2 * len(self) ** 2 * self.most >= 2**63:
            raise ValueError(
                f"{len(twins):,} rows are too many to cluster at once. Set `homogeneous=True` to cluster each data set "
                "by itself, or train on fewer."
            )

    def __len__(self) -> int:
        return len(self.first)

    def arrows(self, ranked: np.ndarray) -> np.ndarray:
        """From each row to the targets it ranks ``(N, m)``, sorted, as one number each.

        It is ((low * T + high) * 2 + direction) * most + place: the two targets, which way, and the row's place among
        those of its own target.
        """
        number = np.zeros(int(self.first.max(initial=0)) + 1, dtype=np.int32)
        number[self.first] = np.arange(len(self), dtype=np.int32)
        place = np.empty(len(self.own), dtype=np.int32)
        place[self.by_target] = np.arange(len(place)) - np.repeat(self.starts, self.counts)
        kept = ranked >= 0
        rows = np.repeat(np.arange(len(ranked), dtype=np.int32), kept.sum(axis=1))
        own, other = self.own[rows], number[ranked[kept]]
        arrows = np.minimum(own, other).astype(np.int64)
        for factor, part in ((len(self), np.maximum(own, other)), (2, own > other), (self.most, place[rows])):
            arrows *= factor
            arrows += part
        arrows.sort()
        return arrows

    def rows(self, targets: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The rows at some places among those of some targets."""
        return self.by_target[self.starts[targets] + places].astype(np.int32)


def metis_parts(graph: RankGraph, count: int) -> np.ndarray:
    """METIS's parts ``(N,)`` in [0, count): few edges between them, of about equal size."""
    pymetis = import_pymetis()
    starts, neighbours = (array.astype(np.int64) for array in (graph.starts, graph.neighbours))
    _, parts = pymetis.part_graph(count, pymetis.CSRAdjacency(starts, neighbours), options=pymetis.Options(seed=_SEED))
    return np.asarray(parts, dtype=np.int32)


def exact_parts(graph: RankGraph, parts: np.ndarray, conflicts: Conflicts, size: int) -> np.ndarray:
    """Repair ``N // size`` parts ``(N,)`` to exactly ``size`` rows each; the rows left over have -1.

    A part keeps the rows with the most edges inside, but none that conflicts with another. Each of the others, those
    with most edges first, goes where it has the most edges among the parts with room that it fits, and those that fit
    nowhere go wherever room is left in the end.
    """
    exact = _ExactParts(conflicts, len(parts) // size, size)
    inside = np.bincount(graph.owners[graph.within(parts)], minlength=len(parts))
    order, kept = np.argsort(-inside, kind="stable"), parts.tolist()
    left = np.array([row for row in order.tolist() if not exact.put(row, [kept[row]])], dtype=np.int64)
    for row in left[np.argsort(-np.diff(graph.starts)[left], kind="stable")].tolist():
        near = exact.parts[graph.neighbours[graph.starts[row] : graph.starts[row + 1]]]
        numbers, counts = np.unique(near[near >= 0], return_counts=True)
        exact.put(row, numbers[np.argsort(-counts, kind="stable")].tolist())
    holes = np.repeat(np.arange(len(exact.room)), exact.room)
    exact.parts[np.flatnonzero(exact.parts < 0)[: len(holes)]] = holes
    return exact.parts


class _ExactParts:
    """Parts that are being filled, and the keys that each holds."""

    def __init__(self, conflicts: Conflicts, count: int, size: int) -> None:
        self.conflicts, self.room = conflicts, [size] * count
        self.parts = np.full(len(conflicts), -1, dtype=np.int32)
        self.taken: list[set[int]] = [set() for _ in range(count)]
        self.keys = [[key for key in row if key >= 0] for row in conflicts.keys.tolist()]
        self.near = (np.diff(conflicts.starts) > 0).tolist()

    def put(self, row: int, parts: list[int]) -> bool:
        """Put a row into the first of some parts that has room and holds nothing it conflicts with, if there is one."""
        closed = set(self.parts[self.conflicts.neighbours_of(row)].tolist()) if self.near[row] else ()
        for part in parts:
            if self.room[part] and part not in closed and self.taken[part].isdisjoint(self.keys[row]):
                self.parts[row] = part
                self.room[part] -= 1
                self.taken[part].update(self.keys[row])
                return True
        return False


def import_pymetis() -> Any:
    """Import pymetis, or raise an error that says where it comes from."""
    try:
        import pymetis
    except ImportError as error:
        raise ImportError(_WITHOUT_PYMETIS) from error
    return pymetis
