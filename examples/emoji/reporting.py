"""The demo's report: one table against chance and the linear baseline, plots, galleries, settings."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from emoji import measure
from emoji.benchmark import EmojiBenchmark
from emoji.card import add_card
from emoji.measure import VENDOR_OF, metric
from emoji.settings import MEANS_NOTHING, DemoSettings
from emoji.training import LOG_FILE
from unime_st import load_encoder
from unime_st.evaluation import Report
from unime_st.files import write_atomically
from unime_st.hub import encoder_card

NAMES = {
    "aligned": "projector aligned",
    "stage1": "+ stage 1 (distillation)",
    "stage2": "+ stage 2 (contrastive)",
}
COLUMNS = ("text→image R@1", "R@5", "R@10", "image→text R@1", "R@5 ", "R@10 ", "attribute swaps", "MMEB-like P@1")
_ORIGIN = (
    "A demonstration, not a useful embedder: parts of SmolLM2-135M-Instruct (de-quantised from 4 bits) and "
    "EfficientNet-lite0, trained on emoji with the UniME recipe, {} steps of stage 1 and {} of stage 2. The weights of "
    "the parts and the drawings keep their own licences; see the report of the demo."
)
RECALLS = [f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


def write_report(
    output: Path,
    settings: DemoSettings,
    benchmark: EmojiBenchmark,
    *,
    embeddings: Path,
    ridge: dict[str, Any],
    results: dict[str, Any],
    checkpoints: dict[str, Path],
    final: Path,
    seconds: dict[str, float],
) -> Path:
    """Write `report/` and `results.json` in the demo's output, and the model card of the `final` checkpoint."""
    summary = summarise(benchmark, ridge, results)
    write_atomically(output / "results.json", json.dumps(summary, indent=1) + "\n")
    report = Report("UniME on a miniature: emoji")
    if settings.is_short:
        report.add_text(MEANS_NOTHING)
    report.add_text(
        "A miniature multimodal LLM of real pretrained parts (SmolLM2-135M-Instruct with "
        f"{len(settings.layers)} of its 30 layers, EfficientNet-lite0) goes through the UniME recipe. All numbers "
        "are on concepts never trained on. The linear baseline is a ridge regression from the same frozen vision "
        "features to the teacher's embedding of the label."
    )
    for drawings, table in summary["tables"].items():
        seen = "seen in training" if drawings == "trained" else "never seen in training"
        rows = [[name, *(values.get(column) for column in COLUMNS)] for name, values in table.items()]
        report.add_table(f"Drawings by a vendor {seen} ({VENDOR_OF[drawings]})", ["", *COLUMNS], rows, percent=True)
    report.add_text(f"Outcomes that only ties decide, in all of these evaluations: {_ties(results)}.")
    measured = summary["tables"]["trained"][NAMES["stage2"]][COLUMNS[0]]
    shuffled = summary["shuffled_text_to_image_recall@1"]
    report.add_text(does_it_see(measured, shuffled, round(1 / summary["chance"])), title="Does it see?")
    _meta_tasks(report, results)
    _training(report, checkpoints)
    model = load_encoder(final, device="cpu")
    _galleries(report, benchmark, embeddings, model)
    packages = ("sentence-transformers", "transformers", "torch", "peft", "datasets")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    report.add_table("Seconds a step took", ["step", "seconds"], list(seconds.items()), digits=0)
    report.add_text(f"{json.dumps(asdict(settings))}\n\n{versions}", title="Settings and versions")
    add_card(report, benchmark.info)
    page = report.write(output / "report")
    write_atomically(final / "README.md", _model_card(model, summary, settings))
    return page


def does_it_see(recall: float, shuffled: float, images: int) -> str:
    """What text→image R@1 says when the images are shuffled among the captions, and no more than that.

    Example:
        >>> does_it_see(0.13, 0.0, 315)
        'With the images ..., text→image R@1 is 0.0 % in place of 13.0 % (chance 0.3 %): the answers depend on ...'
        >>> does_it_see(0.005, 0.003, 315).rpartition(": ")[2]
        'no more than chance may differ, so this does not show that the answers depend on what is in the images.'
    """
    figures = (
        f"With the images shuffled among the captions, text→image R@1 is {100 * shuffled:.1f} % in place of "
        f"{100 * recall:.1f} % (chance {100 / images:.1f} %)"
    )
    hits, left = recall * images, shuffled * images
    if hits - left <= 2 * (hits + left) ** 0.5:  # counts of rare events: the variance is the count
        return (
            f"{figures}: no more than chance may differ, so this does not show that the answers depend on what is in "
            "the images."
        )
    if left - 1 > 2:  # one hit is expected by chance, give or take one
        return f"{figures}: the answers depend on what is in the images, but more are right than chance makes right."
    return f"{figures}: the answers depend on what is in the images."


def _ties(results: dict[str, Any]) -> int:
    """Rows of all evaluations, but those of the shuffled images, whose outcome a tie decides."""
    told = [own for stage in NAMES for drawings in VENDOR_OF for own in results[stage][drawings].items()]
    return int(
        sum(
            value
            for kind, metrics in told
            for name, value in metrics.items()
            if name.endswith("_ties") or (kind == "swaps" and name == "ties")
        )
    )


