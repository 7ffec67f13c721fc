"""The rows of visual documents in BEIR's form: queries, a corpus of pages, and which page answers which query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from unime_st.data.mmeb.named_rows import Input, NamedRow, Prompts, Record, with_text
from unime_st.paths import resolve_below

PageName = Callable[[str], str]


def page_by_id(corpus_id: str) -> str:
    """The file of a page of ViDoRe, ViDoSeek and MMLongBench."""
    return f"{corpus_id}.png"


def page_by_short_name(corpus_id: str) -> str:
    """The file of a page of VisRAG, whose names may be too long for a file system.

    >>> page_by_short_name("a" * 60 + ".png")[45:]
    'aaaaa_5298206d.png'
    """
    name = PurePosixPath(corpus_id)
    base = corpus_id.removesuffix(name.suffix)[:50]
    return f"{base}_{hashlib.md5(corpus_id.encode(), usedforsecurity=False).hexdigest()[:8]}{name.suffix}"


def relevance_of(qrels: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Query -> page -> relevance above 0; the highest where a pair is told more than once."""
    found: dict[str, dict[str, float]] = {}
    for row in qrels:
        if row["score"] > 0:
            own = found.setdefault(str(row["query-id"]), {})
            own[str(row["corpus-id"])] = max(own.get(str(row["corpus-id"]), 0), row["score"])
    return found


def pages_of(corpus_ids: Iterable[str], folder: Path, prompts: Prompts, file_of: PageName) -> dict[str, Input]:
    """The candidates: pages by id, with the path of each one's image, which is not looked for yet."""
    return {
        name: with_text({"image": str(resolve_below(folder, file_of(name), must_exist=False))}, prompts.of_target)
        for name in map(str, corpus_ids)
    }


def document_row(
    row: Record, prompts: Prompts, pages: dict[str, Input], relevance: dict[str, dict[str, float]]
) -> NamedRow:
    """A query and the pages that answer it."""
    name = str(row["query-id"])
    if name not in relevance:
        raise ValueError(f"The query {name!r} has no relevant page in qrels. Remove it, or fetch qrels again.")
    own = relevance[name]
    if strange := [page for page in own if page not in pages]:
        raise ValueError(f"qrels name the page {strange[0]!r}, which is not in the corpus. Fetch both again.")
    query = {"text": prompts.asking(row["query"])}
    return NamedRow(query, {page: pages[page] for page in own}, own, prompts.instruction)
