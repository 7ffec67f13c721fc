"""Writes a report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from unime_st.evaluation.report.section import Section

FILES = "report_files"


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole report; its pictures are in the folder `report_files` beside it."""
    parts = [f"# {escape(title)}"]
    for section in sections:
        if section.title:
            parts.append(f"## {escape(section.title)}")
        parts.extend(_BODIES[section.kind](section.title, section.data))
        if section.data.get("note"):
            parts.append(escape(section.data["note"]))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    r"""The text in one line, escaped so that Markdown shows it unchanged.

    >>> escape("a|b <i> *c*")
    'a\\|b \\<i\\> \\*c\\*'
    """
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*_\[\]{}<>#|~$])", r"\\\1", line.replace("&", "&amp;"))
    return re.sub(r"^([+-](?=\s)|\d+(?=[.)]\s))", lambda found: f"\u200b{found[0]}", line)


def _text(_: str, data: dict[str, Any]) -> Iterator[str]:
    for paragraph in data["text"].split("\n\n"):
        if paragraph.strip():
            yield escape(paragraph)


def _table(_: str, data: dict[str, Any]) -> Iterator[str]:
    rows = [
        [f"**{escape(cell)}**" if bold else escape(cell) for cell, bold in zip(row, best, strict=True)]
        for row, best in zip(data["shown"], data["best"], strict=True)
    ]
    yield _rows(data["columns"], rows, data["numeric"])


def _plot(title: str, data: dict[str, Any]) -> Iterator[str]:
    yield _picture(data["picture"], title)


def _gallery(_: str, data: dict[str, Any]) -> Iterator[str]:
    entries = data["entries"]
    most = max((sum("rank" not in result for result in entry["results"]) for entry in entries), default=0)
    out_of_place = any("rank" in result for entry in entries for result in entry["results"])
    columns = ["query", *(str(place) for place in range(1, most + 1)), *(["further down"] if out_of_place else [])]
    rows = []
    for entry in entries:
        cells = [[_side(entry["query"]) + ("" if entry["rank"] is None else f"<br>rank {entry['rank']}")]]
        for in_place in (True, False):
            results = [result for result in entry["results"] if ("rank" not in result) == in_place]
            cells.append([f"{_side(result)}<br>{verdict(result)}" for result in results])
        query, found, further = cells
        row = [*query, *found, *[""] * (most - len(found)), *further]
        rows.append(row + [""] * (len(columns) - len(row)))
    yield _rows(columns, rows, [False] * len(columns))


def verdict(result: dict[str, Any]) -> str:
    """A sign and a word for a result, and its rank if it does not stand at its place."""
    word = "✓ right" if result["right"] else "✗ wrong"
    return f"{word}, rank {result['rank']}" if "rank" in result else word


def _side(side: dict[str, str | None]) -> str:
    picture = [_picture(side["image"], side["text"] or "image")] if side["image"] else []
    return "<br>".join([*picture, *([escape(side["text"])] if side["text"] else [])])


def _picture(name: str, alt: str) -> str:
    return f"![{escape(alt)}]({FILES}/{name})"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A table, whose cells are Markdown already."""
    lines = [[escape(column) for column in columns], ["---:" if right else "---" for right in numeric]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *rows])


_BODIES = {"text": _text, "table": _table, "plot": _plot, "gallery": _gallery}
