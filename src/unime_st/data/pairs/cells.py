"""Cells of one column as Arrow's texts, paths or stored images, each with the row it belongs to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unime_st.data.pairs.sources import Source
from unime_st.images import is_remote
from unime_st.paths import resolve_below

STORED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An image as ``datasets`` stores it."""

_MAY_LEAVE = re.compile(r"\.\.|^[/\\~]|^[A-Za-z]:|\0")  # the rest is below its folder by its letters


class Cells(NamedTuple):
    """A column, its lists taken apart."""

    name: str
    values: pa.ChunkedArray  # (M,) texts, paths or stored images; null where there is nothing
    rows: np.ndarray  # (M,) the row of each, ascending; every row at least once
    image: bool
    lists: bool  # whether some cell was a list


def read_cells(source: Source, name: str, *, image: bool, allow_remote_images: bool = False) -> Cells:
    """Read a column of texts or, if its strings are paths, of images; a path that leaves the folder is refused."""
    cells = source.columns[name]
    found = _of_objects(source, name, cells) if isinstance(cells, list) else _of_arrow(source, name, cells)
    is_stored = pa.types.is_struct(found.values.type)
    found = found._replace(image=image or is_stored)
    if is_stored:
        _check_paths(source, found._replace(values=_paths_alone(found.values)), allow_remote_images)
        return found
    if image:
        found = found._replace(values=pc.utf8_trim_whitespace(found.values))
        _check_paths(source, found, allow_remote_images)
    return found._replace(values=_without_blanks(found.values))


def _of_objects(source: Source, name: str, cells: list[Any]) -> Cells:
    """Cells of a file of text: strings, None, or lists of these."""
    values: list[str | None] = []
    rows: list[int] = []
    lists = False
    for row, cell in enumerate(cells):
        lists = lists or isinstance(cell, list)
        for one in (cell or [None]) if isinstance(cell, list) else [cell]:
            if one is not None and not isinstance(one, str):
                raise ValueError(
                    f"{source.place(row, name)} holds {str(one)[:80]!r} (of type {type(one).__name__}), where a text "
                    "or the path of an image belongs. Write it as a string, in quotes, or leave the column out."
                )
            values.append(one)
            rows.append(row)
    try:
        array = pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        row = next(row for row, one in zip(rows, values, strict=True) if one and not _is_unicode(one))
        raise ValueError(f"{source.place(row, name)} holds half a character ({error}). Write it anew.") from error
    chunked = array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])
    return Cells(name, chunked, np.array(rows, dtype=np.int64), False, lists)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _of_arrow(source: Source, name: str, cells: pa.ChunkedArray) -> Cells:
    rows = np.arange(len(cells))
    lists = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    if lists:
        lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy()
        rows = np.repeat(rows, np.maximum(lengths, 1))
        places = np.full(len(rows), -1, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 1))])[:-1]
        filled = np.ones(len(rows), dtype=bool)
        filled[starts[lengths == 0]] = False  # an empty list is an empty cell
        places[filled] = np.arange(int(lengths.sum()))
        cells = pc.list_flatten(cells).take(pa.array(places, mask=~filled))
    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells, kind = cells.cast(kind.value_type), kind.value_type
    if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return Cells(name, cells.cast(pa.string()), rows, False, lists)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        chunks = [
            pa.StructArray.from_arrays(
                [chunk.cast(pa.binary()), pa.nulls(len(chunk), pa.string())], fields=list(STORED), mask=chunk.is_null()
            )
            for chunk in cells.chunks
        ]
        return Cells(name, pa.chunked_array(chunks, STORED), rows, True, lists)
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return Cells(name, cells.cast(STORED), rows, True, lists)
    raise ValueError(
        f"{source.name}, column {name!r} holds {kind}, where texts or images belong. Name another column, or convert "
        "it: `dataset.cast_column(...)`."
    )


def _without_blanks(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)
    return _nulled(texts, blank)


def _paths_alone(stored: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths of the stored images that are paths and nothing else; null for the others."""
    return _nulled(pc.struct_field(stored, "path"), pc.is_valid(pc.struct_field(stored, "bytes")))


def _nulled(texts: pa.ChunkedArray, where: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts with null at some places; before Arrow 24 ``if_else`` makes damaged arrays of slices of strings."""
    mask = pc.fill_null(where, fill_value=False).combine_chunks()
    return pc.replace_with_mask(texts, mask, pa.scalar(None, pa.string()))


def _check_paths(source: Source, cells: Cells, allow_remote_images: bool) -> None:
    """Refuse paths that lead out of the folder by their letters; links are looked at when an image is opened."""
    seen: set[str] = set()
    for place, path in enumerate(cells.values.to_pylist()):
        if not path or path in seen:
            continue
        seen.add(path)
        where = source.place(int(cells.rows[place]), cells.name)
        if is_remote(path):
            if not allow_remote_images:
                raise ValueError(
                    f"{where}: {path[:200]!r} is an address of the web, and data are not to make this machine fetch "
                    "things unasked. Download the images, or give `allow_remote_images=True`."
                )
        elif source.image_root is None:
            raise ValueError(
                f"{where}: {path[:200]!r} is the path of a file, and it is not known below which folder. Give "
                "`image_root`, or `image_columns=[]` if these are texts."
            )
        elif _MAY_LEAVE.search(path):
            _check_below(source.image_root, path, where)


def _check_below(root: Path, path: str, where: str) -> None:
    try:
        resolve_below(root, path, must_exist=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except FileNotFoundError:
        return  # a name that no file can have: among the missing ones, when all are looked at
