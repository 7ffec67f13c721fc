"""The demo's report: tables against chance and the linear baseline, comparisons with intervals, pictures, settings."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from emoji.benchmark import EmojiBenchmark
from emoji.card import add_card
from emoji.concepts import HELD_OUT_VENDOR, TRAINED_VENDORS
from emoji.measure import hits, interval, retrieval
from emoji.media import TASKS, VENDOR, galleries, guessing
from emoji.settings import MEANS_NOTHING, DemoSettings
from emoji.tasks import DRAWINGS
from emoji.training import LOG_FILE
from unime_st import load_encoder
from unime_st.evaluation import Report
from unime_st.files import write_atomically
from unime_st.hub import encoder_card

NAMES = {
    "ridge": "linear baseline (ridge)",
    "start": "before training",
    "stage1": "stage 1",
    "stage2_only": "stage 2 alone",
    "stage2": "stage 1 + 2",
}
COLUMNS = {
    "text→image R@1": ("label", "text_to_image", 1),
    "R@5": ("label", "text_to_image", 5),
    "image→text R@1": ("label", "image_to_text", 1),
    "R@5 ": ("label", "image_to_text", 5),
    "keywords→image R@1": ("keywords", "text_to_image", 1),
    "definition→image R@1": ("definition", "text_to_image", 1),
}
"""Column -> kind of text, direction and k."""
SWAPS = "attribute swaps"
TEXTS = {"label→keywords R@1": "keywords", "label→definition R@1": "definition"}
PAIRS = (("stage2", "ridge"), ("stage2", "stage2_only"), ("stage1", "start"))
"""Compared query by query: what is asked, against what."""
SEEN = {"trained": "Drawings by the two trained vendors", "heldout": "Drawings by the held-out vendor"}
QUERIES = 5  # shown after each stage
_ORIGIN = (
    "A demonstration, not a useful embedder: parts of SmolLM2-135M-Instruct (de-quantised from 4 bits) and "
    "EfficientNet-lite0, trained on emoji with the UniME recipe, {} steps of stage 1 and {} of stage 2. The weights of "
    "the parts and the drawings keep their own licences; see the report of the demo."
)


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the tables, in [0, 1], from the ranks of each model; see `measure.evaluate`.

    Returns:
        "tables": kind of drawings -> row -> column -> "mean" and "error", its standard error over the test's concepts;
        "texts": the same for text->text; "differences": kind of drawings -> pair of rows -> column -> `interval`;
        "media": row -> column -> the same, on videos and pages; "queries": column -> how many; "shuffled": text->image
        R@1 with shuffled images; "chance": of it.
    """
    found = {name: results[name]["ranks"] for name in NAMES}
    tables: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for drawings, vendors in DRAWINGS.items():
        values = {
            name: {column: hits(own, vendors, *asked) for column, asked in COLUMNS.items()}
            for name, own in found.items()
        }
        chance = {column: {"mean": k / len(values["ridge"][column])} for column, (_, _, k) in COLUMNS.items()}
        rows = {NAMES[name]: {column: interval(v) for column, v in own.items()} for name, own in values.items()}
        for name in NAMES:
            if "swaps" in results[name]:
                rows[NAMES[name]][SWAPS] = {"mean": results[name]["swaps"][drawings]}
        tables[drawings] = {"chance": chance | {SWAPS: {"mean": 0.5}}} | rows
        differences[drawings] = {
            f"{NAMES[one]} − {NAMES[other]}": {
                column: interval(values[one][column] - values[other][column]) for column in COLUMNS
            }
            for one, other in PAIRS
        }
    texts = {
        NAMES[name]: {column: interval(hits(own, ["text"], kind, "text_to_text")) for column, kind in TEXTS.items()}
        for name, own in found.items()
    }
    texts["the teacher"] = texts.pop(NAMES["ridge"])  # the baseline's texts are the teacher's
    shuffled = np.array(results["stage2"]["shuffled"])
    seen = {NAMES[name]: own["media"] for name, own in results.items() if "media" in own}
    media_rows = len(results["stage2"]["media"][next(iter(TASKS))])
    guessed = {column: {"mean": level} for column, level in guessing(media_rows).items()}
    return {
        "tables": tables,
        "texts": texts,
        "differences": differences,
        "media": {
            "chance": guessed,
            **{name: {c: interval(np.array(v)) for c, v in own.items()} for name, own in seen.items()},
        },
        "queries": {
            column: len(found["ridge"][f"{TRAINED_VENDORS[0]} {kind}"][way])
            for column, (kind, way, _) in COLUMNS.items()
        },
        "shuffled": float((shuffled <= 1).mean()),
        "chance": 1 / len(shuffled),
    }


