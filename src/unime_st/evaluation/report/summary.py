"""The results of evaluators as parts of a report: tables beside published rows, plots, the worst mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from unime_st.evaluation.base import EmbeddingEvaluator
from unime_st.evaluation.mmeb.evaluator import MMEBEvaluator
from unime_st.evaluation.outcomes import told_of_ties
from unime_st.evaluation.published import published_results, published_task_scores
from unime_st.evaluation.report.mmeb_v2 import add_v2_averages, pixels_of
from unime_st.evaluation.report.report import Report
from unime_st.evaluation.reranking import reranker_name
from unime_st.evaluation.retrieval import ImageTextRetrievalEvaluator
from unime_st.evaluation.sugarcrepe import SugarCrepeEvaluator

_COLUMNS = {  # column of the table of averages -> metric, key of the published rows
    "Classification": ("meta_Classification_precision@1", "Classification"),
    "VQA": ("meta_VQA_precision@1", "VQA"),
    "Retrieval": ("meta_Retrieval_precision@1", "Retrieval"),
    "Grounding": ("meta_Grounding_precision@1", "Grounding"),
    "in distribution": ("in_distribution_precision@1", "in_distribution"),
    "out of distribution": ("out_of_distribution_precision@1", "out_of_distribution"),
    "mean of tasks": ("mean_precision@1", "mean_of_tasks"),
    "mean of meta-tasks": ("meta_mean_precision@1", "mean_of_meta_tasks"),
}
_MISTAKES = 8
_AFTER_THEM = "Where the right answer is not among those found, it stands after them, with its rank."


def add_mmeb(
    report: Report,
    evaluator: MMEBEvaluator,
    metrics: Mapping[str, float],
    *,
    model: str = "this model",
    published: str = "VLM2Vec-V2.0-Qwen2VL-2B",
) -> None:
    """Add an evaluation on MMEB: every task, every average, published results, plots and mistakes.

    Published rows stand beside ours where all 36 published tasks were evaluated whole; a row printed with one kind of
    overall average has a number in that column only. ``published`` is the model of
    :func:`~unime_st.evaluation.published_task_scores` whose scores by task are drawn beside ours.
    """
    prefix = f"{evaluator.name}_" if evaluator.name else ""
    own = {name.removeprefix(prefix): value for name, value in metrics.items()}
    theirs = published_task_scores(published)[published]
    results = evaluator.results
    known = any(task in theirs for task in results)
    frames, pixels = evaluator.frames, pixels_of(evaluator)
    shown = ["frames", "pixels"] if any(frames.values()) else []
    rows = [
        [task, evaluator.meta_tasks.get(task, "–"), len(result.rows), result.metric,
         *([frames[task] or "–", pixels] if shown else []), result.score,
         *([theirs.get(task)] if known else []), int(result.tied.sum()), len(result.errors)]
        for task, result in results.items()
    ]  # fmt: skip
    columns = ["task", "meta-task", "rows", "metric", *shown, model, *([published] if known else []), "ties",
               "unreadable"]  # fmt: skip
    note = (
        "Ties: rows whose score only the order of equal candidates decides. As published the first of them wins, so "
        "among a row's own candidates, the right one first, a tie is right."
    )
    _add_ties(report, "MMEB", evaluator)
    report.add_table("MMEB: by task", columns, rows, percent=True, note=note)
    series = {model: [100 * result.score for result in results.values()]}
    if known:
        series[published] = [100 * theirs.get(task, float("nan")) for task in results]
    report.add_bar_plot("MMEB: by task, drawn", list(results), series, "percent")
    (add_v2_averages if "overall_mean" in own else _add_averages)(report, evaluator, own, model)
    _add_reranked(report, "MMEB", evaluator, own)
    if evaluator.errors:
        lost = [[task, message] for task, messages in evaluator.errors.items() for message in messages]
        report.add_table("MMEB: counted as wrong or left out", ["task", "why"], lost)
    mistakes = worst_mistakes(evaluator)
    if mistakes:
        report.add_gallery(
            "MMEB: the worst mistakes",
            mistakes,
            note=f"Those whose right answer ranks lowest, of tasks of each meta-task in turn. {_AFTER_THEM}",
        )


def _add_averages(report: Report, evaluator: MMEBEvaluator, own: Mapping[str, float], model: str) -> None:
    known = {column: key for column, (metric, key) in _COLUMNS.items() if metric in own}
    averages: list[list[Any]] = [[model, *(100 * own[_COLUMNS[column][0]] for column in known)]]
    if set(_COLUMNS) == set(known) and len(evaluator.results) == 36 and evaluator.limit is None:  # the published tasks
        for row in published_results("mmeb"):
            kinds = {row["average"]: row["overall"]}
            averages.append([row["model"], *(row.get(key, kinds.get(key)) for key in known.values())])
    metas = [name for name in own if name.startswith("meta_") and name not in {m for m, _ in _COLUMNS.values()}]
    for name in metas:
        known[name.removeprefix("meta_").removesuffix("_precision@1")] = name
        averages = [[*row, 100 * own[name] if number == 0 else None] for number, row in enumerate(averages)]
    note = (
        "The overall average some papers print is over tasks, that of others over the four meta-tasks; they do not "
        "compare. Published rows are shown when all 36 tasks were evaluated whole."
    )
    report.add_table("MMEB: averages", ["model", *known], averages, digits=1, note=note)
    if len(averages) > 1:
        rows = [[cell if isinstance(cell, float) else None for cell in row[1:]] for row in averages]
        report.add_heat_map("MMEB: averages, drawn", [row[0] for row in averages], list(known), rows)


def worst_mistakes(evaluator: MMEBEvaluator, most: int | None = None) -> list[dict[str, Any]]:
    """The rows whose right answer ranks lowest, as entries of a gallery: from all tasks in turn.

    The first task of each meta-task comes first, then the second of each. None takes eight, or one for each meta-task.
    """
    earlier: Counter[str] = Counter()
    turns = {}
    for task in evaluator.results:
        meta = evaluator.meta_tasks.get(task, "")
        turns[task] = earlier[meta]
        earlier[meta] += 1
    most = max(_MISTAKES, len(earlier)) if most is None else most
    by_task = {}
    for task in sorted(turns, key=turns.__getitem__):
        ranks = evaluator.results[task].rank
        by_task[task] = iter(np.argsort(-ranks, kind="stable")[: int((ranks > 1).sum())].tolist())
    entries: list[dict[str, Any]] = []
    while by_task and len(entries) < most:
        for task, places in list(by_task.items()):
            place = next(places, None)
            if place is None:
                del by_task[task]
            elif len(entries) < most:
                entries += evaluator.top(task, 4, places=[place], with_right=True)
    return entries


def add_retrieval(
    report: Report, evaluator: ImageTextRetrievalEvaluator, metrics: Mapping[str, float], *, model: str = "this model"
) -> None:
    """Add an evaluation of image-text retrieval: recalls in both directions, published rows by name, worst queries."""
    prefix = f"{evaluator.name}_" if evaluator.name else ""
    title = f"Retrieval: {evaluator.name or 'images and captions'}"
    directions = ("text_to_image", "image_to_text")
    columns = ["model", *(f"{direction.replace('_', ' ')} R@{k}" for direction in directions for k in evaluator.ks)]
    rows: list[list[Any]] = [
        [model, *(100 * metrics[f"{prefix}{direction}_recall@{k}"] for direction in directions for k in evaluator.ks)]
    ]
    chance = evaluator.chance()
    rows.append(["chance", *(100 * chance[f"{way}_recall@{k}"] for way in directions for k in evaluator.ks)])
    for row in published_results("retrieval"):
        scores = next((own for name, own in row.items() if name.lower() == evaluator.name.lower()), None)
        if isinstance(scores, dict):
            rows.append([row["model"], *(scores[way] if k == 1 else None for way in directions for k in evaluator.ks)])
    ties = " and ".join(f"{int(metrics[f'{prefix}{way}_ties'])} ({way.replace('_', ' ')})" for way in directions)
    note = (
        "A direction is named by its query. An image's query is right when any of its captions is among the first k. "
        f"Queries that are wrong only for a candidate of exactly equal score: {ties}."
    )
    _add_ties(report, title, evaluator)
    report.add_table(title, columns, rows, digits=1, note=note)
    _add_reranked(report, title, evaluator, {name.removeprefix(prefix): value for name, value in metrics.items()})
    ranks = evaluator.rankings["text_to_image"].ranks
    worst = np.argsort(-ranks, kind="stable")[: min(_MISTAKES, int((ranks > 0).sum()))]
    if len(worst):
        entries = evaluator.top(queries=worst.tolist(), with_right=True)
        note = f"Captions whose image ranks lowest. {_AFTER_THEM}"
        report.add_gallery(f"{title}, the worst mistakes", entries, note=note)


def add_sugarcrepe(
    report: Report, evaluator: SugarCrepeEvaluator, metrics: Mapping[str, float], *, model: str = "this model"
) -> None:
    """Add an evaluation on SugarCrepe: every set and group, and published groups."""
    prefix = f"{evaluator.name}_" if evaluator.name else ""
    names = [*evaluator.sets, *evaluator.groups]
    rows: list[list[Any]] = [[model, *(100 * metrics[f"{prefix}{name}_accuracy"] for name in names)]]
    if evaluator.groups:
        rows += [[row["model"], *(row.get(name) for name in names)] for row in published_results("sugarcrepe")]
    note = f"Rows that are wrong only because both captions are equally near: {int(metrics[f'{prefix}ties'])}."
    _add_ties(report, "SugarCrepe", evaluator)
    report.add_table("SugarCrepe: accuracy (chance is 50)", ["model", *names], rows, digits=1, note=note)
    _add_reranked(
        report, "SugarCrepe", evaluator, {name.removeprefix(prefix): value for name, value in metrics.items()}
    )


def _add_reranked(report: Report, title: str, evaluator: EmbeddingEvaluator, own: Mapping[str, float]) -> None:
    """Add every score before and after reranking, if there was any, and what it took."""
    if evaluator.reranker is None:
        return
    rows = []
    for name, before in own.items():
        after = own.get(f"reranked_{name}")
        if after is not None and isinstance(before, float):  # counts of rows are no scores
            rows.append([name.replace("_", " "), before, after, after - before])
    note = (
        f"{reranker_name(evaluator.reranker)} put the first {evaluator.rerank_depth} candidates of each query in a "
        f"new order: {int(own['rerank_pairs']):,} distinct pairs, {own['rerank_seconds']:.1f} seconds (pairs that the "
        "cache has take none). A right answer behind them cannot be brought forward."
    )
    columns = ["metric", "encoder", "reranked", "change"]
    report.add_table(f"{title}, reranked", columns, rows, percent=True, note=note)


def _add_ties(report: Report, title: str, evaluator: EmbeddingEvaluator) -> None:
    """Say above the numbers if ties decide many of them."""
    if told := told_of_ties(evaluator.outcomes()):
        report.add_text(told, title=f"{title}: ties")
