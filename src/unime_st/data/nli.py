"""Sentences for stage 1: the usual NLI sets of the Hub, and files of one's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset

from unime_st.arguments import require_number
from unime_st.data.text_files import READERS, read_text_columns, text_file_columns
from unime_st.paths import resolve_below

logger = logging.getLogger(__name__)

TEXT_COLUMNS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("premise", "hypothesis"),
    ("sent0", "sent1", "hard_neg"),
    ("sent0", "sent1"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("sentence",),
    ("text",),
    ("caption",),
)
"""Names of text columns that are known, first match first: all-nli, SNLI and MNLI on the Hub, SimCSE's set, others."""

_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"} | {
    "dev": "validation"
}


def load_nli(
    source: str | Path,
    name: str | None = None,
    *,
    split: str = "train",
    columns: Sequence[str] | None = None,
    drop_duplicates: bool = False,
    max_rows: int | None = None,
    seed: int | None = None,
) -> Dataset:
    r"""Load texts for stage 1, ready for :func:`~unime_st.data.with_teacher_labels`.

    Rows with a text that is empty or no string are skipped, and counted in the log.

    Args:
        source: A file (.parquet, .csv, .tsv, .jsonl, .json, .txt, a text a line), a folder of such files, or the name
            of a data set on the Hub, such as ``"sentence-transformers/all-nli"``. Files of tab-separated values have no
            quotes, as GLUE's.
        name: Config of a data set on the Hub, such as ``"triplet"``; of a folder, the folder inside it.
        split: Of a data set on the Hub. Of a folder whose files are named for splits (``train-00000-of-00001.parquet``,
            ``snli_1.0_dev.jsonl``), those of this one.
        columns: The text columns wanted; None for the known ones, see :data:`TEXT_COLUMNS`.
        drop_duplicates: Leave out rows whose texts an earlier row has too.
        max_rows: Rows, at most, counted after all else: the first ones or, with ``seed``, some drawn at random.
        seed: Draws ``max_rows``.

    Returns:
        The text columns alone.

    Raises:
        FileNotFoundError: When a folder has no file of the kind, or none of the split.
        ValueError: When a column is missing or holds no text, a file is damaged or a link that leaves its folder, no
            column is known, or no row is left.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pairs.csv"
        >>> _ = path.write_text("premise,hypothesis,label\nA cat sleeps.,An animal rests.,0\nA dog barks.,,2\n")
        >>> load_nli(path)[:]
        {'premise': ['A cat sleeps.'], 'hypothesis': ['An animal rests.']}
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"`source={source!r}`, but it must be a path or a name.")
    if columns is not None and not columns:
        raise ValueError(f"`columns={columns!r}` names none; None takes the usual ones.")
    require_number("max_rows", max_rows, whole=False, optional=True)
    if max_rows is not None and not max_rows >= 1:
        raise ValueError(f"`max_rows={max_rows}`, but it must be 1 or more; None takes all there are.")
    path = Path(source)
    if path.exists():
        table = _read_files(_find_files(path, name, split), columns)
    elif path.suffix.lower() in READERS:
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    else:
        rows = load_dataset(str(source), name, split=split)
        chosen = _choose_columns(str(source), rows.column_names, columns)
        table = rows.select_columns(chosen).with_format("arrow")[:]
        table = pa.table([_as_text(f"{source}", key, table.column(key)) for key in chosen], names=chosen)
    table = _keep_whole_rows(str(source), table)
    if drop_duplicates:
        table = _first_of_equals(str(source), table)
    if max_rows is not None and max_rows < len(table):
        drawn = np.arange(max_rows)
        if seed is not None:
            drawn = np.sort(np.random.default_rng(seed).choice(len(table), max_rows, replace=False))
        table = table.take(drawn)
    return Dataset(table.combine_chunks())


def _find_files(path: Path, name: str | None, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / name if name else path
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has no file that ends in {', '.join(READERS)}.")
    for file in files:
        resolve_below(folder, file.relative_to(folder), what="text")
    splits = [_split_of(file) for file in files]
    if not any(splits):
        return files
    chosen = [file for file, own in zip(files, splits, strict=True) if own == _SPLITS.get(split, split)]
    if not chosen:
        raise FileNotFoundError(
            f"{str(folder)!r} has no file of the split {split!r}; there are "
            f"{', '.join(sorted({own for own in splits if own}))}."
        )
    return chosen


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _read_files(files: Sequence[Path], columns: Sequence[str] | None) -> pa.Table:
    tables = []
    for file in files:
        chosen = _choose_columns(str(file), text_file_columns(file), columns)
        columns = chosen  # of all files alike
        read = read_text_columns(file, chosen)
        tables.append(pa.table([_as_text(str(file), key, read[key]) for key in chosen], names=chosen))
    return pa.concat_tables(tables)


def _choose_columns(where: str, there: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    if columns is not None:
        if missing := [name for name in columns if name not in there]:
            raise ValueError(f"{where} has no column {', '.join(missing)}; it has {', '.join(there)}.")
        return list(columns)
    for names in TEXT_COLUMNS:
        if set(names) <= set(there):
            return list(names)
    raise ValueError(
        f"{where} has the columns {', '.join(there)}, and none of the usual names of text columns. Name those wanted "
        "by `columns`."
    )


def _as_text(where: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"{where}: column {name} holds {column.type}, but text is expected. Name others by `columns`.")
    return column.cast(pa.large_string())


def _keep_whole_rows(where: str, table: pa.Table) -> pa.Table:
    """Leave out rows with a text that is missing or blank."""
    keep = np.ones(len(table), dtype=bool)
    for column in table.columns:
        keep &= np.asarray(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), fill_value=False))
    if not keep.any():
        raise ValueError(f"{where}: of {len(keep)} rows none has a text in each of {', '.join(table.column_names)}.")
    if not keep.all():
        logger.warning("%s: skipped %d of %d rows with a text missing", where, int((~keep).sum()), len(keep))
        table = table.filter(pa.array(keep))
    return table


def _first_of_equals(where: str, table: pa.Table) -> pa.Table:
    codes = [column.combine_chunks().dictionary_encode().indices.to_numpy() for column in table.columns]
    first = np.sort(np.unique(np.stack(codes, axis=1), axis=0, return_index=True)[1])
    logger.info("%s: left out %d of %d rows that repeat an earlier one", where, len(table) - len(first), len(table))
    return table.take(first)
