"""A report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unime_st.evaluation.report import Section

FILES = "report_files"


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole report; pictures are looked for in the folder `report_files` beside it."""
    parts = [f"# {escape(title)}"]
    for section in sections:
        if section.title:
            parts.append(f"## {escape(section.title)}")
        parts.extend(_BODIES[section.kind](section.title, section.data))
        if section.data.get("note"):
            parts.append(escape(section.data["note"]))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    r"""Text in one line that Markdown shows as it is.

    Example:
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
    most = max((len(entry["results"]) for entry in data["entries"]), default=0)
    rows = []
    for entry in data["entries"]:
        found = [f"{_side(result)}<br>{verdict(right=result['right'])}" for result in entry["results"]]
        rank = "" if entry["rank"] is None else f"<br>rank {entry['rank']}"
        rows.append([_side(entry["query"]) + rank, *found, *[""] * (most - len(found))])
    yield _rows(["query", *(str(place) for place in range(1, most + 1))], rows, [False] * (most + 1))


def verdict(*, right: bool) -> str:
    """A sign and a word."""
    return "✓ right" if right else "✗ wrong"


def _side(side: dict[str, str | None]) -> str:
    picture = [_picture(side["image"], side["text"] or "image")] if side["image"] else []
    return "<br>".join([*picture, *([escape(side["text"])] if side["text"] else [])])


def _picture(name: str, alt: str) -> str:
    return f"![{escape(alt)}]({FILES}/{name})"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A table; its cells are Markdown already."""
    lines = [[escape(column) for column in columns], ["---:" if right else "---" for right in numeric]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *rows])


_BODIES = {"text": _text, "table": _table, "plot": _plot, "gallery": _gallery}
