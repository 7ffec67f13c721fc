"""Compares two evaluations of the same rows: what changed, and whether chance explains it."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.arguments import require_path
from unime_st.evaluation.outcomes import TaskOutcomes, read_whole
from unime_st.evaluation.report.report import Report
from unime_st.evaluation.settings import WEIGHTS, differing, shown

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1 << 22  # numbers drawn at a time, which bounds the memory
_FLIPS_SHOWN = 20
MEAN = "mean of tasks"

Key = tuple[str, str]  # evaluator, task


@dataclass(frozen=True)
class Difference:
    """The change from before to after, of one task or of the mean of tasks."""

    before: float  # score in [0, 1]
    after: float
    low: float  # of the paired bootstrap interval of the difference
    high: float
    gained: tuple[int, ...] = ()  # numbers of the rows that score higher after
    lost: tuple[int, ...] = ()  # numbers of the rows that score lower after

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """The comparison of two evaluations; tasks of several evaluators are not mixed."""

    tasks: dict[str, Difference]  # `<evaluator>: <task>` -> difference
    means: dict[str, Difference]  # evaluator -> difference of the mean over its tasks
    confidence: float
    other_rules: dict[str, str] = field(default_factory=dict)  # task -> a text on rules for ties that differ
    other_settings: dict[str, tuple[str, str]] = field(default_factory=dict)
    """``<evaluator>: <setting>`` -> both values; ``<evaluator>`` alone where a side does not tell its own."""

    def add_to(self, report: Report) -> None:
        """Add tables and a plot to a report."""
        if self.other_rules:
            tasks_of: dict[str, list[str]] = {}
            for task, why in self.other_rules.items():
                tasks_of.setdefault(why, []).append(task)
            told = "\n\n".join(f"{', '.join(tasks)}: {why}" for why, tasks in tasks_of.items())
            report.add_text(told, title="Ties were treated differently")
        if self.other_settings:
            unlike = [[name, *map(shown, values)] for name, values in self.other_settings.items()]
            report.add_table("Settings that differ or are not told", ["setting", "before", "after"], unlike)
        means = {f"{name}: {MEAN}": difference for name, difference in self.means.items()}
        named = {**self.tasks, **means}
        level = f"{100 * self.confidence:.0f} %"
        rows = [
            [name, d.before, d.after, d.difference, d.low, d.high, "yes" if d.is_clear else "no",
             None if name in means else len(d.gained), None if name in means else len(d.lost)]
            for name, d in named.items()
        ]  # fmt: skip
        columns = ["task", "before", "after", "difference", "from", "to", "beyond chance", "rows gained", "rows lost"]
        note = f"From and to: paired bootstrap interval ({level}) of the difference, rows drawn within each task."
        report.add_table("Differences", columns, rows, percent=True, note=note)
        half = [max(d.high - d.difference, d.difference - d.low) for d in named.values()]
        report.add_bar_plot(
            "Differences by task",
            list(named),
            {"after - before": [100 * d.difference for d in named.values()]},
            "points",
            errors={"after - before": [100 * value for value in half]},
            note=f"Whiskers: the longer side of the {level} interval.",
        )
        flips = [
            [
                task,
                word,
                len(own),
                ", ".join(map(str, own[:_FLIPS_SHOWN])) + (", ..." if len(own) > _FLIPS_SHOWN else ""),
            ]
            for task, d in self.tasks.items()
            for word, own in (("gained", d.gained), ("lost", d.lost))
            if own
        ]
        if flips:
            report.add_table("Rows that changed", ["task", "", "rows", "their numbers"], flips)


def compare(
    before: str | Path,
    after: str | Path,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    intersection: bool = False,
) -> Comparison:
    """Compare two evaluations of the same rows with a paired bootstrap.

    Rows are drawn with replacement within each task, the same ones for both sides, so that rows that are hard for both
    do not widen the interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 15).

    Args:
        before: Folder with one or more ``*_rows.parquet``, or one such file.
        after: The other folder or file.
        resamples: Number of draws.
        seed: Seed of the draws.
        confidence: Confidence of the intervals, in (0, 1).
        intersection: Compare the tasks and rows that both have, when they are not the same.

    Returns:
        The comparison; a warning names settings that differ, other than the weights, or are not told.

    Raises:
        FileNotFoundError: If a folder holds no results by row.
        ValueError: If the tasks or rows differ, or an argument is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"`resamples={resamples}`, `confidence={confidence}`: give at least 1, and less than 1.")
    (first, settings), (second, other) = _read(require_path("before", before)), _read(require_path("after", after))
    sides = first, second
    pairs = _paired(*sides, intersection=intersection)
    tails = (100 * (1 - confidence) / 2, 100 * (1 + confidence) / 2)
    tasks: dict[str, Difference] = {}
    by_evaluator: dict[str, list[tuple[Difference, np.ndarray]]] = {}
    for (evaluator, task), (rows, a, b) in pairs.items():
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])  # independent of the tasks before it
        drawn = _resampled_means(b - a, resamples, rng)
        gained, lost = (tuple(rows[changed].tolist()) for changed in (b > a, b < a))
        own = Difference(float(a.mean()), float(b.mean()), *_interval(drawn, tails), gained, lost)
        tasks[f"{evaluator}: {task}"] = own
        by_evaluator.setdefault(evaluator, []).append((own, drawn))
    means = {
        evaluator: Difference(
            float(np.mean([difference.before for difference, _ in parts])),
            float(np.mean([difference.after for difference, _ in parts])),
            *_interval(np.mean([drawn for _, drawn in parts], axis=0), tails),
        )
        for evaluator, parts in by_evaluator.items()
    }
    other_rules = {": ".join(key): told for key in pairs if (told := _other_rule(*(side[key] for side in sides)))}
    if other_rules:
        logger.warning("Ties were treated differently. %s", "; ".join(map(": ".join, other_rules.items())))
    other_settings = _other_settings(settings, other)
    unlike = {name: both for name, both in other_settings.items() if name.rpartition(": ")[2] not in WEIGHTS}
    if unlike:
        told = "; ".join(f"{name} {shown(a)} (before), {shown(b)} (after)" for name, (a, b) in unlike.items())
        logger.warning("Settings differ or are not told. %s", told)
    return Comparison(tasks, means, confidence, other_rules, other_settings)


