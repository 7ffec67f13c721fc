"""What goes from a corpus into another store, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from unime_st.arguments import require_count
from unime_st.data import EncodedCorpus
from unime_st.search.exact import unit_rows

_OWN = ("row", "id", "vector")


@dataclass(frozen=True)
class StoreRows:
    """Consecutive rows of a corpus.

    Attributes:
        rows: Their numbers.
        vectors: ``(n, D)`` float32 of length 1.
        payload: What else is known of each: ``row``, ``id`` where there are ids, and what the caller gave.
    """

    rows: range
    vectors: np.ndarray
    payload: list[dict[str, Any]]


def store_rows(
    corpus: EncodedCorpus, payload: Iterable[Mapping[str, Any]] | None, batch_size: int
) -> Iterator[StoreRows]:
    """Cut a corpus into batches.

    Raises:
        TypeError: For a payload that is no mapping, naming its row, or a batch size that is no whole number.
        ValueError: For more or fewer payloads than rows, or one that names what the store's own columns are called.
    """
    require_count("batch_size", batch_size)
    ids = corpus.ids() if corpus.manifest["with_ids"] else None
    given = None if payload is None else iter(payload)
    for start in range(0, len(corpus), batch_size):
        rows = range(start, min(start + batch_size, len(corpus)))
        known: list[dict[str, Any]] = [{"row": row} for row in rows]
        if ids is not None:
            known = [{**one, "id": name} for one, name in zip(known, islice(ids, len(rows)), strict=True)]
        if given is not None:
            theirs = list(islice(given, len(rows)))
            if len(theirs) < len(rows):
                raise ValueError(f"`payload` ends after {start + len(theirs)} rows, but the corpus has {len(corpus)}.")
            known = [_joined(one, own) for one, own in zip(known, theirs, strict=True)]
        yield StoreRows(rows, unit_rows(corpus.rows(np.arange(rows.start, rows.stop))), known)
    if given is not None and next(given, None) is not None:
        raise ValueError(f"`payload` goes on after {len(corpus)} rows, which are all that the corpus has.")


def _joined(known: dict[str, Any], own: Any) -> dict[str, Any]:
    if not isinstance(own, Mapping):
        raise TypeError(f"The payload of row {known['row']} is a {type(own).__name__}, but a dictionary is needed.")
    if taken := [name for name in _OWN if name in own]:
        raise ValueError(f"The payload of row {known['row']} has {taken[0]!r}, which is the store's own. Rename it.")
    return {**known, **own}


def refuse_more(where: str, rows: int, found: int) -> None:
    """Refuse a store that holds rows the corpus has not."""
    if found:
        raise ValueError(
            f"{where} holds {found} rows from number {rows} on, which the corpus does not have: it was written from "
            "another one. Give another name, or delete it."
        )
