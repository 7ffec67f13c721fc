"""Rows of a set of pairs that cannot be used: images that do not open, sides with nothing on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from unime_st.columns import training_columns
from unime_st.data.images import ItemReader
from unime_st.data.pairs.walk import each_row
from unime_st.data.stored_images import identity
from unime_st.images import ENCODED_KEYS, is_remote


class BadImage(NamedTuple):
    """An image that does not open."""

    column: str
    image: str  # its path, or what it is known by
    error: str  # what opening it said


def unreadable_rows(
    rows: Dataset, reader: ItemReader, *, open_images: bool = True, show_progress_bar: bool = False
) -> dict[int, list[BadImage]]:
    """Open every image once, or without ``open_images`` look for it: row -> its bad images, if any."""
    found: dict[int, list[BadImage]] = {}
    known: dict[str, str | None] = {}
    for row, cells in enumerate(each_row(rows, told="Opening images", show_progress_bar=show_progress_bar)):
        for column, image in images_of(cells):
            name = identity(image)
            if name not in known:
                known[name] = _wrong_with(reader, image, open_images)
            if (error := known[name]) is not None:
                found.setdefault(row, []).append(BadImage(column, name, error))
    return found


def rows_without_content(rows: Dataset) -> dict[int, list[str]]:
    """Row -> its columns that say nothing; rows whose columns all do say something are left out."""
    found: dict[int, list[str]] = {}
    label = training_columns(rows.column_names).label
    for row, cells in enumerate(each_row(rows)):
        if empty := [name for name, cell in cells.items() if name != label and is_empty(cell)]:
            found[row] = empty
    return found


def images_of(cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The stored images of a row that are no addresses, each with its column."""
    for column, cell in cells.items():
        if not isinstance(cell, Mapping):
            continue
        shown = cell.get("image") if "image" in cell or not cell.keys() <= ENCODED_KEYS else cell
        for image in shown if isinstance(shown, list) else [shown]:
            if image is not None and not (isinstance(image, str) and is_remote(image)):
                yield column, image


def is_empty(cell: Any) -> bool:
    """Whether a side says nothing.

    >>> is_empty({"image": None, "text": " "}), is_empty("a cat"), is_empty({"image": "a.png", "text": None})
    (True, False, False)
    """
    if isinstance(cell, Mapping) and "role" not in cell:
        text, image = cell.get("text"), cell.get("image", cell.get("bytes") or cell.get("path"))
        return not image and (not text or (isinstance(text, str) and not text.strip()))
    return cell is None or (isinstance(cell, str | list) and not (cell.strip() if isinstance(cell, str) else cell))


def _wrong_with(reader: ItemReader, image: Any, open_images: bool) -> str | None:
    try:
        error = reader.check(image, by_opening=open_images)
    except ValueError as outside:
        return str(outside)
    return None if error is None else str(error)
