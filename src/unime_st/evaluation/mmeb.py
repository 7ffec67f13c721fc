"""MMEB: Precision@1 over each query's own candidates, by task and by meta-task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.data.mmeb import load_mmeb_eval
from unime_st.evaluation.base import EmbeddingEvaluator, device_of
from unime_st.evaluation.encoding import BrokenItemError, OnError, Section, encode_indexed
from unime_st.evaluation.mmeb_tasks import IN_DISTRIBUTION, META_TASKS
from unime_st.evaluation.scoring import score_candidates

logger = logging.getLogger(__name__)

_SHOWN = 5  # best candidates kept of each row


@dataclass
class TaskResult:
    """Outcome of one task.

    Attributes:
        rows: Numbers of the rows in the task; all of them, unless ``limit`` draws some.
        right: Whether each row is right; a row with something unreadable is not, shape (rows,).
        tied: Whether the right answer shares the best score with a candidate of other content, shape (rows,).
        rank: Rank of the right answer, from 1; 0 in a row with something unreadable, shape (rows,).
        top: The best candidates' places in each row, best first, -1 past the last, shape (rows, k).
        errors: Row number -> what could not be read.
    """

    rows: np.ndarray
    right: np.ndarray
    tied: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def precision(self) -> float:
        """Precision@1 in [0, 1]."""
        return float(self.right.mean())


class MMEBEvaluator(EmbeddingEvaluator):
    """Precision@1 on MMEB (36 image tasks), or on any tasks in its layout.

    A query is right when, among its own candidates, the right one (the first) has the highest cosine. As published, the
    first of equal scores wins, so a tie counts as right; ties are counted, and a model that gives everything one
    embedding is seen by them. Each distinct query and candidate is encoded once over all tasks.

    Args:
        root: Folder of the benchmark: ``<root>/<Task>/test-*.parquet``.
        tasks: Names of the tasks; None takes every task found below ``root``.
        meta_tasks: Task -> meta-task; None means the published ones (:data:`META_TASKS`). Tasks it does not name are in
            no meta-task.
        image_root: Where image paths lead; None means ``root/images`` if it is a folder, else ``root``.
        on_error: "raise", or "report" to count rows with an unreadable image as wrong, to leave out missing tasks, and
            to list both in ``errors``.
        limit: Rows of each task, drawn by ``seed`` and the same in every call; None takes all. For use within training.
        seed: Of that draw.
        name: Put before the metrics' names.
        **arguments: ``batch_size``, ``prompt``, ``prompt_name``, ``cache_dir``, ``show_progress_bar`` and ``write_csv``
            of :class:`~unime_st.evaluation.base.EmbeddingEvaluator`.

    Attributes:
        results: Of the last call, task -> :class:`TaskResult`.
        errors: Of the last call, what could not be read: task -> messages.
        primary_metric: ``mean_precision@1``, over the tasks.

    Raises:
        FileNotFoundError: If ``root`` is no folder, or holds no task.
        ValueError: If ``on_error`` or ``limit`` is something else.

    Metrics:
        ``<task>_precision@1`` and ``<task>_ties`` (rows) for each task; ``meta_<meta-task>_precision@1``, the mean of
        its tasks; ``mean_precision@1`` over tasks; ``meta_mean_precision@1``, the mean of the meta-tasks (the UniME
        paper's "Overall"); ``in_distribution_precision@1`` and ``out_of_distribution_precision@1`` over the published
        tasks with and without a training set; ``tasks``, how many there are in the mean; with "report",
        ``unreadable_rows``.
    """

    def __init__(
        self,
        root: str | Path,
        tasks: Sequence[str] | None = None,
        *,
        meta_tasks: Mapping[str, str] | None = None,
        image_root: str | Path | None = None,
        on_error: OnError = "raise",
        limit: int | None = None,
        seed: int = 0,
        name: str = "MMEB",
        **arguments: Any,
    ) -> None:
        super().__init__(name=name, **arguments)
        if on_error not in {"raise", "report"}:
            raise ValueError(f"`on_error={on_error!r}`; choose 'raise' or 'report'.")
        if limit is not None and limit < 1:
            raise ValueError(f"`limit={limit}`, but each task needs at least one row.")
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is no folder. Give the one that holds <Task>/test-*.parquet.")
        self.tasks = list(tasks) if tasks is not None else found_tasks(self.root)
        if not self.tasks:
            raise FileNotFoundError(
                f"No task to evaluate: {self.root} holds no <Task>/test-*.parquet, or `tasks` is empty."
            )
        self.meta_tasks = dict(META_TASKS if meta_tasks is None else meta_tasks)
        self.image_root = image_root
        self.on_error: OnError = on_error
        self.limit = limit
        self.seed = seed
        self.primary_metric = "mean_precision@1"
        self.results: dict[str, TaskResult] = {}
        self.errors: dict[str, list[str]] = {}

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that decide the numbers, for the model card."""
        own = {"tasks": self.tasks, "limit": self.limit, "seed": self.seed if self.limit else None}
        return {**super().get_config_dict(), **{key: value for key, value in own.items() if value is not None}}

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a model.

        Args:
            model: A ``SentenceTransformer``.
            output_path: Folder for the results, or None.
            epoch: Written into the results.
            steps: Written into the results.

        Returns:
            The metrics, see the class.
        """
        self.results, self.errors = {}, {}
        cache = self.open_cache(model)
        for task in self.tasks:
            try:
                result = self._evaluate(model, task, cache)
            except (OSError, ValueError) as error:
                if self.on_error == "raise":
                    raise
                logger.warning("%s left out: %s", task, error)
                self.errors[task] = [f"left out: {error}"]
                continue
            self.results[task] = result
            if result.errors:
                self.errors[task] = [f"row {row}: {message}" for row, message in result.errors.items()]
            logger.info("%s: precision@1 %.4f, %d rows", task, result.precision, len(result.right))
        if not self.results:
            raise ValueError(f"None of the tasks could be evaluated; the first: {next(iter(self.errors.values()))[0]}")
        return self.finish(model, self._metrics(), output_path, epoch, steps)

    def _evaluate(self, model: Any, task: str, cache: Section) -> TaskResult:
        rows = load_mmeb_eval(self.root, task, image_root=self.image_root)
        if not len(rows):
            raise ValueError(f"{task} has no rows.")
        drawn = np.arange(len(rows))
        if self.limit is not None and self.limit < len(rows):
            drawn = np.sort(np.random.default_rng(self.seed).choice(len(rows), self.limit, replace=False))
        items: list[Any] = []
        row_of: list[int] = []  # place in `drawn` of each item
        unreadable: dict[int, str] = {}
        for place, number in enumerate(drawn.tolist()):
            try:
                row = rows[number]
            except (OSError, ValueError) as error:
                if self.on_error == "raise":
                    raise
                unreadable[place] = str(error)
                continue
            items += [row["query"], *row["candidates"]]
            row_of += [place] * (1 + len(row["candidates"]))
        try:
            embeddings, index, errors = encode_indexed(
                model,
                items,
                cache=cache,
                batch_size=self.batch_size,
                prompt=self.prompt,
                prompt_name=self.prompt_name,
                show_progress_bar=self.show_progress_bar,
                on_error=self.on_error,
            )
        except BrokenItemError as error:
            raise ValueError(f"{task}, row {drawn[row_of[error.position]]}: {error.reason}") from error
        for position, message in sorted(errors.items()):
            unreadable.setdefault(row_of[position], message)
        parts: dict[int, list[int]] = {}
        for place, embedding in zip(row_of, index.tolist(), strict=True):
            if place not in unreadable:
                parts.setdefault(place, []).append(embedding)
        return self._score(model, drawn, embeddings, parts, {int(drawn[at]): why for at, why in unreadable.items()})

    @staticmethod
    def _score(
        model: Any, drawn: np.ndarray, embeddings: np.ndarray, parts: dict[int, list[int]], errors: dict[int, str]
    ) -> TaskResult:
        """Score the readable rows, given as place in `drawn` -> rows of `embeddings`, the query's first."""
        count = len(drawn)
        right, tied, rank = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, np.int64)
        top = np.full((count, _SHOWN), -1, dtype=np.int64)
        if parts:
            queries = [own[0] for own in parts.values()]
            candidates = [np.array(own[1:]) for own in parts.values()]
            scores = score_candidates(embeddings, queries, candidates, k=_SHOWN, device=device_of(model))
            kept = list(parts)
            right[kept], tied[kept], rank[kept], top[kept] = scores.right, scores.tied, scores.rank, scores.top
        return TaskResult(drawn, right, tied, rank, top, errors)

    def top(self, task: str, k: int = _SHOWN, places: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Show what queries found in the last call, as entries of :meth:`~unime_st.evaluation.Report.add_gallery`.

        Args:
            task: Its name.
            k: Results a query, at most five.
            places: Which of the evaluated rows, as in ``results[task].right``; None takes all that were readable.

        Returns:
            For each row `query`, `results` (each with `image`, `text` or both, and whether it is `right`) and `rank`.

        Raises:
            ValueError: If the task was not evaluated.
        """
        if task not in self.results:
            raise ValueError(f"Nothing is known of {task!r}: there are {list(self.results)}. Evaluate a model first.")
        result = self.results[task]
        rows = load_mmeb_eval(self.root, task, image_root=self.image_root)
        entries = []
        for place in np.flatnonzero(result.rank) if places is None else places:
            row = rows[int(result.rows[place])]
            own = row["candidates"]
            best = [int(number) for number in result.top[place][:k] if number >= 0]
            results = [{**own[number], "right": own[number] == own[0]} for number in best]
            entries.append({"query": row["query"], "results": results, "rank": int(result.rank[place]) or None})
        return entries

    def _metrics(self) -> dict[str, float]:
        precision = {task: result.precision for task, result in self.results.items()}
        metrics: dict[str, float] = {}
        for task, result in self.results.items():
            metrics[f"{task}_precision@1"] = precision[task]
            metrics[f"{task}_ties"] = int(result.tied.sum())
        metas = dict.fromkeys(self.meta_tasks[task] for task in precision if task in self.meta_tasks)
        by_meta = [
            _mean(precision, (task for task in precision if self.meta_tasks.get(task) == meta)) for meta in metas
        ]
        metrics |= {f"meta_{meta}_precision@1": value for meta, value in zip(metas, by_meta, strict=True)}
        if by_meta:
            metrics["meta_mean_precision@1"] = float(np.mean(by_meta))
        published = [task for task in precision if task in META_TASKS]
        inside = [task for task in published if task in IN_DISTRIBUTION]
        outside = [task for task in published if task not in IN_DISTRIBUTION]
        for key, tasks in (("in_distribution", inside), ("out_of_distribution", outside)):
            if tasks:
                metrics[f"{key}_precision@1"] = _mean(precision, tasks)
        metrics["mean_precision@1"] = _mean(precision, precision)
        metrics["tasks"] = len(precision)
        if self.on_error == "report":
            metrics["unreadable_rows"] = sum(len(result.errors) for result in self.results.values())
        return metrics


def found_tasks(root: Path) -> list[str]:
    """Names of the tasks below a folder: published ones in the published order, then others by name."""
    names = {path.parent.name for path in root.glob("*/test-*.parquet")}
    return [task for task in META_TASKS if task in names] + sorted(names.difference(META_TASKS))


def _mean(values: Mapping[str, float], keys: Iterable[str]) -> float:
    return float(np.mean([values[key] for key in keys]))
