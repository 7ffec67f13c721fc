"""The layout of UniME-V2's released training sets: one JSON list of rows, read and written without holding it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value

from unime_st.arguments import require_count
from unime_st.columns import ANCHOR, LABEL, NO_CANDIDATE, POSITIVE, negative_column
from unime_st.data.judging.scorer import check_range
from unime_st.data.mining.files import MinedFiles, claim, write_result
from unime_st.data.mining.mine import write_table
from unime_st.data.parquet import clean_text
from unime_st.embedding.full_disk import explained_full_disk
from unime_st.files import whole_file

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
_LONGEST_VALUE = 16  # characters of a number, a word or an escape, which the text read so far may cut in two
_AFTER_BLANKS = re.compile(r"[ \t\r\n]*")
_TEXTS = ("query_text", "query_image", "pos_text", "pos_image")
_FIELDS = (*_TEXTS, "query_pos_scores", "hard_negatives", "hard_negatives_scores")
_CELL = {"image": Value("string"), "text": Value("string")}


def read_judged_json(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read a released training set, ``train_data_*_scores.json``, row by row; memory is that of a row.

    Args:
        path: A file with one JSON list. A row has ``query_text``, ``query_image``, ``pos_text``, ``pos_image`` ("" for
            none), ``query_pos_scores`` (a number in 0..1), ``hard_negatives`` (pairs of text and image) and
            ``hard_negatives_scores`` (as many numbers).

    Yields:
        The rows as they are in the file.

    Raises:
        ValueError: When the file is cut short or no such list, or a row is not as above, naming file, row and column.
    """
    file = Path(path)
    for number, row in enumerate(_elements(file)):
        _check(row, file, number)
        yield row


