"""Text columns of files, read so that every cell is a text or nothing: no number is guessed, no "null" is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

TEXT_LINES = "text"
"""The one column of a .txt file."""


def text_file_columns(path: Path) -> list[str]:
    """Names of a file's columns; those of a JSON file are its first row's.

    >>> text_file_columns(Path("some.txt"))
    ['text']
    """
    if path.suffix.lower() == ".txt":
        return [TEXT_LINES]
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_schema(path).names
        if path.suffix.lower() in (".json", ".jsonl"):
            return list(next(_json_rows(path), {}))
        with _open_csv(path) as reader:
            return reader.schema.names
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error


def read_text_columns(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Read columns of a file by its suffix: texts, null where a cell holds something else; in parquet any type."""
    try:
        return READERS[path.suffix.lower()](path, names)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or of another format than its name says ({error}). Write it again.")


def _read_parquet(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    table = pq.read_table(path, columns=list(names))
    return {name: table.column(name) for name in names}


def _open_csv(path: Path, names: Sequence[str] | None = None) -> pa_csv.CSVStreamingReader:
    tabs = path.suffix.lower() == ".tsv"
    return pa_csv.open_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=1 << 24),
        parse_options=pa_csv.ParseOptions(
            delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
        ),
        convert_options=pa_csv.ConvertOptions(
            include_columns=names, column_types=dict.fromkeys(names or (), pa.string()), strings_can_be_null=False
        ),
    )


def _read_csv(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    with _open_csv(path, list(names)) as reader:
        table = reader.read_all()
    return {name: table.column(name) for name in names}


def _read_json(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    columns: dict[str, list[str | None]] = {name: [] for name in names}
    for row in _json_rows(path):
        for name, values in columns.items():
            value = row.get(name)
            values.append(value if isinstance(value, str) else None)
    return {name: pa.chunked_array([pa.array(values, pa.large_string())]) for name, values in columns.items()}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file with one object a line, or with a list of them."""
    with path.open(encoding="utf-8") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                rows = json.load(file)
            except json.JSONDecodeError as error:
                raise _damaged(path, error) from error
            yield from (row if isinstance(row, dict) else {} for row in rows)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is no JSON ({error}). Mend or remove it.") from error
                yield row if isinstance(row, dict) else {}


def _read_lines(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    lines = pa.array(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), pa.large_string())
    return dict.fromkeys(names, pa.chunked_array([lines]))


READERS: dict[str, Callable[[Path, Sequence[str]], dict[str, pa.ChunkedArray]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".txt": _read_lines,
}
"""Reader of each kind of file, by the end of its name."""