def write_report(
    output: Path,
    settings: DemoSettings,
    benchmark: EmojiBenchmark,
    *,
    media: Path,
    embeddings: Path,
    results: dict[str, Any],
    checkpoints: dict[str, Path],
    final: Path,
    seconds: dict[str, float],
) -> Path:
    """Write `report/` and `results.json` in the demo's output, and the model card of the `final` checkpoint."""
    summary = summarise(results)
    write_atomically(output / "results.json", json.dumps(summary, indent=1) + "\n")
    report = Report("UniME on a miniature: emoji")
    if settings.is_short:
        report.add_text(MEANS_NOTHING)
    report.add_text(
        "A miniature multimodal LLM of real pretrained parts (EfficientNet-lite0 and the first "
        f"{settings.layers} of SmolLM2-135M-Instruct's 30 layers) goes through the UniME recipe. All numbers are on "
        "concepts never trained on, ± the standard error over them. The linear baseline is a ridge regression from the "
        "same frozen vision features to the teacher's embedding of the label. Stage 2 sees labels alone; keywords and "
        "definitions are of kinds that it never saw."
    )
    columns = ["", *COLUMNS, SWAPS]
    for drawings, table in summary["tables"].items():
        rows = [[name, *(shown(values.get(column)) for column in columns[1:])] for name, values in table.items()]
        report.add_table(SEEN[drawings], columns, rows)
    rows = [[name, *map(shown, values.values())] for name, values in summary["texts"].items()]
    report.add_table("Texts", ["", *TEXTS], rows)
    for drawings, table in summary["differences"].items():
        rows = [[name, *map(between, values.values())] for name, values in table.items()]
        note = "Points, and the middle 95 % of a bootstrap over concepts, paired by concept."
        report.add_table(f"{SEEN[drawings]}: differences", columns[:-1], rows, note=note)
    for other in ("ridge", "stage2_only"):
        report.add_text(verdict(summary["differences"], NAMES[other]))
    measured = summary["tables"]["trained"][NAMES["stage2"]][next(iter(COLUMNS))]["mean"]
    report.add_text(does_it_see(measured, summary["shuffled"], round(1 / summary["chance"])), title="Does it see?")
    _media(report, summary["media"], results["stage2"]["media"], settings)
    cones = [[NAMES[name], results[name]["cone"]] for name in checkpoints]
    report.add_table("Mean cosine of different labels", ["", "cosine"], cones, digits=2)
    _training(report, checkpoints)
    model = _galleries(report, benchmark, embeddings, checkpoints)
    for task, entries in galleries(checkpoints["stage2"], media, embeddings).items():
        report.add_gallery(f"{NAMES['stage2']}: {task}", entries)
    packages = ("sentence-transformers", "transformers", "torch", "peft", "datasets")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    report.add_table("Seconds a step took", ["step", "seconds"], list(seconds.items()), digits=0)
    report.add_text(f"{json.dumps(asdict(settings))}\n\n{versions}", title="Settings and versions")
    add_card(report, benchmark.info)
    page = report.write(output / "report")
    write_atomically(final / "README.md", _model_card(model, summary, settings))
    return page


def shown(value: Mapping[str, float] | None) -> str:
    """A rate in percent, with its standard error where it has one.

    >>> shown({"mean": 0.219, "error": 0.021}), shown({"mean": 0.5}), shown(None)
    ('21.9 ± 2.1', '50.0', '–')
    """
    if value is None:
        return "–"
    error = f" ± {100 * value['error']:.1f}" if "error" in value else ""
    return f"{100 * value['mean']:.1f}{error}"


def between(value: Mapping[str, float]) -> str:
    """A difference in points, with its interval.

    >>> between({"mean": 0.021, "low": -0.004, "high": 0.05})
    '+2.1 (-0.4 to +5.0)'
    """
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value[name] for name in ("mean", "low", "high")))


def verdict(differences: Mapping[str, Any], other: str) -> str:
    """Where stages 1 and 2 together are above another row, level with it or below it, by the intervals.

    >>> found = {"low": 0.01, "high": 0.05}, {"low": -0.01, "high": 0.05}
    >>> pair = {"stage 1 + 2 − stage 2 alone": dict(zip(("keywords→image R@1", "R@5"), found))}
    >>> verdict({"heldout": pair}, "stage 2 alone")
    'Stage 1 + 2 against stage 2 alone: above in keywords→image R@1 (heldout); level in R@5 (heldout).'
    """
    places: dict[str, list[str]] = {"above": [], "level": [], "below": []}
    for drawings, pairs in differences.items():
        for column, found in pairs[f"{NAMES['stage2']} − {other}"].items():
            place = "above" if found["low"] > 0 else "below" if found["high"] < 0 else "level"
            places[place].append(f"{column.strip()} ({drawings})")
    told = "; ".join(f"{place} in {', '.join(names)}" for place, names in places.items() if names)
    return f"Stage 1 + 2 against {other}: {told}."


