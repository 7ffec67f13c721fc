"""Rows that a guide finds too similar to meet, and the hardest of the others, from scores computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from unime_st.arguments import require_number
from unime_st.embedding.approximate import MANY_PROBES, NearestTargets
from unime_st.functional import above_margin, check_margin
from unime_st.samplers.guide.embeddings import GuideEmbeddings
from unime_st.samplers.planning.plan import split_by

logger = logging.getLogger(__name__)

_EXACT_ROWS = 10_000  # up to here comparing everything takes seconds
_CHUNK = 512
_INDEX_CHUNK = 4096
_CANDIDATES = 64
_MANY_CANDIDATES = 1024
_SAMPLE = 256
_POOR_RECALL = 0.9
_MAX_MEAN_NEIGHBOURS = 2000
_MAX_PAIRS = 100_000_000
_WITHOUT_FAISS = (
    "Neighbours among so many rows are found through an approximate index, which needs faiss: "
    '`pip install "unime_st[ann]"` (or faiss-cpu). Or compare everything, with `exact_neighbors=True`, in a time that '
    "grows with the square of the rows."
)


@dataclass(frozen=True)
class Neighbors:
    """A guide's judgement of ``N`` rows; `pairs` are those beyond the margin."""

    pairs: np.ndarray  # (P, 2) rows; the first one's query is nearer to the second one's target than to its own
    hardest: np.ndarray  # (N, k) rows with the most similar targets that are not false, hardest first; -1 for none
    twins: np.ndarray  # (N,) the first row with the same target embedding, which stands for all of them in `hardest`
    recall: dict[str, float]  # share of "conflicts" and "hardest" found, by a sample; empty after an exact comparison


def find_neighbors(
    queries: GuideEmbeddings,
    targets: GuideEmbeddings,
    *,
    margin: float,
    num_hardest: int = 0,
    groups: np.ndarray | None = None,
    exact: bool | None = None,
) -> Neighbors:
    """Score queries ``(N, D)`` against targets ``(N, D)``, and keep the false negatives and the ``num_hardest`` others.

    A target that is more similar to a query than the query's own, by more than ``margin``, is a false negative. Rows
    with different numbers in ``groups`` ``(N,)`` never meet, so they are not compared. ``exact=None`` compares
    everything in groups of up to 10,000 rows, and takes candidates from an approximate index in larger ones.
    """
    check_margin(margin, optional=False)
    require_number("num_hardest", num_hardest, least=0)
    if queries.dim != targets.dim:
        raise ValueError(
            f"`{queries.name}` has {queries.dim} dimensions and `{targets.name}` {targets.dim}: they must come from "
            "one guide."
        )
    rows, twins = queries.rows, targets.twins()
    unit_queries, unit_targets = queries.unit_rows(), targets.unit_rows()
    hardest = np.full((rows, num_hardest), -1, dtype=np.int32)
    pairs, recalls, total = [], [], 0
    limit = min(_MAX_MEAN_NEIGHBOURS * rows, _MAX_PAIRS)
    for members in [np.arange(rows)] if groups is None else split_by(groups):
        search = _Search(unit_queries, unit_targets, members, twins[members], margin=margin, k=num_hardest)
        approximate = len(members) > _EXACT_ROWS if exact is None else not exact
        for part, found, hard in search.run(approximate):
            hardest[members[part]] = hard
            pairs.append(found)
            total += len(found)
            if total > limit:
                raise ValueError(
                    f"With `margin={margin}` the guide takes more than {limit // max(rows, 1):,} rows for false "
                    f"negatives of an average row. Raise the margin, or check that the embeddings are in the data "
                    "set's order."
                )
        if approximate:
            recalls.append((len(members), search.recall()))
    merged = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int32)
    return Neighbors(merged, hardest, twins.astype(np.int32), _mean_recall(recalls))


