"""Identities of the content of a training set's rows, read from the stored table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.features import Value

from unime_st.columns import SUBSET, training_columns
from unime_st.identity.content import content_id

_READ_ROWS = 16384


def row_identities(dataset: Dataset, label_columns: list[str] | None = None) -> Iterator[np.ndarray]:
    """Yield ``(N,)`` numbers of the query, the target and, where usable, the label, equal where rows hold the same.

    A label is usable when it is a whole number or a name. The stored table is read, so no image is opened: one stored
    as a path is known by the path, one stored as bytes by its bytes.
    """
    columns = training_columns(dataset.column_names, label_columns)
    for name in (columns.anchor, columns.positive):
        if name is not None:
            yield _numbers(_content(chunk) for chunk in _chunks(dataset, name))
    label = columns.label
    if label is not None and _is_identity(dataset.features[label]):
        # A row without a label shares it with no other row.
        yield _numbers((chunk.to_pylist() for chunk in _chunks(dataset, label)), none_is_alone=True)


def subset_numbers(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """The data set of each row ``(N,)`` by the column ``subset``, and the names of the sets by their first rows."""
    if SUBSET not in dataset.column_names:
        raise ValueError(
            f"The stored column {SUBSET!r}, which tells the data set of each row, is not among {dataset.column_names}. "
            "Load the rows with `load_mmeb_train(..., subset_column=True)`, or add the column yourself."
        )
    chunks = [chunk.to_pylist() for chunk in _chunks(dataset, SUBSET)]
    return _numbers(chunks), [str(name) for name in dict.fromkeys(name for chunk in chunks for name in chunk)]


def _chunks(dataset: Dataset, name: str) -> Iterator[pa.Array]:
    stored = dataset.with_format("arrow", columns=[name])
    for start in range(0, len(dataset), _READ_ROWS):
        column = stored[start : start + _READ_ROWS].column(name)
        yield column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _numbers(chunks: Iterable[list[Any]], none_is_alone: bool = False) -> np.ndarray:
    """Number values in the order of their first appearance."""
    seen: dict[Any, int] = {}
    found = [
        seen.setdefault(object() if none_is_alone and value is None else value, len(seen))
        for chunk in chunks
        for value in chunk
    ]
    return np.asarray(found, dtype=np.int64)


def _content(cells: pa.Array) -> list[Any]:
    """A hashable value for each cell; two are equal exactly where :func:`~unime_st.identity.content.content_id` is.

    Texts and ``{"image": path, "text"}`` stand for themselves, which is several times as fast as hashing them.
    """
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        return pc.fill_null(cells, "").to_pylist()
    if pa.types.is_struct(cells.type) and cells.null_count == 0 and _plain(cells.type):
        images = cells.field("image").to_pylist() if cells.type.get_field_index("image") >= 0 else [None] * len(cells)
        return list(zip(images, pc.fill_null(cells.field("text"), "").to_pylist(), strict=True))
    return [_stored_id(value) for value in cells.to_pylist()]


def _plain(kind: pa.StructType) -> bool:
    fields = {field.name: field.type for field in kind}
    return "text" in fields and set(fields) <= {"image", "text"} and all(map(pa.types.is_string, fields.values()))


def _stored_id(value: Any) -> int:
    try:
        return content_id(value, read_files=False)
    except TypeError:  # numbers and other cells that are not an input of ours
        return content_id(repr(value))


def _is_identity(feature: Any) -> bool:
    """Whether a label names the target, as a score or a teacher's embedding does not."""
    dtype = feature.dtype if isinstance(feature, Value) else getattr(feature, "dtype", "")
    return str(dtype).startswith(("int", "uint", "bool", "string", "large_string"))
