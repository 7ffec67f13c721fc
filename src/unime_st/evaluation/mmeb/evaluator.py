"""MMEB: Precision@1 (or nDCG@5) by task, by meta-task and by modality."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.arguments import require_instructions, require_number
from unime_st.data.images import ItemReader
from unime_st.data.mmeb.eval_rows import EvalTask, read_in_turn
from unime_st.embedding.distinct import OnError
from unime_st.evaluation.base import EmbeddingEvaluator, check_shown
from unime_st.evaluation.mmeb.averages import metrics_of
from unime_st.evaluation.mmeb.inputs import as_tasks, distinct_inputs
from unime_st.evaluation.mmeb.results import (
    METRIC_NAMES,
    SHOWN,
    TaskResult,
    explain,
    lost_of_pool,
    outcomes_of,
    places_at,
    result_of,
)
from unime_st.evaluation.mmeb.tasks import META_TASKS, MMEBTask, Parser, tasks_from_yaml
from unime_st.evaluation.mmeb.v2 import FRAMES, V2_META_TASKS, TaskPrompts, v2_tasks, warn_of_other_prompts
from unime_st.evaluation.outcomes import TaskOutcomes
from unime_st.evaluation.reranking import Reranking
from unime_st.evaluation.scoring import score_candidates

logger = logging.getLogger(__name__)


class MMEBEvaluator(EmbeddingEvaluator):
    """MMEB (36 image tasks), any tasks in its layout, or custom tasks.

    A query is right when, among its own candidates, the right one (the first) has the highest cosine. As published, the
    first of equal scores wins: among a query's own candidates a tie is right, and in a pool that all queries share the
    pool's order decides. Rows that this decides are counted, and a warning is logged when there are many: they reveal a
    model that gives all inputs one embedding. All tasks are read first; each distinct input is then encoded once over
    all of them, from one queue, which several processes share.

    Args:
        root: Folder of the benchmark: ``<root>/<Task>/test-*.parquet``; or its name on the Hub
            (``"TIGER-Lab/MMEB-eval"``), from which the rows are fetched but not the images, so that ``image_root`` must
            be given. None if all ``tasks`` are :class:`MMEBTask`.
        tasks: Names of tasks below ``root``, or tasks; None takes every task found there.
        meta_tasks: Task -> meta-task; None means the published ones (:data:`META_TASKS`). Tasks it does not name are in
            no meta-task.
        image_root: Folder of the images; None means ``root/images`` if it is a folder, else ``root``.
        target_instructions: Task -> what goes before the text of its candidates, where its rows do not say it, as in
            ``load_mmeb_train``; for tasks given by name.
        max_pixels: Larger images are made smaller, keeping their shape. Part of the cache's key.
        image_size: Every image is resized to this side, or (width, height), ignoring its shape, as in the published
            evaluations (336 or 1344; MMEB V2: 128, 672 or 1344). Part of the cache's key.
        on_error: "raise", or "report" to count broken rows (an unreadable image, no right answer) as wrong, to leave
            out missing tasks, and to list both in ``errors``.
        limit: Number of rows of each task, drawn by ``seed`` and the same in every call, for use within training; None
            takes all.
        seed: Seed of that draw.
        name: Prefix of the metrics' names.
        **arguments: ``batch_size``, ``prompt``, ``prompt_name``, ``cache_dir``, ``show_progress_bar``, ``write_csv``,
            ``reranker`` and ``rerank_depth`` of :class:`~unime_st.evaluation.base.EmbeddingEvaluator`.

    Attributes:
        task_prompts: Whose words go with the tasks of MMEB V2; None for other tasks.
        frames: Task -> what is shown of a video, such as "8" or "all stored"; "" without videos.
        results: Task -> :class:`TaskResult`, from the last call.
        reranked_results: The same after reranking; empty without a reranker.
        errors: Task -> messages on what could not be read in the last call.
        primary_metric: ``mean_precision@1``, over the tasks.

    Raises:
        FileNotFoundError: If ``root`` is no folder, or holds no task.
        ValueError: If ``on_error``, ``limit``, ``seed``, a metric or the resolution is out of range, or if two tasks
            have one name.

    Metrics:
        ``<task>_precision@1`` (``<task>_ndcg@5`` for tasks with that metric) and ``<task>_ties`` (rows whose score only
        the order of equal candidates decides) for each task, ``ties`` over all;
        ``meta_<meta-task>_precision@1`` (``_ndcg@5``), the mean of its tasks; ``mean_precision@1`` over tasks;
        ``meta_mean_precision@1``, the mean of the meta-tasks (the UniME paper's "Overall");
        ``in_distribution_precision@1`` and ``out_of_distribution_precision@1`` over the published tasks with and
        without a training set; ``tasks``, the number of tasks; with more than one metric or modality among the tasks,
        ``mean_ndcg@5``, ``<modality>_mean`` over each task's metric, and ``overall_mean``, as MMEB V2 prints them; with
        "report", ``unreadable_rows``. With a reranker all of them again as ``reranked_...``, ``rerank_pairs`` and
        ``rerank_seconds``.
    """

    def __init__(
        self,
        root: str | Path | None,
        tasks: Sequence[str | MMEBTask] | None = None,
        *,
        meta_tasks: Mapping[str, str] | None = None,
        image_root: str | Path | None = None,
        target_instructions: Mapping[str, str] | None = None,
        max_pixels: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        on_error: OnError = "raise",
        limit: int | None = None,
        seed: int = 0,
        name: str = "MMEB",
        **arguments: Any,
    ) -> None:
        super().__init__(name=name, **arguments)
        if on_error not in {"raise", "report"}:
            raise ValueError(f"`on_error={on_error!r}`; choose 'raise' or 'report'.")
        require_number("limit", limit, least=1, optional=True)
        require_number("seed", seed, least=0)
        if isinstance(tasks, str):
            raise TypeError(f"`tasks={tasks!r}` is one name; give a list of them.")
        require_instructions("target_instructions", target_instructions)
        self._tasks = as_tasks(root, tasks, image_root, target_instructions)
        _check_tasks(self._tasks)
        self.tasks = [task.name for task in self._tasks]
        self.task_prompts: TaskPrompts | None = None
        self.frames = {task.name: task.frames for task in self._tasks}
        self.meta_tasks = dict(META_TASKS if meta_tasks is None else meta_tasks)
        self.max_pixels, self.image_size = max_pixels, image_size
        self._reader = ItemReader("/", max_pixels=max_pixels, image_size=image_size, max_aspect_ratio=None)
        self.on_error: OnError = on_error
        self.limit = limit
        self.seed = seed
        self.primary_metric = "mean_precision@1"
        if all(task.metric != "hit@1" for task in self._tasks):
            self.primary_metric = "mean_ndcg@5"
        self.results: dict[str, TaskResult] = {}
        self.reranked_results: dict[str, TaskResult] = {}
        self.errors: dict[str, list[str]] = {}

    @classmethod
    def from_yaml(
        cls, path: str | Path, root: str | Path, *, parsers: Mapping[str, Parser] | None = None, **arguments: Any
    ) -> MMEBEvaluator:
        """Evaluate the tasks of one of MMEB V2's YAML files.

        Args:
            path: The file.
            root: Folder of the data: ``<root>/<dataset_name>/<split>-*.parquet``, and the entries' ``image_root``.
            parsers: A mapping from ``dataset_parser`` to a function that makes the task, which adds other kinds of
                tasks; None takes :data:`~unime_st.evaluation.mmeb.tasks.PARSERS`, which has the image tasks.
            **arguments: Arguments of the class.

        Returns:
            The evaluator.

        Raises:
            FileNotFoundError: If there is no such file.
            ImportError: If PyYAML is not installed.
            ValueError: If the file is no mapping of tasks, or if an entry names no parser or an unknown one, asks for a
                pool that its parser does not make, or names a folder outside ``root``; the error names the entry.
        """
        return cls(None, tasks_from_yaml(path, root, parsers), **arguments)

    @classmethod
    def v2(
        cls,
        root: str | Path,
        tasks: Sequence[str] | None = None,
        *,
        num_frames: int | None = FRAMES,
        task_prompts: TaskPrompts = "vlm2vec",
        name: str = "MMEB-V2",
        **arguments: Any,
    ) -> MMEBEvaluator:
        """Evaluate MMEB V2: 36 tasks of images, 18 of videos, 24 of visual documents.

        Args:
            root: Folder of the unpacked benchmark, see :func:`~unime_st.evaluation.mmeb.v2.v2_tasks`.
            tasks: Names of tasks; None takes all 78.
            num_frames: Frames of a video: 8 as VLM2Vec, 64 as Qwen3-VL-Embedding.
            task_prompts: Whose words go with the tasks: "vlm2vec", or "qwen3_vl_embedding" as its authors evaluate
                (instructions in the queries' system turns); an encoder with that template is warned of the former.
            name: Prefix of the metrics' names.
            **arguments: Arguments of the class.

        Returns:
            The evaluator; its primary metric is ``overall_mean``, that over all tasks.

        Raises:
            FileNotFoundError: If ``root`` is no folder.
            ValueError: If there is no such task, there are no such prompts, or a number is out of range.
        """
        made = v2_tasks(root, tasks, num_frames=num_frames, task_prompts=task_prompts)
        evaluator = cls(None, made, name=name, **{"meta_tasks": V2_META_TASKS, **arguments})
        evaluator.task_prompts = task_prompts
        if len({task.modality for task in made}) > 1:
            evaluator.primary_metric = "overall_mean"
        return evaluator

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that decide the numbers, for the model card."""
        own: dict[str, Any] = {
            "tasks": self.tasks,
            "task_prompts": self.task_prompts,
            "limit": self.limit,
            "seed": self.seed if self.limit else None,
        }
        own |= {"task_prompts": self.task_prompts, **self.encoding_settings()}
        own["frames"] = {task: shown for task, shown in self.frames.items() if shown} or None
        return {**super().get_config_dict(), **{key: value for key, value in own.items() if value is not None}}

    def encoding_settings(self) -> dict[str, Any]:
        """Return the settings of the images' resolution."""
        own = {"max_pixels": self.max_pixels, "image_size": self.image_size}
        return {key: value for key, value in own.items() if value is not None}

    def measure(self, model: Any) -> dict[str, float]:
        """Evaluate a model; the metrics, without the evaluator's name."""
        self.results, self.reranked_results, self.errors = {}, {}, {}
        warn_of_other_prompts(model, self.task_prompts)
        reranking = self.open_reranking(self._reader.read_absolute if self.encoding_settings() else None)
        read = self._read()
        items, owner, places = distinct_inputs(read)
        if items:
            embeddings, index, errors = self._encode(model, items, owner)
        else:
            embeddings, index, errors = np.zeros((0, 0), np.float32), np.full(1, -1), {}  # all places are 0
        for task in self._tasks:
            if task.name in read:
                own, rows = read[task.name]
                result, after = self._score(model, task, own, rows, embeddings, index[places[task.name]], reranking)
                explain(result, own, rows, places[task.name], errors)
                self.results[task.name] = result
                if after is not None:
                    self.reranked_results[task.name] = replace(after, errors=result.errors)
                    logger.info("%s: %s %.4f after reranking", task.name, task.metric, after.score)
                told = [f"row {row}: {why}" for row, why in sorted(result.errors.items())]
                if told := told + lost_of_pool(own, rows, places[task.name], errors):
                    self.errors[task.name] = told
                outcome = task.name, task.metric, result.score, len(result.rows), result.tied.sum()
                logger.info("%s: %s %.4f, %d rows, %d of them decided by ties", *outcome)
        if not self.results:
            raise ValueError(f"None of the tasks could be evaluated; the first: {next(iter(self.errors.values()))[0]}")
        metrics = self._metrics_of(self.results)
        if reranking is None:
            return metrics
        return metrics | self.reranked_metrics(self._metrics_of(self.reranked_results), reranking)

    def _read(self) -> dict[str, tuple[EvalTask, np.ndarray]]:
        """Read each task, and draw the rows that are evaluated."""
        read = {}
        for task in self._tasks:
            try:
                own = task.load(on_error=self.on_error)
                count = len(own.queries) + len(own.broken)
                if not count:
                    raise ValueError(f"{task.name} has no rows.")  # noqa: TRY301 (handled as what reading raises)
            except (OSError, ValueError) as error:
                if self.on_error == "raise":
                    raise
                logger.warning("%s left out: %s", task.name, error)
                self.errors[task.name] = [f"left out: {error}"]
                continue
            rows = np.arange(count)
            if self.limit is not None and self.limit < count:
                rows = np.sort(np.random.default_rng(self.seed).choice(count, self.limit, replace=False))
            read[task.name] = own, rows
        return read

    def _encode(
        self, model: Any, items: list[Any], owner: list[tuple[str, int]]
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        return self.encode(
            model,
            items,
            lambda item: "{}, row {}".format(*owner[item]),
            cache=self.open_cache(model),
            on_error=self.on_error,
            prepare=read_in_turn(self._reader.read_absolute) if self.encoding_settings() else None,
        )

    def _score(  # noqa: PLR0917
        self,
        model: Any,
        task: MMEBTask,
        own: EvalTask,
        rows: np.ndarray,
        embeddings: np.ndarray,
        index: np.ndarray,
        reranking: Reranking | None = None,
    ) -> tuple[TaskResult, TaskResult | None]:
        """Score the drawn rows; ``index`` is the embedding of each item of the task, -1 for an unreadable one.

        Also what they are after reranking, if there is any.
        """
        place_of_row = {int(row): place for place, row in enumerate(own.rows)}
        readable, at = [], []
        for number, row in enumerate(rows):
            place = place_of_row.get(int(row))
            if place is not None and index[own.queries[place]] >= 0 and (index[own.own(place)] >= 0).all():
                readable.append(number)
                at.append(place)
        there = None if own.corpus is None else np.flatnonzero(index[own.corpus] >= 0)
        pool = None if own.corpus is None else own.corpus[there]
        found = reranked = None
        if at:
            found = score_candidates(
                embeddings,
                index[own.queries[at]],
                [index[own.own(place)] for place in at],
                gains=None if own.gains is None else [own.gains_of(place) for place in at],
                pool=None if pool is None else index[pool],
                k=SHOWN if reranking is None else max(SHOWN, self.rerank_depth),
                device=getattr(model, "device", "cpu"),
            )
        if reranking is not None:  # every process comes here, with rows or without
            first = np.full((0, 1), -1) if found is None else found.top[:, : self.rerank_depth]
            shown = [own.own(place) if pool is None else pool for place in at]
            items = [places_at(row, of) for row, of in zip(first, shown, strict=True)]

            def where(row: int, place: int) -> str:
                return f"{task.name}, row {rows[readable[row]]}, candidate {first[row, place]}"

            shown_as = [own.shown(item) for item in range(len(own.items))] if own.instructions else own.items
            scores = reranking.scores(shown_as, own.queries[at], np.array(items, np.int64).reshape(first.shape), where)
            reranked = None if found is None else found.reranked(scores)

        before, after = (result_of(task, rows, readable, of, there) for of in (found, reranked))
        return before, None if reranking is None else after

    def top(
        self, task: str, k: int = SHOWN, places: Sequence[int] | None = None, *, with_right: bool = False
    ) -> list[dict[str, Any]]:
        """Show the results of the last call, as entries of :meth:`~unime_st.evaluation.Report.add_gallery`.

        Args:
            task: Name of the task.
            k: Results per query, at most five.
            places: Places of evaluated rows, as in ``results[task].right``; None takes all that were readable.
            with_right: Whether to add the best right answer, with its rank, where no result is right.

        Returns:
            One entry per row: `query`, `results` (each with `image`, `video` or `text`, and whether it is `right`) and
            `rank`.

        Raises:
            ValueError: If the task was not evaluated, or ``k`` is out of range.
        """
        check_shown(k, SHOWN)
        if task not in self.results:
            raise ValueError(f"Nothing is known of {task!r}: there are {list(self.results)}. Evaluate a model first.")
        result = self.results[task]
        own = next(spec for spec in self._tasks if spec.name == task).load(on_error=self.on_error)
        at = {int(row): place for place, row in enumerate(own.rows)}
        entries = []
        for place in np.flatnonzero(result.rank) if places is None else places:
            query = at[int(result.rows[place])]
            shown, right = (own.own(query) if own.corpus is None else own.corpus), own.right_of(query)
            best = [int(shown[number]) for number in result.top[place][:k] if number >= 0]
            results = [{**_shown(own.shown(item)), "right": item in right} for item in best]
            rank = int(result.rank[place]) or None
            if with_right and rank and not set(best) & set(right):
                item = own.shown(int(shown[result.best[place]]))
                results.append({**_shown(item), "right": True, "rank": rank})
            entries.append({"query": _shown(own.shown(int(own.queries[query]))), "results": results, "rank": rank})
        return entries

    def outcomes(self) -> dict[str, TaskOutcomes]:
        """The share of each row of the last call in its task's metric."""
        return outcomes_of(self.results)

    def reranked_outcomes(self) -> dict[str, TaskOutcomes]:
        """The same after reranking."""
        return outcomes_of(self.reranked_results)

    def _metrics_of(self, results: Mapping[str, TaskResult]) -> dict[str, float]:
        metrics = metrics_of(results, self.meta_tasks, {task.name: task.modality for task in self._tasks})
        if self.on_error == "report":
            metrics["unreadable_rows"] = sum(len(result.errors) for result in results.values())
        return metrics


def _check_tasks(tasks: Sequence[MMEBTask]) -> None:
    for number, task in enumerate(tasks):
        if task.metric not in METRIC_NAMES:
            raise ValueError(f"Task {task.name!r} has the metric {task.metric!r}; there are {', '.join(METRIC_NAMES)}.")
        if task.name in {other.name for other in tasks[:number]}:
            raise ValueError(f"Two tasks are called {task.name!r}. Give each once, under a name of its own.")


def _shown(item: Any) -> dict[str, Any]:
    """An input as a gallery shows it."""
    return item if isinstance(item, dict) else {"text": item}
