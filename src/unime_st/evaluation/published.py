"""Results that others published, for comparison with ours."""

from __future__ import annotations

import csv
import json
from importlib.resources import files
from typing import Any, Literal

Benchmark = Literal["mmeb", "mmeb_v2", "retrieval", "sugarcrepe"]


def published_results(benchmark: Benchmark) -> list[dict[str, Any]]:
    """Read the published rows of a benchmark, in percent.

    Args:
        benchmark: ``"mmeb"`` has scores by meta-task, by distribution and ``overall``; ``average`` says whether
            ``overall`` is the ``mean_of_tasks`` (36) or the ``mean_of_meta_tasks`` (4), which differ by three points
            and do not compare. ``"mmeb_v2"`` has means by group, by modality (``image``, ``video``, ``visdoc``) and
            ``overall``, over the 78 tasks, and ``frames``, the number of frames of a video, without which they do not
            compare. ``"retrieval"`` has recall@1 of each set by direction, and ``"sugarcrepe"`` has accuracy
            by group.

    Returns:
        One mapping per model, with its ``model`` and ``source``.

    Raises:
        KeyError: If there is no such benchmark.

    Example:
        >>> next(row["overall"] for row in published_results("mmeb") if row["model"] == "UniME LLaVA-1.6")
        66.6
    """
    text = files("unime_st.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)[benchmark]


def published_task_scores(model: str | None = None) -> dict[str, dict[str, float]]:
    """Read published scores by task, over MMEB V2's 36 image, 19 video and 24 document rows.

    They are the scores published with VLM2Vec 2.0.1: hit@1 of images and videos, linear nDCG@5 of documents, in [0, 1].
    The plain mean of the 36 image rows is the published image score. ``MomentSeeker`` is the benchmark's, with 1,602
    rows; ``MomentSeeker_1k8`` is no part of it. ``ViDoSeek-page`` and ``MMLongBench-page`` are those of version 2.1,
    on the mended data: those of 2.0.1 were 20 to 60 points lower for faults of the data. Videos show 8 frames.

    Args:
        model: ``"VLM2Vec-V2.0-Qwen2VL-2B"`` or another of the models; None for all.

    Returns:
        A mapping from model to task to score.

    Raises:
        KeyError: If there is no such model.

    Example:
        >>> published_task_scores("VLM2Vec-V2.0-Qwen2VL-2B")["VLM2Vec-V2.0-Qwen2VL-2B"]["VOC2007"]
        0.849
    """
    text = files("unime_st.evaluation").joinpath("published_v2.csv").read_text(encoding="utf-8")
    scores: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(text.splitlines()):
        metric = "ndcg_linear@5" if row["modality"] == "visdoc" else "hit@1"
        scores.setdefault(row["model"], {})[row["task"]] = float(row[metric])
    if model is None:
        return scores
    if model not in scores:
        raise KeyError(f"No scores by task are known of {model!r}; there are {', '.join(scores)}.")
    return {model: scores[model]}
