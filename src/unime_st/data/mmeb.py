"""MMEB-train and MMEB-eval (VLM2Vec, arXiv 2410.05160), and data of one's own in the same layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unime_st.columns import ANCHOR, LABEL, POSITIVE, negative_column
from unime_st.data.images import ItemReader, resolve_image
from unime_st.data.mmeb_eval import EVAL_COLUMNS, OPTIONAL_EVAL_COLUMNS, check_row, eval_pairs, pair_up
from unime_st.data.parquet import (
    Origin,
    Source,
    cells,
    clean_text,
    default_image_root,
    find_sources,
    read_columns,
)
from unime_st.fingerprint import content_id

__all__ = ["load_mmeb_eval", "load_mmeb_train", "resolve_image"]

logger = logging.getLogger(__name__)

_TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")
_NEGATIVES = ("neg_text", "neg_image_path")

Item = tuple[str, str]  # text, image path; "" for none


def load_mmeb_train(
    root: str | Path,
    subsets: Iterable[str] | None = None,
    *,
    split: str = "original",
    image_root: str | Path | None = None,
    num_negatives: int | None = None,
    label: bool = False,
    max_rows: int | None = None,
    max_pixels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    check_images: bool = False,
) -> Dataset:
    r"""Load training pairs in MMEB-train's layout.

    Files are ``root/<Subset>/<split>-*.parquet`` with the columns ``qry``, ``qry_image_path``, ``pos_text``,
    ``pos_image_path`` and, in some, ``neg_text`` and ``neg_image_path`` (each a text or a list of them).
    ``<|image_1|>`` is taken out of the texts, since a chat template puts the image; instructions stay.

    The result's columns are ``anchor``, ``positive``, ``negative_1`` ... and ``label``, ready for
    :class:`~unime_st.losses.HardNegativeInfoNCELoss`. Each input is ``{"image", "text"}`` with what it has of the two.
    Only paths are stored; images are opened when rows are drawn, in the data loader's workers.

    Rows whose query or positive is empty are skipped, and counted in the log. When some rows have explicit negatives,
    all need as many: a row with too few repeats its own, one with none borrows the positive of another row of its
    subset with other content, so that every loss may rely on the columns; that is counted in the log too.

    Args:
        root: Folder of the subsets.
        subsets: Their names, in the order wanted; None for all.
        split: ``"original"`` or ``"diverse_instruction"``.
        image_root: Folder of the images; None for ``root/images`` when that is a folder, else ``root``.
        num_negatives: Explicit negatives a row; None for as many as any row has, 0 to leave them out.
        label: Add an integer identity of the target.
        max_rows: Rows a subset, from its start.
        max_pixels: See :class:`~unime_st.data.ItemReader`.
        image_size: See :class:`~unime_st.data.ItemReader`.
        check_images: Look now whether every image is there.

    Returns:
        Rows of all subsets, one subset after the other.

    Raises:
        FileNotFoundError: When a subset, or with ``check_images`` an image, is missing.
        ValueError: When a file is damaged, its columns are not as above, or nothing is left of a subset.

    Example:
        >>> import pyarrow.parquet as pq, tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "VOC2007").mkdir()
        >>> row = {"qry": "<|image_1|>\nWhat is it?\n", "qry_image_path": "", "pos_text": "cat", "pos_image_path": ""}
        >>> pq.write_table(pa.Table.from_pylist([row]), root / "VOC2007" / "original-00000-of-00001.parquet")
        >>> load_mmeb_train(root)[0]
        {'anchor': {'text': 'What is it?'}, 'positive': {'text': 'cat'}}
    """
    if num_negatives is not None and num_negatives < 0:
        raise ValueError(f"`num_negatives={num_negatives}`, but it must be 0 or more; None takes all there are.")
    sources = find_sources(root, subsets, split)
    folder = default_image_root(root, image_root)
    loaded = [_read_train(source, max_rows) for source in sources]
    width = max((len(items) for _, _, negatives in loaded for items in negatives), default=0)
    width = width if num_negatives is None else num_negatives
    tables = []
    for source, (anchors, positives, negatives) in zip(sources, loaded, strict=True):
        columns = {ANCHOR: _cells(anchors), POSITIVE: _cells(positives)}
        filled = _fill_negatives(source.name, positives, negatives, width)
        columns |= {negative_column(k + 1): _cells([items[k] for items in filled]) for k in range(width)}
        if label:
            ids = [content_id({"image": image or None, "text": text}, read_files=False) for text, image in positives]
            columns[LABEL] = pa.array(ids, pa.int64())
        tables.append(pa.table(columns))
    origin = Origin(sources, [name for name in (*_TRAIN, *_NEGATIVES) if "image" in name])
    reader = ItemReader(folder, max_pixels=max_pixels, image_size=image_size, origin=origin)
    if check_images:
        _check_images(tables, reader)
    return Dataset(pa.concat_tables(tables)).with_transform(reader)


def _read_train(source: Source, max_rows: int | None) -> tuple[list[Item], list[Item], list[list[Item]]]:
    """Queries, positives and explicit negatives of a subset's rows that have the first two."""
    anchors: list[Item] = []
    positives: list[Item] = []
    negatives: list[list[Item]] = []
    read = 0
    for file in source.files:
        columns = read_columns(source, file, _TRAIN, _NEGATIVES)
        empty = [None] * len(columns["qry"])
        rows = zip(*(columns.get(name, empty) for name in (*_TRAIN, *_NEGATIVES)), strict=True)
        for number, (qry, qry_image, pos, pos_image, neg, neg_image) in enumerate(rows):
            if max_rows is not None and read == max_rows:
                break
            read += 1
            anchor, positive = (clean_text(qry), qry_image or ""), (clean_text(pos), pos_image or "")
            if any(anchor) and any(positive):
                anchors.append(anchor)
                positives.append(positive)
                where = f"{source.name}, row {number} of {file.name}"
                own = [(clean_text(text), image or "") for text, image in pair_up(neg, neg_image, where)]
                negatives.append([item for item in own if any(item)])
    if not anchors:
        raise ValueError(f"{source.name}: of {read} rows none has a query and a positive. Leave the subset out.")
    if read > len(anchors):
        logger.warning(
            "%s: skipped %d of %d rows with an empty query or positive", source.name, read - len(anchors), read
        )
    return anchors, positives, negatives


