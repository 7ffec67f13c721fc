"""What a task of MMEB came to, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from unime_st.data.mmeb.eval_rows import EvalTask
from unime_st.evaluation.mmeb.tasks import Metric, MMEBTask
from unime_st.evaluation.outcomes import TaskOutcomes
from unime_st.evaluation.scoring import CandidateScores

SHOWN = 5
"""Number of the best candidates kept for each row."""

METRIC_NAMES: dict[Metric, str] = {"hit@1": "precision@1", "ndcg@5": "ndcg@5"}
"""A task's metric -> what it is called in the evaluator's metrics."""


@dataclass
class TaskResult:
    """The outcome of one task; a row with an unreadable input is wrong and has rank and score 0."""

    rows: np.ndarray  # (rows,) numbers in the task; all of them, unless `limit` draws some
    right: np.ndarray  # (rows,) whether each row is right
    tied: np.ndarray  # (rows,) whether only the order of equal scores decides the row's score
    rank: np.ndarray  # (rows,) rank of the best right answer, from 1
    best: np.ndarray  # (rows,) the place of that answer in the row, or in the pool
    top: np.ndarray  # (rows, k) places of the best candidates in the row, or in the pool; -1 past the last
    errors: dict[int, str] = field(default_factory=dict)  # row number -> what could not be read
    metric: Metric = "hit@1"  # the metric of `scores`
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (rows,) in [0, 1]

    @property
    def precision(self) -> float:
        """Precision@1 in [0, 1]."""
        return float(self.right.mean())

    @property
    def score(self) -> float:
        """The task's metric in [0, 1]."""
        return float(self.scores.mean())


def outcomes_of(results: Mapping[str, TaskResult]) -> dict[str, TaskOutcomes]:
    """The share of each row in its task's metric."""
    return {task: TaskOutcomes(result.rows, result.scores, result.tied) for task, result in results.items()}


def result_of(
    task: MMEBTask, rows: np.ndarray, readable: list[int], found: CandidateScores | None, pool: np.ndarray | None
) -> TaskResult:
    """A task's outcome of the rows that were ``readable``; ``pool`` has the place of each candidate that was, too."""
    count = len(rows)
    right, tied = np.zeros(count, bool), np.zeros(count, bool)
    rank, best = np.zeros(count, np.int64), np.zeros(count, np.int64)
    top, scores = np.full((count, SHOWN), -1, dtype=np.int64), np.zeros(count)
    if found is not None:
        right[readable], rank[readable] = found.right, found.rank
        top[readable], best[readable] = found.top[:, :SHOWN], found.best
        if pool is not None:
            top, best = (places_at(places, pool) for places in (top, best))
        by_hit = task.metric == "hit@1"
        scores[readable], tied[readable] = (found.right, found.tied) if by_hit else (found.ndcg, found.ndcg_tied)
    return TaskResult(rows, right, tied, rank, best, top, {}, task.metric, scores)


def explain(result: TaskResult, own: EvalTask, rows: np.ndarray, place: np.ndarray, errors: Mapping[int, str]) -> None:
    """Say of each row that could not be scored what could not be read."""
    at = {int(row): number for number, row in enumerate(own.rows)}
    for row in rows[result.rank == 0].tolist():
        if row in own.broken:
            result.errors[row] = own.broken[row]
            continue
        needed = [own.queries[at[row]], *own.own(at[row])]
        result.errors[row] = next(errors[int(place[item])] for item in needed if int(place[item]) in errors)


def lost_of_pool(own: EvalTask, rows: np.ndarray, place: np.ndarray, errors: Mapping[int, str]) -> list[str]:
    """Say which candidates of a shared pool could not be read: all queries choose without them."""
    if own.corpus is None or not np.isin(own.rows, rows).any():
        return []
    lost = [at for at in place[own.corpus].tolist() if at in errors]
    return [f"left out of the pool: {errors[at]}" for at in lost]


def places_at(top: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """What stands at places of a list, -1 where there is none."""
    return np.where(top >= 0, readable[np.maximum(top, 0)], -1)
