"""Reads MMEB-train's rows into Arrow columns; no Python object of a row outlives its file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unime_st.columns import ANCHOR, LABEL, POSITIVE, SUBSET, negative_column
from unime_st.data.images import ItemReader
from unime_st.data.mmeb.eval_rows import pair_up
from unime_st.data.parquet import Source, cells, choose_rows, clean_text, read_columns
from unime_st.identity.content import content_id

logger = logging.getLogger(__name__)

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


@dataclass
class _Items:
    """Texts and image paths, with "" for none."""

    texts: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def add(self, text: str, image: str | None) -> bool:
        """Add an item unless it is empty; return whether it was added."""
        if not (text or image):
            return False
        self.texts.append(text)
        self.images.append(image or "")
        return True

    def cells(self) -> pa.StructArray:
        return cells(self.texts, self.images)


@dataclass(frozen=True)
class TrainRows:
    """The rows of a data set that have a query and a positive."""

    name: str
    anchors: pa.StructArray  # (N,)
    positives: pa.StructArray  # (N,)
    negatives: pa.StructArray  # the explicit negatives of all rows
    counts: np.ndarray  # (N,) the number of explicit negatives of each row

    def table(self, width: int, *, label: bool, subset: bool) -> pa.Table:
        """The columns of a training set with ``width`` negatives per row, as ``load_mmeb_train`` describes them."""
        columns: dict[str, Any] = {ANCHOR: self.anchors, POSITIVE: self.positives}
        if width:
            pool = pa.concat_arrays([self.positives, self.negatives])
            chosen = self._choose_negatives(width)
            columns |= {negative_column(k + 1): pool.take(pa.array(chosen[:, k])) for k in range(width)}
        if label or subset:
            rows = len(self.positives)
            columns |= {LABEL: self._labels()} if label else {}
            columns |= {SUBSET: pa.array([self.name] * rows, pa.string())} if subset else {}
        return pa.table(columns)

    def _choose_negatives(self, width: int) -> np.ndarray:
        """Places of each row's negatives among the positives followed by the negatives, ``(N, width)``."""
        rows = len(self.positives)
        starts = np.cumsum(self.counts) - self.counts + rows
        own = starts[:, None] + np.arange(width) % np.maximum(self.counts, 1)[:, None]
        lacking = self.counts == 0
        if lacking.any():
            logger.warning(
                "%s: %d of %d rows have no explicit negative and borrow another row's positive. `num_negatives=0` "
                "leaves the negatives out and saves their embedding.",
                self.name,
                int(lacking.sum()),
                rows,
            )
            own[lacking] = _next_other(self._codes())[lacking, None]
        return own

    def _codes(self) -> np.ndarray:
        """Equal numbers for equal positives."""
        parts = [pc.fill_null(self.positives.field(name), "") for name in ("text", "image")]
        texts, images = (part.dictionary_encode().indices.to_numpy().astype(np.int64) for part in parts)
        return texts * (images.max() + 1) + images

    def _labels(self) -> pa.Array:
        _, first, places = np.unique(self._codes(), return_index=True, return_inverse=True)
        distinct = self.positives.take(pa.array(first)).to_pylist()
        ids = np.array([content_id(cell, read_files=False) for cell in distinct], dtype=np.int64)
        return pa.array(ids[places])


def _next_other(codes: np.ndarray) -> np.ndarray:
    """The next row, in a circle, with other content; the row itself when all are equal."""
    rows = np.arange(len(codes))
    changes = np.flatnonzero(codes != np.roll(codes, -1))  # the last row of each run of equals
    if not len(changes):
        return rows
    return (np.append(changes, changes[0])[np.searchsorted(changes, rows)] + 1) % len(codes)


def read_train(
    source: Source, max_rows: int | None, shuffle_seed: int | None, *, negatives: bool, instruction: str | None = None
) -> TrainRows:
    """Read a data set's rows; those with an empty query or positive are skipped and counted in the log.

    The ``instruction`` goes before the text of each positive and negative.
    """
    anchors, positives, others = _Items(), _Items(), _Items()
    counts: list[int] = []
    read = 0
    for file, chosen in zip(source.files, choose_rows(source, max_rows, shuffle_seed), strict=True):
        if chosen is not None and not len(chosen):
            continue
        columns = read_columns(source, file, TRAIN_COLUMNS, NEGATIVE_COLUMNS, chosen)
        queries, query_images, texts, images = (columns[name] for name in TRAIN_COLUMNS)
        wrong = [columns[name] for name in NEGATIVE_COLUMNS if name in columns] if negatives else []
        read += len(queries)
        for row, (query, query_image, text, image) in enumerate(zip(queries, query_images, texts, images, strict=True)):
            anchor, positive = clean_text(query), clean_text(text)
            if not ((anchor or query_image) and (positive or image)):
                continue
            anchors.add(anchor, query_image)
            positives.add(clean_text(text, instruction), image)
            if not any(values[row] for values in wrong):
                counts.append(0)
                continue
            where = f"{source.name}, row {row if chosen is None else chosen[row]} of {file.name}"
            own, own_images = (columns[name][row] if name in columns else None for name in NEGATIVE_COLUMNS)
            pairs = pair_up(own, own_images, where)
            kept = [(clean_text(text, instruction), image) for text, image in pairs if image or clean_text(text)]
            counts.append(sum(others.add(*pair) for pair in kept))
    if not anchors.texts:
        raise ValueError(f"{source.name}: of {read} rows none has a query and a positive. Leave the subset out.")
    if read > len(counts):
        logger.warning(
            "%s: skipped %d of %d rows with an empty query or positive", source.name, read - len(counts), read
        )
    return TrainRows(source.name, anchors.cells(), positives.cells(), others.cells(), np.array(counts))


def check_images(tables: Sequence[pa.Table], names: Sequence[str], reader: ItemReader, *, by_opening: bool) -> None:
    """Look for every distinct image, or open it; the reader reports missing and damaged ones."""
    known: set[str] = set()
    with ThreadPoolExecutor() as pool:
        for name, table in zip(names, tables, strict=True):
            fields = [
                column.combine_chunks().field("image") for column in table.columns if pa.types.is_struct(column.type)
            ]
            paths = sorted({path for column in fields for path in pc.unique(column).to_pylist() if path} - known)
            known.update(paths)
            found = pool.map(lambda path: reader.check(path, by_opening=by_opening), paths)
            for path, error in zip(paths, found, strict=True):
                if error is not None:
                    reader.report(path, error, name)
