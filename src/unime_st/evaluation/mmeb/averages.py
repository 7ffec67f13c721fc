"""The metrics of MMEB: by task, and the means that papers print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from unime_st.evaluation.mmeb.results import METRIC_NAMES, TaskResult
from unime_st.evaluation.mmeb.tasks import IN_DISTRIBUTION, META_TASKS


def metrics_of(
    results: Mapping[str, TaskResult], meta_tasks: Mapping[str, str], modality: Mapping[str, str]
) -> dict[str, float]:
    """Every score, tie and mean, see :class:`~unime_st.evaluation.MMEBEvaluator`; ``modality`` is that of each task."""
    metrics: dict[str, float] = {}
    for task, result in results.items():
        metrics[f"{task}_{METRIC_NAMES[result.metric]}"] = result.score
        metrics[f"{task}_ties"] = int(result.tied.sum())
    precision = {task: result.score for task, result in results.items() if result.metric == "hit@1"}
    graded = {task: result.score for task, result in results.items() if result.metric == "ndcg@5"}
    by_meta = _by_group(precision, meta_tasks)
    metrics |= {f"meta_{meta}_precision@1": value for meta, value in by_meta.items()}
    metrics |= {f"meta_{group}_ndcg@5": value for group, value in _by_group(graded, meta_tasks).items()}
    if by_meta:
        metrics["meta_mean_precision@1"] = float(np.mean(list(by_meta.values())))
    published = [task for task in precision if task in META_TASKS]
    inside = [task for task in published if task in IN_DISTRIBUTION]
    outside = [task for task in published if task not in IN_DISTRIBUTION]
    for key, tasks in (("in_distribution", inside), ("out_of_distribution", outside)):
        if tasks:
            metrics[f"{key}_precision@1"] = _mean(precision, tasks)
    if precision:
        metrics["mean_precision@1"] = _mean(precision, precision)
    metrics |= _mixed({task: result.score for task, result in results.items()}, graded, modality)
    return metrics | {"ties": sum(int(result.tied.sum()) for result in results.values()), "tasks": len(results)}


def _by_group(scores: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """The mean of each group's tasks, in the order of the first of them."""
    tasks: dict[str, list[str]] = {}
    for task in scores:
        if task in groups:
            tasks.setdefault(groups[task], []).append(task)
    return {group: _mean(scores, own) for group, own in tasks.items()}


def _mixed(scores: Mapping[str, float], graded: Mapping[str, float], modality: Mapping[str, str]) -> dict[str, float]:
    """MMEB V2's averages, where there are other tasks than Precision@1 on images."""
    by_kind = _by_group(scores, modality)
    if not graded and by_kind.keys() <= {"image"}:
        return {}
    metrics = {"mean_ndcg@5": _mean(graded, graded)} if graded else {}
    return {
        **metrics,
        **{f"{kind}_mean": value for kind, value in by_kind.items()},
        "overall_mean": _mean(scores, scores),
    }


def _mean(values: Mapping[str, float], keys: Iterable[str]) -> float:
    return float(np.mean([values[key] for key in keys]))
