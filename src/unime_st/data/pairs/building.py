"""From columns to pairs: sides joined, lists made rows with one label, explicit negatives, identities of targets."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Value
from datasets import Image as ImageFeature
from datasets import List as ListFeature

from unime_st.columns import ANCHOR, LABEL, POSITIVE, negative_column
from unime_st.data.pairs.cells import Cells
from unime_st.data.pairs.sources import Source

_CHUNK = 50_000
_BETWEEN = "\n"  # texts of several columns


class Pairs(NamedTuple):
    """Rows as the losses take them, without a transform."""

    rows: Dataset  # columns `anchor`, `positive`, `negative_1`, ..., `label`
    source_rows: np.ndarray  # (N,) the row of the source that each comes from


def build_pairs(  # noqa: PLR0917
    source: Source,
    query: Sequence[Cells],
    target: Sequence[Cells],
    negatives: Sequence[Cells],
    label: Any,
    num_negatives: int | None,
) -> Pairs:
    """Make the rows; None for ``num_negatives`` makes as many as the row with most has."""
    asked = _places(source, query)
    answered = _places(source, target)
    left, right = _crossed(asked.rows, answered.rows, source.rows)
    source_rows = asked.rows[left]
    columns = {ANCHOR: _side(query, asked, left), POSITIVE: _side(target, answered, right)}
    columns |= _negatives(source, negatives, source_rows, num_negatives)
    features = {name: feature for name, (_, feature) in columns.items()}
    arrays = {name: array for name, (array, _) in columns.items()}
    if label is not None:
        arrays[LABEL] = pa.chunked_array([_labels(source, label)[source_rows]])
    elif len(source_rows) > source.rows:  # several queries or targets of a row: none is a negative of another
        arrays[LABEL] = pa.chunked_array([source_rows])
    if LABEL in arrays:
        features[LABEL] = Value("int64")
    return Pairs(_dataset(arrays, features), source_rows)


def join_columns(source: Source, columns: Sequence[Cells], name: str) -> Pairs:
    """Rows of one column that several are joined in; lists made rows."""
    place = _places(source, columns)
    array, feature = _side(columns, place, np.arange(len(place.rows)))
    return Pairs(_dataset({name: array}, {name: feature}), place.rows)


def _dataset(arrays: dict[str, pa.ChunkedArray], features: dict[str, Any]) -> Dataset:
    known = Features(features)
    table = pa.table({name: array.cast(known.arrow_schema.field(name).type) for name, array in arrays.items()})
    # A hash of what is stored would read images that a file holds.
    stored = any(isinstance(feature.get("image"), ImageFeature | ListFeature) for feature in features.values()
                 if isinstance(feature, dict))  # fmt: skip
    return Dataset(table, info=DatasetInfo(features=known), fingerprint=uuid.uuid4().hex[:16] if stored else None)


class _Place(NamedTuple):
    """Entries of a side's columns, one a row to come; those of plain columns repeat along a list."""

    rows: np.ndarray
    entries: list[np.ndarray]


def _places(source: Source, side: Sequence[Cells]) -> _Place:
    listed = [cells for cells in side if cells.lists]
    rows = (listed or list(side))[0].rows
    for other in listed[1:]:
        if not np.array_equal(other.rows, rows):
            row = int(np.flatnonzero(np.bincount(other.rows) != np.bincount(rows))[0])
            raise ValueError(
                f"{source.place(row)}: the lists of {listed[0].name!r} and {other.name!r} differ in length, so their "
                "entries cannot be joined. Give both equally many."
            )
    return _Place(rows, [np.arange(len(rows)) if cells.lists else rows for cells in side])