def write_judged_json(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows as a released training set has them, whole or not at all; memory is that of a row.

    Args:
        rows: Rows of :func:`read_judged_json` or ``judged_json_rows``.
        path: The file.

    Returns:
        ``path``.

    Raises:
        ValueError: When a row is not in the layout of :func:`read_judged_json`, naming row and column.
        OSError: When the disk is full.
    """
    target = Path(path)
    with explained_full_disk(target.parent), whole_file(target) as partial, partial.open("w", encoding="utf-8") as out:
        out.write("[")
        for number, row in enumerate(rows):
            _check(row, target, number)
            text = json.dumps(dict(row), indent=4, ensure_ascii=False)
            out.write(("," if number else "") + "\n" + "\n".join(f"    {line}" for line in text.split("\n")))
        out.write("\n]\n")
    return target


def import_judged_json(
    path: str | Path, output_dir: str | Path, *, image_root: str | Path, rows_per_file: int = 16384
) -> Path:
    """Turn a released training set into the files of ``judge_negatives``, for ``load_judged_negatives``.

    Placeholders of images are taken out of texts, as ``load_mmeb_train`` does. Rows with an empty query or positive,
    and negatives that are empty, are left out and counted in the log. Memory is that of ``rows_per_file`` rows.

    Args:
        path: See :func:`read_judged_json`.
        output_dir: A folder of its own.
        image_root: The folder that images' paths are relative to (MMEB-train).
        rows_per_file: Rows of a parquet file.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: When the file is not in the layout, or the folder holds something else.
    """
    require_count("rows_per_file", rows_per_file)
    file, folder = Path(path), Path(output_dir)
    rows = width = 0
    for row in read_judged_json(file):
        rows += 1
        width = max(width, len(row["hard_negatives"]))
    if not width:
        raise ValueError(f"{file}: none of {rows} rows has a negative.")
    status = file.stat()
    source = {"file": file.name, "bytes": status.st_size, "modified": status.st_mtime_ns, "width": width}
    claimed = claim(folder, {**source, "rows_per_file": rows_per_file})
    files = MinedFiles(folder, -(-rows // rows_per_file), claimed)
    coming = read_judged_json(file)
    for number, target in enumerate(files.paths):
        some = list(islice(coming, rows_per_file))
        if not files.is_there(number):
            write_table(target, files.stamped(number, *_table(some, width)))
    total = files.counts()
    root = str(Path(image_root).absolute())
    write_result(folder, {**total, "image_root": root, "files": [target.name for target in files.paths]}, claimed)
    logger.info(
        "Took %d of %d rows of %s, without %d negatives that are empty: %s",
        total["kept"], total["rows"], file, total.get("empty_negatives", 0), folder,
    )  # fmt: skip
    return folder


def _table(rows: list[dict[str, Any]], width: int) -> tuple[pa.Table, dict[str, int]]:
    columns: dict[str, list[Any]] = {name: [] for name in (ANCHOR, POSITIVE)}
    columns |= {negative_column(k + 1): [] for k in range(width)} | {LABEL: []}
    empty = 0
    for row in rows:
        query, positive = _cell(row["query_text"], row["query_image"]), _cell(row["pos_text"], row["pos_image"])
        if query is None or positive is None:
            continue
        cells = [_cell(*pair) for pair in row["hard_negatives"]]
        kept = [(cell, score) for cell, score in zip(cells, row["hard_negatives_scores"], strict=True) if cell]
        empty += len(cells) - len(kept)
        kept += [(positive, NO_CANDIDATE)] * (width - len(kept))
        columns[ANCHOR].append(query)
        columns[POSITIVE].append(positive)
        for k, (cell, _) in enumerate(kept):
            columns[negative_column(k + 1)].append(cell)
        columns[LABEL].append([row["query_pos_scores"], *(score for _, score in kept)])
    features = Features({name: _CELL for name in columns if name != LABEL} | {LABEL: List(Value("float32"))})
    table = pa.table(columns, schema=features.arrow_schema)
    return table, {"rows": len(rows), "kept": table.num_rows, "empty_negatives": empty}


def _cell(text: str, image: str) -> dict[str, Any] | None:
    cleaned = clean_text(text)
    return {"image": image or None, "text": cleaned or None} if cleaned or image else None


def _elements(file: Path) -> Iterator[Any]:
    """The elements of a JSON list, one at a time."""
    with file.open(encoding="utf-8-sig") as source:
        text = _Text(source, file)
        if text.next() != "[":
            raise ValueError(f"{file} begins with {text.shown()}, but one JSON list is needed: '[' first.")
        text.place += 1
        number = 0
        while text.next() != "]":
            if number:
                if text.next() not in (",", ""):
                    raise ValueError(f"{file} is damaged behind row {number - 1}: {text.shown()} is no ',' nor ']'.")
                text.place += 1
                text.next()
            yield text.element(number)
            number += 1
        text.place += 1
        if text.next():
            raise ValueError(f"{file} goes on after its list, behind row {number - 1}.")


class _Text:
    """The text of a file, of which a few rows are in memory; ``place`` is where reading has come to."""

    def __init__(self, source: Any, file: Path) -> None:
        self._source, self._file = source, file
        self._decoder = json.JSONDecoder()
        self._text, self.place = "", 0

    def next(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            self.place = _AFTER_BLANKS.match(self._text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self._text):
                return self._text[self.place]
            if not self._more():
                return ""

    def element(self, number: int) -> Any:
        """Read one value."""
        while True:
            try:
                found, self.place = self._decoder.raw_decode(self._text, self.place)
            except json.JSONDecodeError as error:
                cut = len(self._text) - error.pos <= _LONGEST_VALUE or error.msg.startswith("Unterminated")
                if not (cut and self._more()):  # of damage before that, the rest of a large file says nothing
                    raise ValueError(
                        f"{self._file} is cut short or damaged in row {number} ({error.msg}): {self.shown()}. Get it "
                        "again."
                    ) from error
            except RecursionError as error:
                raise ValueError(
                    f"{self._file} is damaged in row {number}: it nests lists or objects too deeply, {self.shown()}."
                ) from error
            else:
                return found

    def shown(self) -> str:
        """What comes next, for errors."""
        return repr(self._text[self.place : self.place + 40])

    def _more(self) -> bool:
        try:
            added = self._source.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file} is no text in UTF-8 ({error}), so it is no JSON list.") from error
        self._text, self.place = self._text[self.place :] + added, 0
        return bool(added)


def _check(row: Any, file: Path, number: int) -> None:
    where = f"{file}, row {number}"  # what is wrong is the file, so all errors are ValueErrors
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, but an object with {', '.join(_FIELDS)} is needed.")  # noqa: TRY004
    if missing := [name for name in _FIELDS if name not in row]:
        raise ValueError(f"{where} has no {', '.join(missing)}; is it a set of UniME-V2? It has {sorted(row)}.")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is {row[name]!r:.60}, but a text is needed, '' for none.")  # noqa: TRY004
    negatives, scores = row["hard_negatives"], row["hard_negatives_scores"]
    if not (isinstance(negatives, list) and isinstance(scores, list) and len(negatives) == len(scores)):
        counts = [len(value) if isinstance(value, list) else type(value).__name__ for value in (negatives, scores)]
        raise ValueError(f"{where}: {counts[0]} hard_negatives have {counts[1]} hard_negatives_scores; one each.")
    for place, pair in enumerate(negatives):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ValueError(f"{where}: hard_negatives[{place}] is {pair!r:.60}, but [text, image] is needed.")
    numbers = [row["query_pos_scores"], *scores]
    names = ["query_pos_scores", *(f"hard_negatives_scores[{place}]" for place in range(len(scores)))]
    for name, value in zip(names, numbers, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}: {name} is {value!r:.40}, but a number is needed.")  # noqa: TRY004
    check_range(
        [float(max(-1, min(value, 2))) if isinstance(value, int) else value for value in numbers],
        lambda place: f"{where}, {names[place]}",
    )
