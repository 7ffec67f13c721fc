"""MMEB-train and MMEB-eval (VLM2Vec, arXiv 2410.05160), and other data in the same layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unime_st.arguments import require_instructions, require_number
from unime_st.data.images import ItemReader
from unime_st.data.mmeb.eval_rows import EVAL_COLUMNS, OPTIONAL_EVAL_COLUMNS, Pair, check_row, eval_pairs
from unime_st.data.mmeb.train_rows import NEGATIVE_COLUMNS, TRAIN_COLUMNS, read_train
from unime_st.data.mmeb.train_rows import check_images as _check_images
from unime_st.data.parquet import (
    Origin,
    cells,
    default_image_root,
    find_sources,
)

__all__ = ["load_mmeb_eval", "load_mmeb_train"]

logger = logging.getLogger(__name__)


def load_mmeb_train(
    root: str | Path,
    subsets: Iterable[str] | None = None,
    *,
    split: str = "original",
    image_root: str | Path | None = None,
    num_negatives: int | None = None,
    label: bool = False,
    subset_column: bool = False,
    target_instructions: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    shuffle_seed: int | None = None,
    late_images: bool = False,
    max_pixels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    max_aspect_ratio: float | None = 200.0,
    check_images: bool | Literal["open"] = False,
    max_bad_images: int = 0,
    bad_images_log: str | Path | None = None,
) -> Dataset:
    r"""Load training pairs in MMEB-train's layout.

    Files are ``root/<Subset>/<split>-*.parquet`` with the columns ``qry``, ``qry_image_path``, ``pos_text``,
    ``pos_image_path`` and, in some, ``neg_text`` and ``neg_image_path`` (each a text or a list of them).
    ``<|image_1|>`` is taken out of the texts, since a chat template puts the image; instructions stay.

    The result's columns are ``anchor``, ``positive``, ``negative_1`` ... and ``label``, ready for
    :class:`~unime_st.losses.HardNegativeInfoNCELoss`. Each input is ``{"image", "text"}``, or has one of the two.
    Only paths are stored; images are opened when rows are drawn, in the data loader's workers.

    Rows whose query or positive is empty are skipped, and counted in the log. When some rows have explicit negatives,
    all need as many: a row with too few repeats its own, one with none borrows the positive of another row of its
    subset with other content, so that every loss may rely on the columns; these rows are counted in the log too.

    Args:
        root: Folder of the subsets.
        subsets: Their names, in the order wanted; None for all.
        split: ``"original"`` or ``"diverse_instruction"``.
        image_root: Folder of the images; None for ``root/images`` when that is a folder, else ``root``.
        num_negatives: Explicit negatives per row; None for as many as any row has, 0 to leave them out.
        label: Add an integer identity of the target.
        subset_column: Add the column ``subset`` with the name of each row's data set, which
            :class:`~unime_st.samplers.FalseNegativeAwareBatchSampler` reads for batches of one data set. It is only
            stored: rows that are drawn do not have it.
        target_instructions: Subset -> what goes before the text of its positives and negatives, for example
            :data:`~unime_st.prompts.TARGET_INSTRUCTIONS` (B3's); subsets it does not name have none. Evaluate with the
            same ones: ``MMEBEvaluator(target_instructions=...)``.
        max_rows: Largest number of rows per subset: from its start or, with ``shuffle_seed``, drawn from all of it.
        shuffle_seed: Draws ``max_rows`` at random, the same rows of a subset whichever others are loaded.
        late_images: See :class:`~unime_st.data.ItemReader`.
        max_pixels: See :class:`~unime_st.data.ItemReader`.
        image_size: See :class:`~unime_st.data.ItemReader`.
        max_aspect_ratio: See :class:`~unime_st.data.ItemReader`: more elongated images count as damaged.
        check_images: Look now whether every image is there; with ``"open"``, whether it can be opened, which reads all
            of them once.
        max_bad_images: Number of different images that may be missing or damaged, over all workers, processes and
            resumed runs; their rows are replaced by others of their batch, see :class:`~unime_st.data.ItemReader`. 0
            makes the first one an error.
        bad_images_log: File that names them, needed with ``max_bad_images``;
            :func:`~unime_st.data.bad_image_report` counts by data set.

    Returns:
        Rows of all subsets, one subset after the other.

    Raises:
        FileNotFoundError: When a subset, or with ``check_images`` an image, is missing.
        ValueError: When a file is damaged, its columns are not as above, or nothing is left of a subset; with
            ``check_images`` also when an image is damaged, or more than ``max_bad_images`` are.

    Example:
        >>> import pyarrow.parquet as pq, tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "VOC2007").mkdir()
        >>> row = {"qry": "<|image_1|>\nWhat is it?\n", "qry_image_path": "", "pos_text": "cat", "pos_image_path": ""}
        >>> pq.write_table(pa.Table.from_pylist([row]), root / "VOC2007" / "original-00000-of-00001.parquet")
        >>> load_mmeb_train(root)[0]
        {'anchor': {'text': 'What is it?'}, 'positive': {'text': 'cat'}}
    """
    if isinstance(subsets, str) or not (subsets is None or isinstance(subsets, Iterable)):
        raise TypeError(f"`subsets={subsets!r}`, but it must be a list of names; None takes all.")
    if subsets is not None and not (subsets := list(subsets)):
        raise ValueError("`subsets` is empty; None takes all.")
    require_number("num_negatives", num_negatives, optional=True)
    require_number("max_rows", max_rows, least=1, whole=False, optional=True)
    if check_images not in (True, False, "open"):
        raise ValueError(f"`check_images={check_images!r}`; choose True, False or 'open'.")
    if num_negatives is not None and num_negatives < 0:
        raise ValueError(f"`num_negatives={num_negatives}`, but it must be 0 or more; None takes all there are.")
    require_instructions("target_instructions", target_instructions)
    sources = find_sources(root, subsets, split)
    origin = Origin(sources, [name for name in (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS) if "image" in name])
    reader = ItemReader(
        default_image_root(root, image_root),
        late_images=late_images,
        max_pixels=max_pixels,
        image_size=image_size,
        max_aspect_ratio=max_aspect_ratio,
        origin=origin,
        max_bad_images=max_bad_images,
        bad_images_log=bad_images_log,
    )
    told = target_instructions or {}
    loaded = [
        read_train(source, max_rows, shuffle_seed, negatives=num_negatives != 0, instruction=told.get(source.name))
        for source in sources
    ]
    width = max(int(rows.counts.max()) for rows in loaded) if num_negatives is None else num_negatives
    tables = [rows.table(width, label=label, subset=subset_column) for rows in loaded]
    if check_images:
        _check_images(tables, [source.name for source in sources], reader, by_opening=check_images == "open")
    return Dataset(pa.concat_tables(tables)).with_transform(reader)


def _cells(items: Sequence[Pair]) -> pa.StructArray:
    return cells([text for text, _ in items], [image for _, image in items])


def load_mmeb_eval(
    root: str | Path,
    task: str,
    *,
    split: str = "test",
    image_root: str | Path | None = None,
    target_instruction: str | None = None,
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
        target_instruction: What goes before the text of candidates that have no ``tgt_inst``, see
            :data:`~unime_st.prompts.TARGET_INSTRUCTIONS`.
        max_pixels: See :class:`~unime_st.data.ItemReader`.
        image_size: See :class:`~unime_st.data.ItemReader`.

    Returns:
        Rows of ``query``, one input, and ``candidates``, a list of inputs, the right one first. Images are absolute
        paths, or opened when a resolution is asked for. Empty wrong candidates are left out, and counted in the
        log.

    Raises:
        FileNotFoundError: When the task is missing.
        ValueError: When a file is damaged, its columns are not as above, or a row has no query or no right answer; on
            drawing a row, when an image lies outside the folder.
    """
    (source,) = find_sources(root, [task], split)
    queries: list[Pair] = []
    candidates: list[Pair] = []
    offsets, dropped = [0], 0
    for where, query, items in eval_pairs(source, target_instruction):
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
        max_aspect_ratio=None,  # the model decides what it takes
        origin=Origin([source], [name for name in (*EVAL_COLUMNS, *OPTIONAL_EVAL_COLUMNS) if "img" in name]),
    )
    return Dataset(pa.table({"query": _cells(queries), "candidates": lists})).with_transform(reader)
