"""Tables of text files, read with the line of every row, so that an error can name it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SEPARATORS = (",", ";", "\t")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LOOKED_AT = 20  # rows that decide the separator


class TextTable(NamedTuple):
    """What a file of text holds."""

    columns: dict[str, list[Any]]  # name -> cells; None where a row has none
    lines: np.ndarray  # (N,) the line of the file on which each row begins, from 1
    notes: tuple[str, ...] = ()  # what was found out about the file, to be told


def read_text_table(path: Path, *, separator: str | None = None, encoding: str = "utf-8-sig") -> TextTable:
    """Read a .csv, .tsv, .jsonl or .json file with at least one row; a byte order mark is no part of it.

    None for ``separator`` finds that of a .csv among commas, semicolons and tabs. Errors name the line.
    """
    if separator is not None and len(separator) != 1:
        raise ValueError(f"`separator={separator!r}`, but it must be one character. A .tsv is parted by tabs unasked.")
    try:
        text = path.read_bytes().decode(encoding)
    except LookupError as error:
        raise ValueError(f"`encoding={encoding!r}` is not known. Give one such as 'utf-16' or 'cp1252'.") from error
    except UnicodeDecodeError as error:
        other = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise ValueError(
            f"{path} is no {encoding.removesuffix('-sig').upper()} text (byte {error.start} is "
            f"0x{error.object[error.start]:02x}). Save it as UTF-8, or give its encoding, such as `encoding={other!r}`."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty. A table has a line of column names, or one JSON object a line.")
    limit = csv.field_size_limit(len(text) + 1)  # or a long cell passes for a quote that is never closed
    try:
        table = _READERS[path.suffix.lower()](path, text, separator)
    finally:
        csv.field_size_limit(limit)
    if not len(table.lines):
        has = f"has the columns {', '.join(table.columns)}, but" if table.columns else "has"
        raise ValueError(f"{path} {has} no row. Add at least two pairs.")
    return table


def _read_csv(path: Path, text: str, separator: str | None) -> TextTable:
    notes = []
    if separator is None:
        separator = _separator_of(text)
        if separator != ",":
            notes.append(f"{path.name}: cells are parted by {_NAMES[separator]}")
    return _table(path, list(_records(path, text, separator)), separator, notes)


def _read_tsv(path: Path, text: str, separator: str | None) -> TextTable:
    tab = separator or "\t"
    try:
        return _table(path, list(_records(path, text, tab)), tab, [])
    except ValueError:  # quotes that mean themselves, as in most files of tabs
        records = list(_records(path, text, tab, quoting=csv.QUOTE_NONE))
        return _table(path, records, tab, [f"{path.name}: quotes are taken as they are"])


def _separator_of(text: str) -> str:
    """The separator under which the first rows have equally many cells, else of most columns; a comma when in doubt."""

    def fit(separator: str) -> tuple[bool, int]:
        found: list[int] = []
        try:
            for record in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
                found += [len(record)] if record else []
                if len(found) == _LOOKED_AT:
                    break
        except csv.Error:
            found += [0]  # as many as in no other
        return len(set(found)) == 1 and found[0] > 1, found[0]

    return max(_SEPARATORS, key=fit)


def _records(
    path: Path, text: str, separator: str, quoting: Any = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, quoting=quoting)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: a quote opens or closes in the middle of a cell, or is never closed ({error}). "
                'Write a cell with quotes in it as "say ""yes""".'
            ) from error
        if any(cell.strip() for cell in record):
            yield line, record


def _table(path: Path, records: list[tuple[int, list[str]]], separator: str, notes: list[str]) -> TextTable:
    header = [name.strip() for name in records[0][1]]
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}, line {records[0][0]}: the column {doubled[0]!r} is there twice. Rename one.")
    for line, record in records[1:]:
        if len(record) != len(header):
            raise ValueError(
                f"{path}, line {line} has {len(record)} cells, but there are {len(header)} columns "
                f"({', '.join(header)}). Put a cell that holds {separator!r} or a line break in quotes."
            )
    cells = zip(*(record for _, record in records[1:]), strict=True) if len(records) > 1 else ([] for _ in header)
    lines = np.array([line for line, _ in records[1:]], dtype=np.int64)
    return TextTable(dict(zip(header, map(list, cells), strict=True)), lines, tuple(notes))


def _read_json_lines(path: Path, text: str, _: str | None) -> TextTable:
    if text.lstrip().startswith("["):
        return _read_json(path, text, None)
    rows, lines = [], []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:  # those of numbers too long are no JSONDecodeError
            raise ValueError(f"{path}, line {line} is no JSON ({error}). Mend or remove it.") from error
        rows.append(_checked_row(path, f"line {line}", row))
        lines.append(line)
    return TextTable(_by_column(rows), np.array(lines, dtype=np.int64))


def _read_json(path: Path, text: str, _: str | None) -> TextTable:
    if not text.lstrip().startswith("["):
        return _read_json_lines(path, text, None)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is no JSON ({error.msg}). Mend it.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). Mend it.") from error
    rows = [_checked_row(path, f"entry {number}", row) for number, row in enumerate(found, start=1)]
    return TextTable(_by_column(rows), np.arange(1, len(rows) + 1), (f"{path.name}: a list, counted by its entries",))


def _checked_row(path: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(  # noqa: TRY004 (of a file)
            f'{path}, {place} is a {type(row).__name__}, but a row is an object, such as {{"query": "a red bus", '
            '"image": "bus.jpg"}.'
        )
    return row


def _by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


_READERS: dict[str, Callable[[Path, str, str | None], TextTable]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
}

TEXT_TABLES = tuple(_READERS)
"""Ends of the names of files that :func:`read_text_table` reads."""