def _mean_recall(recalls: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    if not recalls:
        return {}
    weights = [rows for rows, _ in recalls]
    means = {name: float(np.average([one[name] for _, one in recalls], weights=weights)) for name in recalls[0][1]}
    text = ", ".join(f"{value:.1%} of the {name}" for name, value in means.items())
    logger.info("The approximate index finds %s, by a sample of rows.", text)
    if min(means.values()) < _POOR_RECALL:
        logger.warning(
            "The approximate index finds only %s, by a sample of rows. `exact_neighbors=True` finds all, in a time "
            "that grows with the square of the rows.",
            text,
        )
    return means


class _Search:
    """Compares the ``M`` rows of one group."""

    def __init__(
        self,
        queries: torch.Tensor,  # (N, D) of all rows, of length 1
        targets: torch.Tensor,  # (N, D) likewise
        members: np.ndarray,  # (M,) the group's rows
        twins: np.ndarray,  # (M,) the first row of all with the target of each; equal targets are compared once
        *,
        margin: float,
        k: int,
    ) -> None:
        self.queries, self.members, self.margin, self.k = queries, members, margin, k
        self.candidates = max(_CANDIDATES, 2 * k)
        self.first, self.codes = np.unique(twins, return_inverse=True)  # (T,): distinct targets; (M,) in [0, T)
        self.targets = targets if len(self.first) == len(targets) else targets[torch.from_numpy(self.first)]  # (T, D)
        self.by_code = np.argsort(self.codes, kind="stable")
        self.starts = np.searchsorted(self.codes[self.by_code], np.arange(len(self.first) + 1))
        self.index: NearestTargets | None = None

    def run(self, approximate: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield positions in the group, their pairs ``(p, 2)`` and their hardest rows ``(n, k)``, part by part."""
        self.index = NearestTargets(self.targets, _WITHOUT_FAISS) if approximate else None
        # Cell after cell, so that targets read again soon are still in the processor's cache.
        order = np.arange(len(self.members)) if self.index is None else np.argsort(self.index.places[self.codes])
        chunk = _CHUNK if self.index is None else _INDEX_CHUNK
        for start in range(0, len(order), chunk):
            part = order[start : start + chunk]
            yield part, *self._rows(part, *self._find(part))

    def _find(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The result of :meth:`_judge`, through the index when there is one."""
        if self.index is None:
            return self._judge(part, self._query(part) @ self.targets.T, None)
        queries = self._query(part)
        false, hardest = self._judge(part, *self.index.search(queries, self.candidates))
        # Where (nearly) all candidates are false negatives there may be more of them.
        crowded = np.flatnonzero(np.bincount(false[:, 0], minlength=len(part)) + self.k + 1 >= self.candidates)
        if len(crowded) == 0:
            return false, hardest
        more, hardest[crowded] = self._judge(
            part[crowded], *self.index.search(queries[crowded], max(_MANY_CANDIDATES, 4 * self.k), MANY_PROBES)
        )
        few = false[~np.isin(false[:, 0], crowded)]
        return np.concatenate([few, np.stack([crowded[more[:, 0]], more[:, 1]], axis=1)]), hardest

    def _query(self, part: np.ndarray) -> torch.Tensor:
        return self.queries[torch.from_numpy(self.members[part])]

    def _judge(
        self, part: np.ndarray, scores: torch.Tensor, candidates: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Judge candidates: a target is false beyond the margin, and otherwise the harder the more similar it is.

        For positions ``part`` ``(n,)`` and their ``scores`` ``(n, C)``, which are overwritten, with ``candidates``
        ``(n, C)`` (codes of targets, -1 for none; None stands for all targets in order) it returns the position in
        ``part`` and the code of each false negative ``(p, 2)``, and the codes of the hardest others ``(n, k)``.
        """
        own_code = torch.from_numpy(self.codes[part])[:, None]  # (n, 1)
        if candidates is None:
            own = scores.gather(1, own_code)
        else:
            own = (self._query(part) * self.targets[own_code[:, 0]]).sum(dim=1, keepdim=True)
        false = above_margin(scores, own, self.margin)
        places = false.nonzero()
        if candidates is None:
            columns = places[:, 1]
            false.scatter_(1, own_code, value=True)
        else:
            columns = candidates[places[:, 0], places[:, 1]]
            false |= candidates == own_code
        found = torch.stack([places[:, 0], columns], dim=1).numpy()
        return found, self._hardest(scores, false, candidates).numpy()

    def _hardest(self, scores: torch.Tensor, barred: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
        """The codes of the best scores that are not barred, -1 where there are no more; ``(n, k)``."""
        if self.k == 0:
            return torch.empty(len(scores), 0, dtype=torch.int64)
        best = scores.masked_fill_(barred, -torch.inf).topk(min(self.k, scores.shape[1]), dim=1)
        codes = best.indices if candidates is None else candidates.gather(1, best.indices)
        codes = torch.where(best.values > -torch.inf, codes, -1)
        return torch.nn.functional.pad(codes, (0, self.k - codes.shape[1]), value=-1)

    def _rows(self, part: np.ndarray, false: np.ndarray, hardest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn codes into rows: a false target is false in all rows that have it."""
        counts = self.starts[false[:, 1] + 1] - self.starts[false[:, 1]]
        ends = np.cumsum(counts)
        at = np.repeat(self.starts[false[:, 1]] - (ends - counts), counts) + np.arange(int(counts.sum()))
        rows, others = self.members[np.repeat(part[false[:, 0]], counts)], self.members[self.by_code[at]]
        pairs = np.stack([rows, others], axis=1).astype(np.int32)
        return pairs[rows != others], np.where(hardest < 0, -1, self.first[hardest])

    def recall(self) -> dict[str, float]:
        """Measure the index against comparing everything, on a sample of rows."""
        sample = np.sort(np.random.default_rng(0).permutation(len(self.members))[:_SAMPLE])
        conflicts, hardest = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)  # found, there
        for start in range(0, len(sample), _CHUNK // 16):  # few at a time, for each has a score for every target
            part = sample[start : start + _CHUNK // 16]
            right_false, right_hard = self._judge(part, self._query(part) @ self.targets.T, None)
            false, hard = self._find(part)
            expected = set(map(tuple, right_false.tolist()))
            conflicts += len(expected & set(map(tuple, false.tolist()))), len(expected)
            for right, found in zip(right_hard.tolist(), hard.tolist(), strict=True):
                hardest += len({*right} & {*found} - {-1}), len({*right} - {-1})
        shares = {"conflicts": conflicts} | ({"hardest": hardest} if self.k else {})
        return {name: float(found / there) if there else 1.0 for name, (found, there) in shares.items()}