def _crossed(queries: np.ndarray, targets: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Every query of a row with every target of it, as places among the queries and among the targets."""
    many_targets = np.bincount(targets, minlength=rows)
    left = np.repeat(np.arange(len(queries)), many_targets[queries])
    starts = np.concatenate([[0], np.cumsum(many_targets)])[:-1]
    counts = many_targets[queries]
    within = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
    return left, np.repeat(starts[queries], counts) + within


def _side(side: Sequence[Cells], place: _Place, chosen: np.ndarray) -> tuple[pa.ChunkedArray, Any]:
    """One column of ``{"image", "text"}``, and its feature."""
    taken = [_taken(cells.values, entries[chosen]) for cells, entries in zip(side, place.entries, strict=True)]
    images = [array for array, cells in zip(taken, side, strict=True) if cells.image]
    texts = [array for array, cells in zip(taken, side, strict=True) if not cells.image]
    fields: dict[str, Any] = {}
    if images:
        fields["image"] = _image_feature(images)
    fields["text"] = Value("string")
    chunks = [_chunk(images, texts, fields, start, size) for start, size in _sizes(taken)]
    return pa.chunked_array(chunks), fields


def _image_feature(images: Sequence[pa.ChunkedArray]) -> Any:
    one = ImageFeature(decode=False) if pa.types.is_struct(images[0].type) else Value("string")
    return one if len(images) == 1 else ListFeature(one)


def _taken(values: pa.ChunkedArray, entries: np.ndarray) -> pa.ChunkedArray:
    """Entries by number; all in order without a copy, so that a column in a file stays there."""
    if len(entries) == len(values) and np.array_equal(entries, np.arange(len(values))):
        return values
    return values.take(pa.array(entries))


def _sizes(columns: Sequence[pa.ChunkedArray]) -> Iterator[tuple[int, int]]:
    """Start and length of pieces: a stored image's own chunks, which need no copy."""
    stored = next((column for column in columns if pa.types.is_struct(column.type)), None)
    lengths = [len(chunk) for chunk in stored.chunks] if stored is not None else []
    if not lengths:
        total = len(columns[0])
        lengths = [min(_CHUNK, total - start) for start in range(0, total, _CHUNK)]
    start = 0
    for length in lengths:
        yield start, length
        start += length


def _chunk(
    images: Sequence[pa.ChunkedArray], texts: Sequence[pa.ChunkedArray], fields: dict[str, Any], start: int, size: int
) -> pa.StructArray:
    arrays = []
    if images:
        parts = [_whole(array.slice(start, size)) for array in images]
        arrays.append(parts[0] if len(parts) == 1 else _lists(parts))
    parts = [_whole(array.slice(start, size)) for array in texts]
    if len(parts) > 1:
        joined = pc.binary_join_element_wise(*parts, _BETWEEN, null_handling="skip")
        parts = [pc.if_else(pc.equal(joined, ""), pa.scalar(None, pa.string()), joined)]
    arrays.append(parts[0] if parts else pa.nulls(size, pa.string()))
    return pa.StructArray.from_arrays(arrays, names=list(fields))


def _whole(array: pa.ChunkedArray) -> pa.Array:
    return array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()


def _lists(parts: Sequence[pa.Array]) -> pa.ListArray:
    """Images of several columns as a list a row; what is null is left out."""
    rows = len(parts[0])
    order = (np.arange(rows)[:, None] + rows * np.arange(len(parts))[None, :]).ravel()
    every = pa.concat_arrays(parts).take(pa.array(order))
    valid = every.is_valid().to_numpy(zero_copy_only=False).reshape(rows, len(parts))
    offsets = np.concatenate([[0], np.cumsum(valid.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), every.filter(pa.array(valid.ravel())))


def _negatives(
    source: Source, columns: Sequence[Cells], source_rows: np.ndarray, count: int | None
) -> dict[str, tuple[pa.ChunkedArray, Any]]:
    """Explicit negatives, equally many for each row: a row with fewer repeats some, and each counts once."""
    if not columns or count == 0:
        return {}
    if len({(cells.image, str(cells.values.type)) for cells in columns}) > 1:
        names = ", ".join(cells.name for cells in columns)
        raise ValueError(f"{source.name}: the negatives {names} hold texts and images. Name columns of one kind.")
    of_row: list[list[int]] = [[] for _ in range(source.rows)]
    start = 0
    for cells in columns:
        for place in np.flatnonzero(cells.values.is_valid().to_numpy()):
            of_row[cells.rows[place]].append(start + int(place))
        start += len(cells.values)
    most = max(map(len, of_row))
    if not most:
        return {}
    if empty := [row for row, own in enumerate(of_row) if not own]:
        raise ValueError(
            f"{source.place(empty[0])} and {len(empty) - 1} more of {source.rows} rows have no negative, others up to "
            f"{most}. Fill {', '.join(cells.name for cells in columns)} in, or leave them out: `negatives=[]`."
        )
    values = pa.chunked_array([chunk for cells in columns for chunk in cells.values.chunks], columns[0].values.type)
    every = Cells("negatives", values, np.arange(len(values)), columns[0].image, False)
    found = {}
    for number in range(count or most):
        entries = np.array([own[number % len(own)] for own in of_row], dtype=np.int64)
        found[negative_column(number + 1)] = _side([every], _Place(entries, [entries]), source_rows)
    return found


def _labels(source: Source, cells: Any) -> np.ndarray:
    """A number for each row, equal where its label is; a row without one shares it with nobody."""
    values = cells if isinstance(cells, list) else cells.to_pylist()
    kinds = {type(value) for value in values if value is not None}
    wrong = next((row for row, value in enumerate(values) if isinstance(value, float | list | dict)), None)
    if wrong is not None:
        raise ValueError(
            f"{source.place(wrong)}: the label is {str(values[wrong])[:80]!r}, but it says which target is meant: a "
            "whole number or a name, equal for equal targets. Rename the column if it means something else."
        )
    if len(kinds) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        row = next(row for row, value in enumerate(values) if value is not None and type(value) is not type(values[0]))
        raise ValueError(f"{source.place(row)}: labels are {' and '.join(names)}. Write all of them in one way.")
    seen: dict[Any, int] = {}
    numbers = [seen.setdefault(object() if value in (None, "") else value, len(seen)) for value in values]
    return np.array(numbers, dtype=np.int64)