def above_chance(found: Mapping[str, Any], guessed: Mapping[str, Any]) -> str:
    """Where the final model is above chance by its intervals.

    >>> found = {"low": 0.3, "mean": 0.4, "high": 0.5}, {"low": 0.2, "mean": 0.3, "high": 0.4}
    >>> above_chance(dict(zip("ab", found)), {"a": {"mean": 0.25}, "b": {"mean": 0.25}})
    'Stage 1 + 2 is above chance in a; not shown to be above it in b.'
    """
    above = [column for column, own in found.items() if own["low"] > guessed[column]["mean"]]
    rest = [column for column in found if column not in above]
    told = [f"above chance in {', '.join(above)}"] if above else []
    told += [f"not shown to be above {'it' if above else 'chance'} in {', '.join(rest)}"] if rest else []
    return f"Stage 1 + 2 is {'; '.join(told)}."


def _media(report: Report, table: Mapping[str, Any], rows: Mapping[str, Any], settings: DemoSettings) -> None:
    """Videos and pages: what they are, every score with chance and its standard error."""
    count = len(rows[next(iter(TASKS))])
    report.add_text(
        f"{count} concepts of the test split that have keywords, drawn by {VENDOR}. A drawing crosses a plain "
        "background in one of four directions, or fades into another; a page has title, definition and keywords, below "
        "the drawing where it is illustrated. They go through the evaluator that MMEB V2 goes through. The "
        "miniature's family takes no videos, so it is shown four frames as images; a page is shrunk to "
        f"{settings.image_size} pixels a side, at which its words cannot be read. Nothing of the kind was trained "
        f"on.\n\n{above_chance(table[NAMES['stage2']], table['chance'])}",
        title="Videos and pages",
    )
    lines = [[name, *map(shown, values.values())] for name, values in table.items()]
    report.add_table("Videos and pages: scores", ["", *TASKS], lines)


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


def _training(report: Report, checkpoints: dict[str, Path]) -> None:
    """Plots of what was logged: losses, how the cone opens, what is filtered."""
    trained = {name: path for name, path in checkpoints.items() if (path / LOG_FILE).is_file()}
    logs = {name: json.loads((path / LOG_FILE).read_text(encoding="utf-8"))["log"] for name, path in trained.items()}
    plots = {
        "Cosine of positives and of all negatives: the cone opens": (
            ("positive_similarity", "negative_similarity"),
            "cosine",
        ),
        "Loss": (("loss",), "loss"),
        "False negatives filtered, a row": (("false_negatives_by_identity", "false_negatives_by_margin"), "candidates"),
    }
    for title, (wanted, unit) in plots.items():
        lines = {}
        for name, log in logs.items():
            for key in wanted:
                points = [(row["step"], row[key]) for row in log if key in row]
                if points:
                    lines[f"{NAMES[name]}: {key.replace('_', ' ')}"] = tuple(zip(*points, strict=True))
        report.add_line_plot(title, lines, "step", unit)  # type: ignore[arg-type]


def _galleries(
    report: Report, benchmark: EmojiBenchmark, embeddings: Path, checkpoints: Mapping[str, Path]
) -> SentenceTransformer:
    """The same queries after each stage, and the final model, which is returned, on the held-out vendor's drawings."""
    note = "Where the right answer is not among the five, it stands after them, with its rank."
    asked = {name: [(TRAINED_VENDORS[0], "text_to_image")] for name in ("start", "stage1", "stage2")}
    asked["stage2"] += [(HELD_OUT_VENDOR, "text_to_image"), (HELD_OUT_VENDOR, "image_to_text")]
    for name, views in asked.items():
        model = load_encoder(checkpoints[name], device="cpu")
        for vendor, direction in views:
            evaluator = retrieval(benchmark, "test", vendor, embeddings)
            evaluator(model)
            count = len(evaluator.images)
            queries = list(range(0, count, max(1, count // QUERIES)))[:QUERIES]
            entries = evaluator.top(5, direction, queries=queries, with_right=True)  # type: ignore[arg-type]
            title = f"{NAMES[name]}: {direction.replace('_to_', '→')}, {vendor}, top 5"
            report.add_gallery(title, entries, note=note)
    return model


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
    columns = ["text→image R@1", "image→text R@1", SWAPS]
    lines = [
        "## Before and after each stage",
        "",
        f"| concepts never trained on, percent | {' | '.join(columns)} |",
        "|---|---|---|---|",
    ]
    for drawings, table in summary["tables"].items():
        for name, values in table.items():
            cells = " | ".join(shown(values.get(column)) for column in columns)
            lines.append(f"| {name}, {drawings} drawings | {cells} |")
    lines += ["", "## Limits", "", _ORIGIN.format(settings.stage1.steps, settings.stage2.steps), ""]
    text = text.replace("## Limits\n", "\n".join(lines), 1)
    return text.replace("\n# ", f"\n> **{MEANS_NOTHING}**\n\n# ", 1) if settings.is_short else text