def _other_settings(
    before: Mapping[str, dict[str, Any] | None], after: Mapping[str, dict[str, Any] | None]
) -> dict[str, tuple[str, str]]:
    """Settings that differ, by evaluator and name."""
    return {
        f"{evaluator}: {name}" if name else evaluator: both
        for evaluator in before
        if evaluator in after
        for name, both in differing(before[evaluator], after[evaluator]).items()
    }


def _other_rule(before: TaskOutcomes, after: TaskOutcomes) -> str:
    """A text on two results with different rules for ties, and how many rows may differ for that, or ""."""
    if before.rule == after.rule:
        return ""
    tied = [int(own.tied.sum()) for own in (before, after)]
    return f"{before.rule} (before), {after.rule} (after); {tied[0]} and {tied[1]} rows are tied" + (
        ", and may differ for that alone. Evaluate both by one version." if any(tied) else ", so that changes nothing."
    )


def _interval(drawn: np.ndarray, tails: tuple[float, float]) -> tuple[float, float]:
    low, high = np.percentile(drawn, tails)
    return float(low), float(high)


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    step = max(1, _ROWS_AT_ONCE // len(values))
    parts = [
        values[rng.integers(len(values), size=(min(step, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _read(path: Path) -> tuple[dict[Key, TaskOutcomes], dict[str, dict[str, Any] | None]]:
    """The outcomes by evaluator and task, and each evaluator's settings, of a folder or a file."""
    files = [path] if path.is_file() else sorted(path.glob("*_rows.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{path} holds no *_rows.parquet. Give a folder that an evaluator wrote its results to."
        )
    found: dict[Key, TaskOutcomes] = {}
    settings: dict[str, dict[str, Any] | None] = {}
    for file in files:
        name = file.name.removesuffix("_rows.parquet").removesuffix("_results")
        outcomes, settings[name] = read_whole(file)
        found |= {(name, task): own for task, own in outcomes.items()}
    return found, settings


def _paired(
    before: Mapping[Key, TaskOutcomes], after: Mapping[Key, TaskOutcomes], *, intersection: bool
) -> dict[Key, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The row numbers and both sides' scores for each evaluator and task."""
    if set(before) != set(after) and not intersection:
        only = {"before": sorted(set(before) - set(after)), "after": sorted(set(after) - set(before))}
        told = "; ".join(f"only {side}: {', '.join(map(': '.join, names))}" for side, names in only.items() if names)
        raise ValueError(f"The tasks differ ({told}). Evaluate the same, or compare what both have: intersection=True.")
    pairs = {}
    for task in (name for name in before if name in after):
        a, b = before[task], after[task]
        rows, at, other = np.intersect1d(a.rows, b.rows, return_indices=True)
        if len(rows) < max(len(a.rows), len(b.rows)) and not intersection:
            raise ValueError(
                f"{': '.join(task)}: {len(a.rows)} rows before and {len(b.rows)} after, {len(rows)} of them the same. "
                "Evaluate with the same `limit` and `seed`, or compare what both have: intersection=True."
            )
        if len(rows):
            pairs[task] = rows, a.scores[at], b.scores[other]
    if not pairs:
        raise ValueError("The two have no row in common.")
    return pairs
