"""One run over a corpus: parts that are there are compared, others are encoded and written."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from unime_st.data.corpus.encoded import EncodedCorpus, write_manifest
from unime_st.data.corpus.parts import DamagedPartError, Parts
from unime_st.data.corpus.window_encoder import WindowEncoder
from unime_st.data.corpus.windows import Window
from unime_st.embedding.broken import shown
from unime_st.files import FULL

logger = logging.getLogger(__name__)


class _GrownError(Exception):
    """The last part holds the first inputs of its window."""


class CorpusRun:
    """One call of :func:`encode_corpus`."""

    def __init__(self, parts: Parts, manifest: dict[str, Any], encoder: WindowEncoder, with_ids: bool) -> None:
        self.parts, self.manifest, self.encoder, self.with_ids = parts, manifest, encoder, with_ids
        self.dimension: int | None = None
        self.first_id: Any = None
        self.finished: list[int] = []  # this process's parts, including those that were there before
        self.found_rows = self.found = 0
        self.behind = False  # whether the encoder's cache lacks parts that were skipped

    def take(self, window: Window) -> None:
        """Make sure that a window's part is there."""
        ids = self._ids(window)
        if self._is_there(window, ids):
            self.found += 1
            self.found_rows += window.size
            self.behind = True
        else:
            self._encode(window, ids)
        self.finished.append(window.number)

    def _is_there(self, window: Window, ids: list[Any] | None, level: int = logging.WARNING) -> bool:
        """Whether a window's part is there, undamaged and complete, and holds all inputs of the window."""
        path = self.parts.path(window.number)
        if not path.exists():
            return False
        try:
            self._compare(window, ids)
        except (DamagedPartError, FileNotFoundError):
            logger.log(level, "%s is damaged, so it is encoded anew.", path)
            return False
        except _GrownError:
            logger.log(min(level, logging.INFO), "The inputs go on after %s, so it is encoded anew.", path)
            return False
        return True

    def _encode(self, window: Window, ids: list[Any] | None) -> None:
        if self.behind and self.encoder.recent.max_bytes:
            latest_first = reversed(self.finished)
            self.encoder.recent.refill((self.parts.keys(part), self.parts.embeddings(part)) for part in latest_first)
        self.behind = False
        embeddings = self.encoder(window.contents, window.keys, window.start)
        self._check_dimension(embeddings.shape[1], window)
        if self._is_there(window, ids, logging.DEBUG):
            return  # another run with the same inputs was faster
        if self.manifest["complete"]:  # a part was deleted after that
            self.manifest |= {"complete": False, "rows": None, "parts": None}
            write_manifest(self.parts.folder, self.manifest)
        try:
            self.parts.write(window.number, window.start, window.keys, embeddings, ids)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                error.errno,
                f"The disk of {self.parts.folder} is full at row {window.start}; the parts before are whole. Free some "
                "space and call again: it goes on from there.",
            ) from error

    def _compare(self, window: Window, ids: list[Any] | None) -> None:
        number = window.number
        if self.dimension is None:
            self._check_dimension(self.parts.embeddings(number).shape[1], window)
        old: list[Any] = self.parts.keys(number)
        new: list[Any] = window.keys
        if ids is not None:
            old, new = list(zip(old, self.parts.ids(number), strict=True)), list(zip(new, ids, strict=True))
        if old == new:
            return
        shorter = min(len(old), len(new))
        if len(old) < len(new) and old == new[:shorter]:  # it was the last part; others may have written later ones
            raise _GrownError
        place = next((place for place in range(shorter) if old[place] != new[place]), shorter)
        now = f"is {shown(window.items[place])}" if place < len(new) else "is missing"
        before = "another input" if place < len(old) else "no input"
        path = self.parts.path(number)
        raise ValueError(
            f"Row {window.start + place} {now}, but {path} was made with {before} there. Give the inputs of before, in "
            f"their order. If they changed on purpose, delete {path.name} and the parts of other changed rows; they "
            "alone are then encoded anew. To encode everything anew, delete the folder or give another `output_dir`."
        )

    def _ids(self, window: Window) -> list[str] | list[int] | None:
        if not self.with_ids:
            return None
        given = [item[0] for item in window.items]
        logical = next((place for place, value in enumerate(given) if isinstance(value, bool | np.bool_)), None)
        if logical is not None:
            raise TypeError(
                f"Row {window.start + logical} has the id {given[logical]!r}, but ids are strings or integers. Are id "
                "and input in the right order?"
            )
        self.first_id = given[0] if self.first_id is None else self.first_id
        text = isinstance(self.first_id, str)
        other = next((place for place, value in enumerate(given) if isinstance(value, str) != text), None)
        if other is not None:
            raise TypeError(
                f"Row {window.start + other} has the id {given[other]!r}, those before {self.first_id!r}. Make "
                "all strings, or all integers."
            )
        unfit = next((place for place, value in enumerate(given) if not _can_be_written(value)), None)
        if unfit is not None:
            raise ValueError(
                f"Row {window.start + unfit} has the id {given[unfit]!r}. Ids are integers of 64 bits with a sign, or "
                "strings of valid Unicode that do not end in a zero byte. Give larger integers as strings."
            )
        return [str(value) for value in given] if text else [int(value) for value in given]

    def _check_dimension(self, dimension: int, window: Window) -> None:
        if self.dimension not in (None, dimension):
            raise ValueError(
                f"The embeddings from row {window.start} on have {dimension} dimensions, those before "
                f"{self.dimension}. Two models have used one `model_name`: give another name and another `output_dir`."
            )
        self.dimension = dimension

    def finish(self, rows: int, count: int) -> EncodedCorpus:
        """Mark the corpus complete when all parts are there."""
        folder = self.parts.folder
        if not rows:
            raise ValueError("There is nothing to encode: `inputs` is empty.")
        there = self.parts.numbers()
        if there[-1:] > [count - 1]:
            raise ValueError(
                f"The inputs end after {rows} rows, but {folder} holds {self.parts.path(there[-1])} of more. Give all "
                "inputs of before, or delete the parts from "
                f"{self.parts.path(count).name} on and call again."
            )
        logger.info("%d rows (%d parts) were in %s before, %d parts were encoded", self.found_rows, self.found, folder,
                    len(self.finished) - self.found)  # fmt: skip
        dimension = self.dimension
        if dimension is None and there:
            dimension = self.parts.embeddings(there[0]).shape[1]
        size = self.manifest["window_size"]
        whole = [part for part in there if self.parts.rows(part) == min(size, rows - part * size)]
        state = {"dimension": dimension, "rows": rows, "parts": count, "complete": len(whole) == count}
        if state["complete"] and self.manifest != self.manifest | state:
            write_manifest(folder, self.manifest | state)
        if state["complete"]:
            logger.info("%s is complete: %d rows of %d dimensions", folder, rows, dimension)
        else:
            logger.info("%s: this process's parts are there, %d others to come", folder, count - len(whole))
        return EncodedCorpus(folder, self.manifest | state)


def _can_be_written(value: Any) -> bool:
    if not isinstance(value, str):
        return -(2**63) <= int(value) < 2**63
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not value.endswith("\0")