def _fill_negatives(
    name: str, positives: Sequence[Item], negatives: Sequence[Sequence[Item]], width: int
) -> list[list[Item]]:
    """Give every row ``width`` negatives, see :func:`load_mmeb_train`."""
    if width == 0:
        return [[] for _ in positives]
    filled, borrowed = [], 0
    for row, own in enumerate(negatives):
        given = list(own)
        if not given:
            borrowed += 1
            others = (positives[(row + step) % len(positives)] for step in range(1, len(positives)))
            given = [next((other for other in others if other != positives[row]), positives[row])]
        filled.append([given[k % len(given)] for k in range(width)])
    if borrowed:
        logger.warning(
            "%s: %d of %d rows have no explicit negative and borrow another row's positive. `num_negatives=0` leaves "
            "the negatives out and saves their embedding.",
            name,
            borrowed,
            len(positives),
        )
    return filled


def _cells(items: Sequence[Item]) -> pa.StructArray:
    return cells([text for text, _ in items], [image for _, image in items])


def _check_images(tables: Sequence[pa.Table], reader: ItemReader) -> None:
    """Resolve every distinct image path, raising on the first that is missing or leaves the folder."""
    paths: set[str] = set()
    for table in tables:
        for column in table.columns:
            if pa.types.is_struct(column.type):
                paths.update(path for path in column.combine_chunks().field("image").to_pylist() if path)
    for path in sorted(paths):
        reader.path(path)


def load_mmeb_eval(
    root: str | Path,
    task: str,
    *,
    split: str = "test",
    image_root: str | Path | None = None,
    max_pixels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Dataset:
    """Load a task in MMEB-eval's layout, or with the instructions in columns of their own as in ``MMEB_Test_Instruct``.

    Files are ``root/<task>/<split>-*.parquet`` with the columns ``qry_text``, ``qry_img_path``, ``tgt_text`` and
    ``tgt_img_path`` (lists of equal length, the right answer first), and perhaps ``qry_inst`` and ``tgt_inst``.

    Args:
        root: Folder of the tasks.
        task: Its name, such as ``"MSCOCO_t2i"``.
        split: Start of the files' names.
        image_root: Folder of the images; None for ``root/images`` when that is a folder, else ``root``.
        max_pixels: See :class:`~unime_st.data.ItemReader`.
        image_size: See :class:`~unime_st.data.ItemReader`.

    Returns:
        Rows of ``query``, one input, and ``candidates``, a list of them whose first is right. An image is given by its
        absolute path, or opened when a resolution is asked for. Empty wrong candidates are left out, and counted in the
        log.

    Raises:
        FileNotFoundError: When the task is missing.
        ValueError: When a file is damaged, its columns are not as above, or a row has no query or no right answer; on
            drawing a row, when an image lies outside the folder.
    """
    (source,) = find_sources(root, [task], split)
    queries: list[Item] = []
    candidates: list[Item] = []
    offsets, dropped = [0], 0
    for where, query, items in eval_pairs(source):
        check_row(where, query, items)
        kept = [item for item in items if any(item)]
        dropped += len(items) - len(kept)
        queries.append(query)
        candidates += kept
        offsets.append(len(candidates))
    if dropped:
        logger.warning("%s: left out %d empty wrong candidates", task, dropped)
    lists = pa.ListArray.from_arrays(np.asarray(offsets, dtype=np.int32), _cells(candidates))
    reader = ItemReader(
        default_image_root(root, image_root),
        open_images=max_pixels is not None or image_size is not None,
        max_pixels=max_pixels,
        image_size=image_size,
        origin=Origin([source], [name for name in (*EVAL_COLUMNS, *OPTIONAL_EVAL_COLUMNS) if "img" in name]),
    )
    return Dataset(pa.table({"query": _cells(queries), "candidates": lists})).with_transform(reader)
