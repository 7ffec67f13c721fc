"""The files that mining writes: each is tied to its settings, and a damaged one is never taken for whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unime_st.embedding.full_disk import explained_full_disk
from unime_st.files import checksum, create_exclusively, remove_leftovers, write_atomically
from unime_st.identity.model import explain_outdated

logger = logging.getLogger(__name__)

SETTINGS, RESULT = "settings.json", "mined.json"
_CHECKSUM = b"mining_checksum"
_COUNTS = b"mining_counts"
_FORMAT = 2  # with checksums
_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)


class MinedFiles:
    """The files of one result; a file is there when it is whole, of the same settings, and in its place."""

    def __init__(self, folder: Path, count: int, settings: str) -> None:
        self.folder, self._settings = folder, settings
        self.paths = [folder / f"part-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
        self._compared: dict[int, tuple[Any, bool]] = {}  # the state in which each file was compared, and the outcome

    def is_there(self, number: int) -> bool:
        """Whether a file is there and whole; it is read again only when it has changed."""
        try:
            status = self.paths[number].stat()
        except FileNotFoundError:
            return False
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        known = self._compared.get(number)
        if known is None or known[0] != state:
            known = self._compared[number] = state, self._is_whole(self.paths[number])
        return known[1]

    def stamped(self, number: int, table: pa.Table, counts: Mapping[str, int]) -> pa.Table:
        """The rows of a file with its counts and its checksum, ready to be written."""
        told = json.dumps(counts)
        own = {_COUNTS: told, _CHECKSUM: _checksum(self.paths[number].name, self._settings, told, table)}
        return table.replace_schema_metadata({**(table.schema.metadata or {}), **own})

    def counts(self) -> dict[str, int]:
        """The counts of all files, added up."""
        parts = [json.loads(pq.read_schema(path).metadata[_COUNTS]) for path in self.paths]
        return {name: sum(part.get(name, 0) for part in parts) for name in parts[0]}

    def _is_whole(self, path: Path) -> bool:
        try:
            read_mined(path, self._settings)
        except ValueError as error:
            logger.warning("%s Its rows are mined again.", error)
            return False
        return True


def read_mined(path: Path, settings: str | None) -> pa.Table:
    """Read a file's rows, and refuse a damaged or foreign one; ``settings=None`` reads results without checksums."""
    try:
        table = pq.read_table(path)
        metadata = dict(table.schema.metadata or {})
        told, counts = metadata.pop(_CHECKSUM, b"").decode(), metadata.pop(_COUNTS, b"").decode()
        table = table.replace_schema_metadata(metadata)
        whole = settings is None or told == _checksum(path.name, settings, counts, table)
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    if not whole:
        raise ValueError(f"{path} is damaged, or was mined with other settings: its checksum is another.")
    return table


def claim(folder: Path, settings: Mapping[str, Any]) -> str:
    """Reserve a folder for one set, model and settings, or refuse it; the settings as one string, for the checksums."""
    remove_leftovers(folder)
    path = folder / SETTINGS
    mine = json.loads(json.dumps({**settings, "format": _FORMAT}))
    with explained_full_disk(folder):
        create_exclusively(path, json.dumps(mine, indent=1))
    try:
        there = _note(path)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Delete it and call again: files that were mined with these settings are "
            "kept, others are mined again."
        ) from error
    if differing := sorted(name for name in {*there, *mine} if there.get(name) != mine.get(name)):
        raise ValueError(
            f"{str(folder)!r} holds negatives mined otherwise: {', '.join(differing)} differ. Give another "
            "`output_dir`, or delete that one; its folder `embeddings` may stay if the model is the same."
            f"{explain_outdated(there.get('model'))}"
        )
    return json.dumps(mine, sort_keys=True)


def write_result(folder: Path, result: Mapping[str, Any], settings: str) -> None:
    """Record that all files are there."""
    told = {**result, "format": _FORMAT, "settings": settings}
    with explained_full_disk(folder):
        write_atomically(folder / RESULT, json.dumps({**told, "checksum": checksum(json.dumps(told))}, indent=1))


def read_result(folder: Path) -> dict[str, Any]:
    """Read the record of :func:`write_result`; ``settings`` is None in results without checksums."""
    path = folder / RESULT
    try:
        result = _note(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{str(folder)!r} has no {RESULT}, so mining or judging has not been there or has not ended. Run "
            "`mine_hard_negatives`, or `judge_negatives`, with the same arguments again; it goes on where it was."
        ) from error
    except (ValueError, TypeError) as error:
        why = str(error)
    else:
        why = _wrong(result)
    if why:
        raise ValueError(
            f"{path} is damaged ({why}). Run `mine_hard_negatives`, or what else made the folder, with the same "
            "arguments again: it writes that file anew, and mines or judges nothing that is there."
        )
    if "format" not in result:
        logger.warning("%s is of an earlier version, without checksums: damage would not be seen.", folder)
    return {"settings": None, **result}


def _note(path: Path) -> dict[str, Any]:
    note = json.loads(path.read_bytes())
    if not isinstance(note, dict):
        raise TypeError(f"it holds a {type(note).__name__}")
    return note


def _wrong(result: dict[str, Any]) -> str:
    """What is wrong with a result's record, or ""; its checksum is taken out."""
    told = result.pop("checksum", None)
    if (told is not None or "format" in result) and told != checksum(json.dumps(result)):
        return "its checksum is another"
    missing = {"files", "image_root"} - set(result)
    return f"it lacks {', '.join(sorted(missing))}" if missing else ""


def _checksum(name: str, settings: str, counts: str, table: pa.Table) -> str:
    columns = [part for column in table.column_names for part in (column, *_content(table.column(column)))]
    features = str(sorted((table.schema.metadata or {}).items()))
    return checksum(name, settings, counts, features, *columns)


def _content(column: pa.ChunkedArray | pa.Array) -> Iterator[np.ndarray | str]:
    """The content of a column however it lies in memory: which cells are there, and their values."""
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.chunks else column
    if isinstance(array, pa.ChunkedArray):  # it has no chunks
        array = pa.array([], array.type)
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        yield from _content(array.storage)
    elif pa.types.is_dictionary(kind):
        yield from _content(array.dictionary_decode())
    else:
        yield np.asarray(array.is_valid())
        there = array.drop_null()
        if pa.types.is_struct(kind):
            yield "struct"
            for field, part in zip(kind, there.flatten(), strict=True):
                yield field.name
                yield from _content(part)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            yield "list"
            yield np.asarray(pc.list_value_length(there)).astype(np.int64)
            yield from _content(there.flatten())
        elif any(test(kind) for test in (*_TEXTS, pa.types.is_binary, pa.types.is_large_binary)):
            yield "text" if any(test(kind) for test in _TEXTS) else "bytes"
            yield from _bytes(there.cast(pa.large_binary()))
        elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            yield np.asarray(there)
        else:
            yield repr(there.to_pylist())  # parquet does not keep every unit of time


def _bytes(array: pa.Array) -> Sequence[np.ndarray]:
    _, ends, data = array.buffers()
    places = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1)
    every = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    first, last = int(places[0]), int(places[-1])
    return np.diff(places).astype(np.int64), every[first:last]
