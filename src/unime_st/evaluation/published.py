"""Results that others published, to set ours beside."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

Benchmark = Literal["mmeb", "retrieval", "sugarcrepe"]


def published_results(benchmark: Benchmark) -> list[dict[str, Any]]:
    """Read the published rows of a benchmark, in percent.

    Args:
        benchmark: ``"mmeb"``: by meta-task, distribution and ``overall``, of which ``average`` says whether it is the
            ``mean_of_tasks`` (36) or the ``mean_of_meta_tasks`` (4): the two differ by three points and do not compare.
            ``"retrieval"``: recall@1 of each set by direction. ``"sugarcrepe"``: accuracy by group.

    Returns:
        One mapping a model, with its ``model`` and ``source``.

    Raises:
        KeyError: If there is no such benchmark.

    Example:
        >>> next(row["overall"] for row in published_results("mmeb") if row["model"] == "UniME LLaVA-1.6")
        66.6
    """
    text = files("unime_st.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)[benchmark]
