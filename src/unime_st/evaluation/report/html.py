"""Writes a report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from unime_st.evaluation.report.markdown import verdict
from unime_st.evaluation.report.section import Section

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #6a737d; --line: #d0d7de; --box: #f6f8fa;
  --right: #0a6b2d; --wrong: #a4161a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #15191f; --faint: #9aa4af; --line: #3a424c;
  --box: #1d232b; --right: #57d27f; --wrong: #ff8a85; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem clamp(.8rem, 4vw, 2.5rem) 3rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
/* One column of 72rem in the middle; a wide table may leave it to both sides. */
section, header { display: grid; grid-template-columns: 1fr minmax(0, 72rem) 1fr; }
section > *, header > * { grid-column: 2; }
section > .wide { grid-column: 1 / -1; justify-self: center; min-width: min(72rem, 100%); max-width: 100%; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; } .note { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
td:first-child { min-width: 8rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--box); vertical-align: bottom; } .number { text-align: right; min-width: 4.5rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; }
figure img { width: 100%; min-width: 34rem; max-width: 60rem; height: auto; border-radius: .4rem; }
.entry { display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr; gap: 1rem; padding: .8rem 0;
  border-bottom: 1px solid var(--line); }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .6rem; list-style: none;
  margin: 0; padding: 0; }
.results li { padding: .4rem; border: 2px solid var(--line); border-radius: .4rem; background: var(--box);
  font-size: .85rem; }
.results li.right { border: 2px solid var(--right); } .results li.wrong { border-style: dashed; }
.results li.strip { grid-column: span 2; }
.entry img { display: block; max-width: 100%; max-height: 8rem; border-radius: .2rem; background: #fff; }
.right > strong { color: var(--right); } .wrong > strong { color: var(--wrong); }
@media (max-width: 40rem) { .entry { grid-template-columns: 1fr; } }
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The whole report as a page, for light and dark themes and for small and large screens."""
    body = [f"<header><h1>{escape(title)}</h1></header>"]
    for section in sections:
        body.append("<section>")
        if section.title:
            body.append(f"<h2>{escape(section.title)}</h2>")
        body.extend(_BODIES[section.kind](section))
        if section.data.get("note"):
            body.append(f'<p class="note">{escape(section.data["note"])}</p>')
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(section: Section) -> Iterator[str]:
    for paragraph in section.data["text"].split("\n\n"):
        if paragraph.strip():
            yield f"<p>{escape(paragraph.strip())}</p>"


def _table(section: Section) -> Iterator[str]:
    data = section.data
    classes = [' class="number"' if numeric else "" for numeric in data["numeric"]]
    yield '<div class="scroll wide"><table>\n<thead><tr>'
    yield "".join(
        f'<th scope="col"{css}>{escape(str(name))}</th>' for css, name in zip(classes, data["columns"], strict=True)
    )
    yield "</tr></thead>\n<tbody>"
    for row, best in zip(data["shown"], data["best"], strict=True):
        cells = (
            f"<strong>{escape(cell)}</strong>" if bold else escape(cell) for cell, bold in zip(row, best, strict=True)
        )
        yield "<tr>" + "".join(f"<td{css}>{cell}</td>" for css, cell in zip(classes, cells, strict=True)) + "</tr>"
    yield "</tbody></table></div>"


def _plot(section: Section) -> Iterator[str]:
    name = section.data["picture"]
    alt = escape(f"Plot: {section.title}")
    yield (
        '<figure class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_embedded(section.dark[name])}">'
        f'<img src="{_embedded(section.pictures[name])}" alt="{alt}"></picture></figure>'
    )


def _gallery(section: Section) -> Iterator[str]:
    for entry in section.data["entries"]:
        rank = "" if entry["rank"] is None else f'<p class="note">right answer at rank {int(entry["rank"])}</p>'
        yield f'<div class="entry"><div>{_side(entry["query"], section)}{rank}</div><ol class="results">'
        for result in entry["results"]:
            css = f"{'right' if result['right'] else 'wrong'}{' strip' if result.get('frames', 1) > 1 else ''}"
            yield f'<li class="{css}">{_side(result, section)}<strong>{verdict(result)}</strong></li>'
        yield "</ol></div>"


def _side(side: dict[str, Any], section: Section) -> str:
    text = escape(side["text"] or "")
    if not side["image"]:
        return f"<div>{text}</div>"
    picture = f'<img src="{_embedded(section.pictures[side["image"]])}" alt="{text or "image"}" loading="lazy">'
    return picture + (f"<div>{text}</div>" if text else "")


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_BODIES = {"text": _text, "table": _table, "plot": _plot, "gallery": _gallery}
