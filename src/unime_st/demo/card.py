"""The emoji benchmark's card: what it holds, how it was made, and the licence of every part."""

from __future__ import annotations

from typing import Any

from unime_st.demo.packages import PACKAGES

_HEAD = """\
# Emoji benchmark

Emoji drawn by three vendors, with names, keywords, categories and skin tones, in the layout of MMEB-train and
MMEB-eval. Two vendors' drawings (`google`: Noto, `twitter`: Twemoji) are trained on; the third's (`fluent`: Fluent 3D)
are held out altogether. {concepts} concepts are split by what is drawn, so that "man farmer" and "woman farmer" stay
together: {train} for training, {validation} for validation, {test} for the test. Seed {seed}.

Left out: flags (a drawing does not say its country's name), families told apart by their members (two vendors draw
them as the same few silhouettes), and drawings that a vendor uses for two emoji. All images are composited on white,
at 64 px (Noto, Twemoji) or 160 px (Fluent, collages).

The held-out drawings of a style-change row (EmojiCIR) lead to a Noto drawing of the same unseen concept.

"""


def card(info: dict[str, Any]) -> str:
    """Write the card of a benchmark.

    Args:
        info: the content of `benchmark.json`.

    Returns:
        Markdown.
    """
    counts = info["concepts"]
    head = _HEAD.format(concepts=sum(counts.values()), seed=info["settings"]["seed"], **counts)
    return head + "\n\n".join([_rows(info), _texts(info), _licences()]) + "\n"


def _rows(info: dict[str, Any]) -> str:
    lines = ["## Rows", "", "| task | train | validation | held-out vendor | test | held-out vendor | chance (test) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for task, train in info["train"].items():
        cells = [str(train)]
        for split in ("validation", "test"):
            counts = info["eval"][split]
            cells += [str(counts[drawings].get(task, {}).get("rows", "-")) for drawings in ("trained", "heldout")]
        chance = info["eval"]["test"]["trained"].get(task, {}).get("chance")
        cells.append("-" if chance is None else f"{100 * chance:.1f} %")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    sizes = ", ".join(f"{name} {rows}" for name, rows in info["swaps"]["test"]["trained"].items())
    lines += ["", f"Attribute swaps (test, trained vendors): {sizes}; chance 50 %."]
    return "\n".join(lines)


def _texts(info: dict[str, Any]) -> str:
    lines = ["## Texts", "", "WordNet glosses, not NLI, and training captions:", ""]
    return "\n".join(lines + [f"- {name}: {count}" for name, count in info["texts"].items()])


def _licences() -> str:
    lines = ["## Licences, as stated by the packages", ""]
    lines += [f"- `{package.spec}` ({package.registry}): {package.licence}" for package in PACKAGES]
    return "\n".join([*lines, "", "Twemoji: copyright Twitter, Inc and other contributors, graphics under CC-BY 4.0."])
