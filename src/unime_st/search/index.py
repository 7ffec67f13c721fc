"""The index of a corpus: a file that plain faiss reads, and beside it what it was made of and what it finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.data import EncodedCorpus
from unime_st.embedding.approximate import import_faiss
from unime_st.files import checksum
from unime_st.search.exact import Found
from unime_st.search.ids import RowIds

FOLDER = "_search"  # pyarrow and datasets pass over names that begin so
INDEX, IDS, ABOUT = "index.faiss", "ids.arrow", "index.json"
FORMAT_VERSION = 1
AT = 10
"""The number of nearest rows for which recall is measured."""

_READ_AT_ONCE = 1 << 22


class StaleIndexError(ValueError):
    """An index was built of other rows than the corpus has now."""


class DamagedIndexError(ValueError):
    """The files of an index are not those that were written."""


def faiss_module() -> Any:
    """The library; where it is missing, the error says how to get it."""
    return import_faiss('It needs faiss: `pip install "unime_st[ann]"`. Without it, search with `method="exact"`.')


class SearchIndex:
    """An opened index of a corpus; see :func:`~unime_st.search.build_index`.

    Attributes:
        path: The file, which ``faiss.read_index`` reads too.
        about: What it was built of, its settings, and the recall that was measured.
    """

    def __init__(self, corpus: EncodedCorpus, about: Mapping[str, Any]) -> None:
        faiss = faiss_module()
        folder = corpus.folder / FOLDER
        self.path, self.about = folder / INDEX, dict(about)
        self.ids = RowIds(corpus, folder / IDS if corpus.manifest["with_ids"] else None)
        try:
            self._whole = faiss.read_index(str(self.path), faiss.IO_FLAG_MMAP_IFC)
            self._cells = faiss.downcast_index(self._whole.base_index)
            self._rows = faiss.downcast_index(self._whole.refine_index)
        except (RuntimeError, AttributeError) as error:
            raise DamagedIndexError(_damaged(self.path, str(error).splitlines()[0])) from error
        found = (self._whole.ntotal, self._rows.ntotal, self._whole.d, self._cells.nprobe, self._whole.k_factor)
        if found != (about["rows"], about["rows"], about["dimension"], about["nprobe"], about["k_factor"]):
            raise DamagedIndexError(_damaged(self.path, f"it holds {found[0]} rows of {found[2]} dimensions"))

    def __len__(self) -> int:
        return self._whole.ntotal

    def search(self, queries: np.ndarray, top_k: int) -> Found:
        """The nearest rows of queries ``(Q, D)`` of length 1, ``(Q, min(top_k, N))``: most of them, never fewer."""
        wanted = min(max(top_k, AT), len(self))  # for fewer, fewer rows would be scored than recall was measured with
        scores, rows = self._whole.search(queries, wanted)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):  # the cells that were looked at hold fewer, or codes say nothing of a query of zeros
            scores[short], rows[short] = self._rows.search(queries[short], wanted)
        found = _in_order(scores, rows)
        return Found(found.scores[:, :top_k], found.rows[:, :top_k])

    def search_among(self, queries: np.ndarray, top_k: int, among: np.ndarray) -> Found:
        """The nearest of some rows, ``(Q, min(top_k, n))``: each of them is compared, none is missed."""
        faiss = faiss_module()
        if not len(among):
            return Found(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        chosen = np.zeros(len(self), dtype=bool)
        chosen[among] = True
        bits = np.packbits(chosen, bitorder="little")
        only = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        return _in_order(*self._rows.search(queries, min(top_k, len(among)), params=only))

    def __repr__(self) -> str:
        about, measured = self.about, self.about["recall@10"]
        return (
            f"SearchIndex({str(self.path)!r}, {about['rows']} rows in {about['cells']} cells, {about['nprobe']} looked "
            f"at, {about['precision']}, recall@10 {measured['recall']:.3f} on {measured['queries']} {measured['of']})"
        )


def _in_order(scores: np.ndarray, rows: np.ndarray) -> Found:
    """Nearest first; of equal scores the row that comes first."""
    order = np.lexsort((rows, -scores), axis=1)
    return Found(np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1))


def open_index(corpus: EncodedCorpus, *, verify: bool = False) -> SearchIndex:
    """Open a corpus's index; what faiss has to understand is compared with its checksum, the rows are memory-mapped.

    Args:
        corpus: The corpus.
        verify: Compare the rows' copies in the index with their checksum too, which reads the whole file.

    Raises:
        FileNotFoundError: When none was built.
        StaleIndexError: A ``ValueError`` when the corpus has changed since, saying how.
        DamagedIndexError: A ``ValueError`` when a file is missing or damaged, naming it.
        ImportError: Without faiss.
    """
    folder = corpus.folder / FOLDER
    about = read_about(folder / ABOUT)
    if about is None:
        raise FileNotFoundError(f"{corpus.folder} has no index. Build it: `unime index {corpus.folder}`.")
    if change := _what_changed(corpus, about):
        raise StaleIndexError(
            f"The index of {corpus.folder} was built of other rows: {change}. Build it anew: "
            f"`unime index {corpus.folder}`."
        )
    for name in (INDEX, IDS) if corpus.manifest["with_ids"] else (INDEX,):
        _compare(folder / name, about["files"].get(name), whole=verify or name == IDS)
    return SearchIndex(corpus, about)


def read_about(path: Path) -> dict[str, Any] | None:
    """Read what is known of an index, or return None where there is none."""
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        total = about.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedIndexError(_damaged(path, str(error))) from error
    if total != checksum(json.dumps(about, sort_keys=True)):
        raise DamagedIndexError(_damaged(path, "its bytes are not those that were written"))
    if about["format_version"] != FORMAT_VERSION:
        raise StaleIndexError(f"{path} has format version {about['format_version']}, not {FORMAT_VERSION}.")
    return about


def about_text(about: Mapping[str, Any]) -> str:
    """The text of the file that :func:`read_about` reads."""
    plain = json.loads(json.dumps(about))
    return json.dumps({**plain, "checksum": checksum(json.dumps(plain, sort_keys=True))}, indent=1) + "\n"


def file_record(path: Path, head: int | None = None) -> dict[str, Any]:
    """Size and checksum of a file, and the checksum of its first ``head`` bytes (None: all)."""
    size = path.stat().st_size
    head = size if head is None else head
    return {"bytes": size, "sha256": _sha256(path, size), "head": head, "head_sha256": _sha256(path, head)}


def _sha256(path: Path, left: int) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_READ_AT_ONCE, left))):
            total.update(block)
            left -= len(block)
    return total.hexdigest()


def _compare(path: Path, record: Mapping[str, Any] | None, *, whole: bool) -> None:
    """Refuse a file that is not the one recorded."""
    if record is None or not path.exists():
        raise DamagedIndexError(_damaged(path, "it is missing"))
    size = path.stat().st_size
    if size != record["bytes"]:
        raise DamagedIndexError(_damaged(path, f"it has {size} bytes in place of {record['bytes']}"))
    length, expected = (size, record["sha256"]) if whole else (record["head"], record["head_sha256"])
    if _sha256(path, length) != expected:
        raise DamagedIndexError(_damaged(path, "its bytes are not those that were written"))


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}). Build the index anew: `unime index {path.parent.parent}`."


def _what_changed(corpus: EncodedCorpus, about: Mapping[str, Any]) -> str:
    """How a corpus differs from the one that an index was built of; empty if it does not."""
    then, now = about["parts"], corpus.part_checksums()
    rows, dimension = corpus.shape
    if then == now:
        return ""
    if dimension != about["dimension"]:
        return f"it had {about['dimension']} dimensions and has {dimension} now"
    same = next((place for place, pair in enumerate(zip(then, now, strict=False)) if pair[0] != pair[1]), None)
    whole = about["rows"] // about["window_size"]  # the part after these was not full and may have been filled up
    if rows > about["rows"] and (same is None or same >= whole):
        return f"it has grown from {about['rows']} to {rows} rows"
    if same is None:
        return f"it had {about['rows']} rows and has {rows} now"
    return f"{corpus.files[same].name} has changed" + (f", and it has {rows} rows, not {about['rows']}" if
                                                       rows != about["rows"] else "")  # fmt: skip
