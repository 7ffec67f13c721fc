"""The report of a training on pairs: scores before and after, the loss, the data, the worst mistakes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from unime_st.data import PairsReport
from unime_st.evaluation import ImageTextRetrievalEvaluator, Report
from unime_st.evaluation.report.summary import add_retrieval

logger = logging.getLogger(__name__)


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    checked: PairsReport,
    evaluator: SentenceEvaluator,
    log: Sequence[Mapping[str, Any]],
) -> Path:
    """Write ``report.html``, ``.md`` and ``.json`` of a run, whose results have metrics ``before`` and ``after``."""
    report = Report(f"{results['data']} on {Path(results['backbone']).name}")
    before, after = results["before"], results["after"]
    by_chance = evaluator.chance() if isinstance(evaluator, ImageTextRetrievalEvaluator) else {}
    rows = []
    for name, value in after.items():
        metric = name.removeprefix("held_out_")
        if "recall@" in metric:
            shown = metric.replace("_recall@", " R@").replace("_", " ")
            rows.append([shown, by_chance.get(metric), before.get(name), value])
    columns = ["metric", "chance", "before", "after"]
    note = f"{results['rows']['held_out']} rows; chance is that of a random order."
    report.add_table("Held-out pairs: recall before and after", columns, rows, percent=True, note=note)
    steps = [entry for entry in log if "loss" in entry]
    try:
        curve = ([entry["step"] for entry in steps], [entry["loss"] for entry in steps])
        report.add_line_plot("Loss", {"loss": curve}, "step", "loss")
    except ImportError:
        logger.info("No plot of the loss, for matplotlib is not installed (extra `eval`).")
    columns = ["step", "loss", "positive_similarity", "hard_negative_similarity", "false_negatives_filtered"]
    report.add_table(
        "The last steps logged", columns, [{name: entry.get(name) for name in columns} for entry in steps[-20:]]
    )
    if isinstance(evaluator, ImageTextRetrievalEvaluator):
        add_retrieval(report, evaluator, after, model="after")
    report.add_table("The data", ["found"], [[line.strip()] for line in str(checked).splitlines()])
    settings = {name: value for name, value in results.items() if name not in ("before", "after")}
    settings["rows"] = ", ".join(f"{count} {part.replace('_', ' ')}" for part, count in results["rows"].items())
    report.add_settings(settings)
    return report.write(folder)


def evaluation_report(
    folder: str | Path, evaluator: SentenceEvaluator, metrics: Mapping[str, float], *, model: str, data: str
) -> Path:
    """Write the report of one evaluation on pairs.

    Args:
        folder: Gets ``report.html``, ``.md`` and ``.json``.
        evaluator: Of :func:`~unime_st.training.pairs_evaluator`, after its call.
        metrics: What the call returned.
        model: Name of the model.
        data: Name of the data.

    Returns:
        Path of the HTML page.
    """
    report = Report(f"{model} on {data}")
    if isinstance(evaluator, ImageTextRetrievalEvaluator):
        add_retrieval(report, evaluator, metrics, model=model)
    else:
        report.add_table("Retrieval", ["metric", "value"], list(map(list, metrics.items())))
    report.add_settings({"model": model, "data": data})
    return report.write(folder)
