"""Inputs of one's own to encode: one side of a table, each with an id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from unime_st.data.pairs.building import join_columns
from unime_st.data.pairs.cells import read_cells
from unime_st.data.pairs.naming import Names, find_side
from unime_st.data.pairs.reader import PairReader
from unime_st.data.pairs.sources import open_source

_SHOWN = 200
_AT_ONCE = 256


class LoadedInputs:
    """Pairs of id and input, in the order of the rows; images are named, and opened by what encodes them.

    Attributes:
        columns: The columns that the inputs are made of.
        ids: Of each row.
    """

    def __init__(self, rows: Dataset, ids: list[str], columns: tuple[str, ...], closed: PairReader) -> None:
        self._rows, self.ids, self.columns = rows, ids, columns
        self._closed = closed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[str, Any]:
        """``(id, input)`` of one row."""
        return self.ids[row], self._closed(self._rows[row : row + 1])["input"][0]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield ``(id, input)``."""
        for start in range(0, len(self), _AT_ONCE):
            items = self._closed(self._rows[start : start + _AT_ONCE])["input"]
            yield from zip(self.ids[start : start + _AT_ONCE], items, strict=True)


def load_inputs(
    source: str | Path | Dataset,
    *,
    columns: Names = None,
    id_column: str | None = None,
    image_root: str | Path | None = None,
    split: str | None = None,
    separator: str | None = None,
    encoding: str = "utf-8-sig",
) -> LoadedInputs:
    """Read what is to be encoded: a column of the sources of :func:`~unime_st.data.load_pairs`, or a folder of images.

    Args:
        source: See :func:`~unime_st.data.load_pairs`; a folder of images needs no captions here.
        columns: One, or several to join; None takes the target's by its usual names, else images, else texts.
        id_column: Tells each row's id; None takes the path of its image, else the beginning of its text.
        image_root: See :func:`~unime_st.data.load_pairs`.
        split: Likewise.
        separator: Likewise.
        encoding: Likewise.

    Returns:
        Pairs of id and input, for ``encode_corpus(model, inputs, ..., with_ids=True)``. Cells that are empty are left
        out.

    Raises:
        ValueError: In the cases that :func:`~unime_st.data.load_pairs` lists.

    Example:
        >>> list(load_inputs(Dataset.from_dict({"name": ["p1"], "text": ["a red bus"]}), id_column="name"))
        [('p1', {'text': 'a red bus'})]
    """
    opened = open_source(source, split=split, separator=separator, encoding=encoding, captions=False)
    if image_root is not None:
        opened = opened.below(Path(image_root))
    names, images = find_side(opened, columns, id_column)
    cells = [read_cells(opened, name, image=name in images) for name in names]
    rows, source_rows = join_columns(opened, cells, "input")
    kept = np.array([bool(cell.get("image") or cell.get("text")) for cell in rows["input"]])
    if not kept.any():
        raise ValueError(f"{opened.name}: nothing is in {' and '.join(names)}. Name another column.")
    rows = rows.select(np.flatnonzero(kept)) if not kept.all() else rows
    if id_column is None:
        ids = [_id_of(cell, row) for row, cell in zip(source_rows[kept], rows["input"], strict=True)]
    else:
        given = opened.columns[id_column]
        every = given if isinstance(given, list) else given.to_pylist()
        ids = [str(every[row]) for row in source_rows[kept]]
    return LoadedInputs(rows, ids, names, PairReader(opened.image_root, open_images=False))


def _id_of(cell: dict[str, Any], row: int) -> str:
    image = cell.get("image")
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) else (cell.get("text") or f"row {row}")[:_SHOWN]
