"""The averages of MMEB V2 as a part of a report, beside published rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unime_st.evaluation.mmeb.evaluator import MMEBEvaluator
from unime_st.evaluation.mmeb.v2 import V2_META_TASKS
from unime_st.evaluation.published import published_results
from unime_st.evaluation.report.report import Report

_MEANS = {"image": "image_mean", "video": "video_mean", "visdoc": "visdoc_mean", "overall": "overall_mean"}
_NOTE = (
    "Means over tasks: of each group, of images, videos and documents, and overall. Numbers compare only at equal "
    "frames and pixels; where a paper does not tell its frames, there is a dash. Published rows are shown when all 78 "
    "tasks were evaluated whole; those of Qwen3-VL-Embedding are with its own prompts, in the system turn."
)


def add_v2_averages(report: Report, evaluator: MMEBEvaluator, own: Mapping[str, float], model: str) -> None:
    """Add the means by group and modality, with frames and pixels, and published rows beside all 78 tasks."""
    groups = dict.fromkeys(evaluator.meta_tasks[task] for task in evaluator.results if task in evaluator.meta_tasks)
    names: dict[str, str] = {}
    for group in groups:
        metric = next(name for kind in ("precision@1", "ndcg@5") if (name := f"meta_{group}_{kind}") in own)
        names[group] = metric
    names |= {mean: metric for mean, metric in _MEANS.items() if metric in own}
    shown = "; ".join(dict.fromkeys(frames for frames in evaluator.frames.values() if frames))
    rows: list[list[Any]] = [[model, shown or "–", pixels_of(evaluator), *(100 * own[name] for name in names.values())]]
    if set(evaluator.results) == set(V2_META_TASKS) and evaluator.limit is None:
        rows += [
            [row["model"], row["frames"] or "–", "–", *(row.get(name) for name in names)]
            for row in published_results("mmeb_v2")
        ]
    note = _NOTE if evaluator.task_prompts is None else f"{_NOTE} The tasks have {evaluator.task_prompts}'s prompts."
    report.add_table("MMEB: averages", ["model", "frames", "pixels", *names], rows, digits=1, note=note)
    if len(rows) > 1:
        cells = [[cell if isinstance(cell, float) else None for cell in row[3:]] for row in rows]
        report.add_heat_map("MMEB: averages, drawn", [row[0] for row in rows], list(names), cells)


def pixels_of(evaluator: MMEBEvaluator) -> str:
    """What an evaluation makes of the size of images, pages and frames."""
    if evaluator.image_size is not None:
        sides = evaluator.image_size if isinstance(evaluator.image_size, tuple) else (evaluator.image_size,) * 2
        return "{} x {}".format(*sides)
    return "as stored" if evaluator.max_pixels is None else f"<= {evaluator.max_pixels}"
