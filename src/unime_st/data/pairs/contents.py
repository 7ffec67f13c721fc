"""What the rows of a set of pairs say, by content: files are read, so that copies of an image are one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from unime_st.columns import training_columns
from unime_st.data.images import ItemReader
from unime_st.data.pairs.walk import each_row
from unime_st.fingerprint import content_id
from unime_st.images import is_remote


def row_contents(rows: Dataset, reader: ItemReader, *, show_progress_bar: bool = False) -> np.ndarray:
    """Number the contents of queries and targets, ``(N, 2)``, alike; -1 where nothing can be known."""
    ids = content_ids(rows, reader, show_progress_bar=show_progress_bar)
    numbers = np.unique(ids, return_inverse=True)[1].reshape(ids.shape)
    return np.where(ids < 0, -1, numbers)


def content_ids(rows: Dataset, reader: ItemReader, *, show_progress_bar: bool = False) -> np.ndarray:
    """Know the contents of queries and targets by hashes, ``(N, 2)``, the same in every run; -1 for a missing file."""
    columns = training_columns(rows.column_names)
    sides = [columns.anchor, columns.positive or columns.anchor]
    found = np.full((len(rows), 2), -1, dtype=np.int64)
    digests: dict[str, Any] = {}
    walk = each_row(rows, sides, told="Comparing rows", show_progress_bar=show_progress_bar)
    for row, cells in enumerate(walk):
        for side, name in enumerate(sides):
            item = _readable(cells[name], reader, digests)
            if item is not None and item != "":  # nothing is equal to nothing
                found[row, side] = _text_id(item) if isinstance(item, str) else content_id(item, read_files=False)
    return found


def _readable(cell: Any, reader: ItemReader, digests: dict[str, Any]) -> Any:
    """A text, or a cell with each path in place of which stands what its file holds; None if a file is not there."""
    if not isinstance(cell, Mapping) or "role" in cell:
        return cell
    shown = cell.get("image", cell if "bytes" in cell or "path" in cell else None)
    images = [_content(image, reader, digests) for image in (shown if isinstance(shown, list) else [shown])]
    if any(image is _MISSING for image in images):
        return None
    present = [image for image in images if image is not None]
    if not present:
        return cell.get("text") or ""
    return {"image": present or None, "text": cell.get("text")}


def _text_id(text: str) -> int:
    """As `content_id` of a text, several times as fast: most cells are texts."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


_MISSING = object()


def _content(image: Any, reader: ItemReader, digests: dict[str, Any]) -> Any:
    path = image if isinstance(image, str) else None
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return image["bytes"]
        path = image.get("path")
    if path is None or is_remote(path):
        return image
    if path not in digests:
        try:
            # Known by a hash of the file, so that one shown in many rows is read once.
            digests[path] = f"content:{content_id(Path(reader.path(path)))}"
        except (FileNotFoundError, ValueError):
            digests[path] = _MISSING
    return digests[path]


def groups(numbers: np.ndarray) -> dict[int, list[int]]:
    """Rows that share a number, for each number that several rows have; -1 is shared by nobody.

    >>> groups(np.array([4, 5, 4, -1, -1]))
    {4: [0, 2]}
    """
    found: dict[int, list[int]] = {}
    for row, number in enumerate(numbers.tolist()):
        if number >= 0:
            found.setdefault(number, []).append(row)
    return {number: rows for number, rows in found.items() if len(rows) > 1}
