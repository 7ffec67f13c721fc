"""The emoji benchmark's card: what it holds, how it was made, and the licence of every part."""

from __future__ import annotations

from typing import Any

from emoji.packages import PACKAGES
from unime_st.evaluation import Report

_HEAD = """\
Emoji drawn by three vendors, with names, keywords, categories and skin tones, in the layout of MMEB-train and
MMEB-eval. Two vendors' drawings (`google`: Noto, `twitter`: Twemoji) are trained on; the third's (`fluent`: Fluent 3D)
are held out altogether. {concepts} concepts are split by what is drawn, so that "man farmer" and "woman farmer" stay
together: {train} for training, {validation} for validation, {test} for the test. Seed {seed}.

Left out: flags (a drawing does not say its country's name), families told apart by their members (two vendors draw
them as the same few silhouettes), and drawings that a vendor uses for two emoji. All images are composited on white,
at 64 px (Noto, Twemoji) or 160 px (Fluent, collages).

The held-out drawings of a style-change row (EmojiCIR) lead to a Noto drawing of the same unseen concept.
"""
_ROWS = ("task", "train", "validation", "held-out vendor", "test", "held-out vendor (test)", "chance (test)")
_TWEMOJI = "Twemoji: copyright Twitter, Inc and other contributors, graphics under CC-BY 4.0."


def card(info: dict[str, Any]) -> str:
    """The card of a benchmark, in Markdown, from the content of its `benchmark.json`."""
    rows = [_ROWS, ["---"] * len(_ROWS), *_rows(info)]
    parts = [
        f"# Emoji benchmark\n\n{_head(info)}",
        "## Rows\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{_swaps(info)}",
        "## Texts\n\nWordNet glosses, not NLI, and training captions:\n\n"
        + "\n".join(f"- {name}: {count}" for name, count in info["texts"].items()),
        "## Licences, as stated by the packages\n\n"
        + "\n".join(f"- `{package.spec}` ({package.registry}): {package.licence}" for package in PACKAGES)
        + f"\n\n{_TWEMOJI}",
    ]
    return "\n\n".join(parts) + "\n"


def add_card(report: Report, info: dict[str, Any]) -> None:
    """Add the same to a report, as its own texts and tables."""
    report.add_text(_head(info).replace("`", ""), title="The benchmark")
    report.add_table("The benchmark's rows", _ROWS, _rows(info), note=_swaps(info))
    texts = [[name, int(count)] for name, count in info["texts"].items()]
    report.add_table("The benchmark's texts", ["WordNet glosses, not NLI, and training captions", "texts"], texts)
    packages = [[package.spec, package.registry, package.licence] for package in PACKAGES]
    columns = ["package", "registry", "licence, as the package states it"]
    report.add_table("Licences of the parts and drawings", columns, packages, note=_TWEMOJI)


def _head(info: dict[str, Any]) -> str:
    counts = info["concepts"]
    return _HEAD.format(concepts=sum(counts.values()), seed=info["settings"]["seed"], **counts).strip()


def _rows(info: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task, train in info["train"].items():
        cells = [str(train)]
        for split in ("validation", "test"):
            counts = info["eval"][split]
            cells += [str(counts[drawings].get(task, {}).get("rows", "-")) for drawings in ("trained", "heldout")]
        chance = info["eval"]["test"]["trained"].get(task, {}).get("chance")
        rows.append([task, *cells, "-" if chance is None else f"{100 * chance:.1f} %"])
    return rows


def _swaps(info: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {rows}" for name, rows in info["swaps"]["test"]["trained"].items())
    return f"Attribute swaps (test, trained vendors): {sizes}; chance 50 %."