def summarise(benchmark: EmojiBenchmark, ridge: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the tables, in [0, 1]."""
    images, _ = benchmark.retrieval("test", VENDOR_OF["trained"])
    tables: dict[str, Any] = {}
    for drawings, vendor in VENDOR_OF.items():
        info = benchmark.info["eval"]["test"][drawings]
        chances = [1 / len(images), 5 / len(images), 10 / len(images)] * 2
        mean_chance = sum(task["chance"] for task in info.values()) / len(info)
        rows = {"chance": dict(zip(COLUMNS, [*chances, 0.5, mean_chance], strict=True))}
        linear = ridge["test"][vendor]
        values = [linear[way][f"R@{k}"] / 100 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
        rows["linear baseline (ridge)"] = dict(zip(COLUMNS, values, strict=False))
        for name, shown in NAMES.items():
            own = results[name][drawings]
            measured = [metric(own["retrieval"], recall) for recall in RECALLS]
            measured.append(metric(own["swaps"], "mean_of_sets_accuracy"))
            measured.append(metric(own["mmeb"], "mean_precision@1"))
            rows[shown] = dict(zip(COLUMNS, measured, strict=True))
        tables[drawings] = rows
    shuffled = metric(results["stage2"]["shuffled"], "text_to_image_recall@1")
    return {"tables": tables, "shuffled_text_to_image_recall@1": shuffled, "chance": 1 / len(images)}


def _meta_tasks(report: Report, results: dict[str, Any]) -> None:
    for drawings in VENDOR_OF:
        last = results["stage2"][drawings]["mmeb"]
        metas = sorted(
            {name.split("meta_")[1].removesuffix("_precision@1") for name in last if "meta_" in name} - {"mean"}
        )
        series = {
            shown: [metric(results[name][drawings]["mmeb"], f"meta_{meta}_precision@1") for meta in metas]
            for name, shown in NAMES.items()
        }
        report.add_bar_plot(f"Precision@1 by meta-task, {drawings} drawings", metas, series, "Precision@1")


def _training(report: Report, checkpoints: dict[str, Path]) -> None:
    for name in ("stage1", "stage2"):
        log = [
            row
            for row in json.loads((checkpoints[name] / LOG_FILE).read_text(encoding="utf-8"))["log"]
            if "loss" in row
        ]
        plots: dict[str, tuple[tuple[str, ...], str]] = {f"Loss of {NAMES[name][2:]}": (("loss",), "loss")}
        if name == "stage2":
            filtered = ("false_negatives_by_identity", "false_negatives_by_margin")
            plots["False negatives filtered, a row"] = filtered, "candidates"
            plots["Hardness of the negatives kept"] = ("positive_similarity", "hard_negative_similarity"), "cosine"
        for title, (wanted, unit) in plots.items():
            lines = {key: [(row["step"], row[key]) for row in log if key in row] for key in wanted}
            drawn = {key: tuple(zip(*points, strict=True)) for key, points in lines.items() if points}
            if drawn:
                report.add_line_plot(title, drawn, "step", unit)  # type: ignore[arg-type]


def _galleries(report: Report, benchmark: EmojiBenchmark, embeddings: Path, model: SentenceTransformer) -> None:
    for drawings, vendor in VENDOR_OF.items():
        evaluator = measure.retrieval(benchmark, "test", drawings, embeddings)
        evaluator(model)
        for direction, shown in (("text_to_image", "Text→image"), ("image_to_text", "Image→text")):
            count = len(evaluator.images)
            queries = list(range(0, count, max(1, count // 8)))[:8]
            entries = evaluator.top(5, direction, queries=queries, with_right=True)  # type: ignore[arg-type]
            note = "Where the right answer is not among the five, it stands after them, with its rank."
            report.add_gallery(f"{shown}, {vendor}: every {max(1, count // 8)}th query, top 5", entries, note=note)


def _model_card(model: SentenceTransformer, summary: dict[str, Any], settings: DemoSettings) -> str:
    """Card of the demo's checkpoint: that of any encoder, with the demo's table; results of the galleries are in it.

    That of a short run gives no results to the Hub, and says above all that they mean nothing.
    """
    data: Any = model.model_card_data
    data.license = "apache-2.0"
    data.tags = ["miniature"]
    if settings.is_short:
        data.eval_results_dict = {}
    text = encoder_card(model, repo_id="unime-emoji-miniature", title="UniME on a miniature: emoji")
    lines = [
        "## Before and after each stage",
        "",
        "| concepts never trained on | text→image R@1 | image→text R@1 | attribute swaps |",
        "|---|---|---|---|",
    ]
    for drawings, table in summary["tables"].items():
        for name, values in table.items():
            cells = [values.get(column) for column in (COLUMNS[0], COLUMNS[3], COLUMNS[6])]
            shown = " | ".join("–" if cell is None else f"{100 * cell:.1f} %" for cell in cells)
            lines.append(f"| {name}, {drawings} drawings | {shown} |")
    lines += ["", "## Limits", "", _ORIGIN.format(settings.stage1.steps, settings.stage2.steps), ""]
    text = text.replace("## Limits\n", "\n".join(lines), 1)
    return text.replace("\n# ", f"\n> **{MEANS_NOTHING}**\n\n# ", 1) if settings.is_short else text
