"""Reading pairs of one's own for the losses and the sampler."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, List

from unime_st.columns import LABEL, training_columns
from unime_st.data.images import ItemReader
from unime_st.data.mining.files import RESULT
from unime_st.data.mining.mine import load_mined_negatives
from unime_st.data.pairs.building import Pairs, build_pairs
from unime_st.data.pairs.cells import read_cells
from unime_st.data.pairs.damage import rows_without_content, unreadable_rows
from unime_st.data.pairs.naming import Names, find_roles
from unime_st.data.pairs.reader import PairOrigin, PairReader
from unime_st.data.pairs.sources import Source, open_source

logger = logging.getLogger(__name__)


def load_pairs(
    source: str | Path | Dataset,
    *,
    query: Names = None,
    target: Names = None,
    negatives: Names = None,
    label: str | None = None,
    image_columns: Names = None,
    image_root: str | Path | None = None,
    num_negatives: int | None = None,
    bad_images: Literal["keep", "drop"] = "keep",
    empty_cells: Literal["keep", "drop"] = "keep",
    allow_remote_images: bool = False,
    split: str | None = None,
    separator: str | None = None,
    encoding: str = "utf-8-sig",
    **reader_options: Any,
) -> Dataset:
    """Read pairs for training from a file, a folder or a data set; images are opened when rows are drawn.

    Sources are a .csv, .tsv, .jsonl, .json or .parquet file; a folder of images with a ``metadata.csv`` or ``.jsonl``
    (``file_name``, ``text``), or with a .txt of the same name beside each image; a folder of ``Dataset.save_to_disk``;
    a ``datasets.Dataset``; a folder of :func:`~unime_st.data.mine_hard_negatives` or
    :func:`~unime_st.data.judge_negatives`, whose columns are known and whose scores are left out. A byte order mark is
    passed over, and semicolons or tabs in a .csv are found.

    Columns are known by their usual names: ``query``, ``anchor`` or ``question`` ask; ``target``, ``positive``,
    ``document`` or ``answer`` reply; ``image``, ``image_path`` or ``file_name`` and ``caption``, ``text`` or ``title``
    take the side that is left, the words asking where both are. A column of strings holds images if it has such a name,
    or if all that is in it ends as images' names do.

    A cell that is a list of several queries or targets becomes as many rows, with one label. Several columns of a side
    are joined, their texts by line breaks.

    Args:
        source: See above.
        query: The query's column, or several to join: ``["image", "question"]``.
        target: The target's, likewise.
        negatives: Columns of explicit negatives; None takes ``negative``, ``negative_1``, ... and ``[]`` none.
        label: Column of the target's identity: rows with an equal one are no negatives of each other. None takes
            ``label``, ``""`` none.
        image_columns: Which of the columns hold images; None tells by the rule above.
        image_root: Folder of the images, which no path leaves; None takes the file's own.
        num_negatives: Explicit negatives a row; None for the most that a row has. A row with fewer repeats its own.
        bad_images: ``"drop"`` opens every image now and leaves out the rows of those that are missing or damaged;
            ``"keep"`` opens none, and the first bad one is an error when its row is drawn.
        empty_cells: ``"drop"`` leaves out rows without a query or without a target.
        allow_remote_images: Let addresses of images pass, for a model that was built to open them.
        split: Of a saved data set with several.
        separator: Of a .csv's cells, in place of the one found.
        encoding: Of a file of text.
        **reader_options: ``late_images``, ``max_pixels``, ``image_size``, ``max_aspect_ratio``, ``max_bad_images``
            and ``bad_images_log`` of :class:`~unime_st.data.ItemReader`.

    Returns:
        Rows ``anchor``, ``positive``, ``negative_1``, ..., each ``{"image", "text"}`` or one of these, and ``label``
        where there is one.

    Raises:
        FileNotFoundError: When there is no such file or folder.
        TypeError: When ``source`` is something else.
        ValueError: When a column is missing, a file is empty, damaged or of another encoding, a cell holds something
            else than a text or an image, or a path leaves the folder; names the file, line and column. When columns are
            named of mined negatives.

    Example:
        >>> rows = Dataset.from_dict({"question": ["a pet?", "a fruit?"], "answer": [["a cat", "a dog"], ["a fig"]]})
        >>> pairs = load_pairs(rows)
        >>> pairs.column_names, pairs[1]
        (['anchor', 'positive', 'label'], {'anchor': {'text': 'a pet?'}, 'positive': {'text': 'a dog'}, 'label': 0})
    """
    for name, choice in (("bad_images", bad_images), ("empty_cells", empty_cells)):
        if choice not in ("keep", "drop"):
            raise ValueError(f"`{name}={choice!r}`, but it must be 'keep' or 'drop'.")
    if isinstance(source, str | Path) and (Path(source) / RESULT).is_file():
        asked: dict[str, Any] = {
            "query": query,
            "target": target,
            "negatives": negatives,
            "label": label,
            "split": split,
        }
        asked |= {"image_columns": image_columns, "num_negatives": num_negatives, "separator": separator}
        if named := [name for name, value in asked.items() if value is not None]:
            raise ValueError(f"{source} holds mined negatives, whose columns are known. Leave {', '.join(named)} out.")
        opened, pairs = _mined(Path(source), image_root)
    else:
        opened = open_source(source, split=split, separator=separator, encoding=encoding)
        if image_root is not None:
            opened = opened.below(Path(image_root))
        roles = find_roles(
            opened, query=query, target=target, negatives=negatives, label=label, image_columns=image_columns
        )
        query_cells, target_cells, negative_cells = (
            [
                read_cells(opened, name, image=name in roles.images, allow_remote_images=allow_remote_images)
                for name in side
            ]
            for side in (roles.query, roles.target, roles.negatives)
        )
        labels = None if roles.label is None else opened.columns[roles.label]
        pairs = build_pairs(opened, query_cells, target_cells, negative_cells, labels, num_negatives)
        sides = f"{opened.name}: {' + '.join(roles.query)} asks for {' + '.join(roles.target)}"
        opened = replace(opened, notes=(*opened.notes, sides))
    for note in opened.notes:
        logger.info("%s", note)
    origin = PairOrigin(opened, pairs.rows, pairs.source_rows)
    reader = PairReader(opened.image_root, origin=origin, **reader_options)
    kept = _kept(pairs.rows, reader, empty=empty_cells == "keep", bad=bad_images == "keep")
    if kept.all():
        return pairs.rows.with_transform(reader)
    logger.warning("%s: %d of %d rows are left out.", opened.name, int((~kept).sum()), len(kept))
    if not kept.any():
        raise ValueError(f"{opened.name}: no row is left. `check_pairs` tells what is wrong with each.")
    rows = pairs.rows.select(np.flatnonzero(kept))
    reader.origin = PairOrigin(opened, rows, pairs.source_rows[kept])
    return rows.with_transform(reader)


def _mined(folder: Path, image_root: str | Path | None) -> tuple[Source, Pairs]:
    """Rows with mined negatives, as they are stored; a judge's scores are no identities of targets."""
    rows = load_mined_negatives(folder, image_root=image_root)
    transform = rows.format["format_kwargs"].get("transform")
    rows = rows.with_format(None)
    if isinstance(rows.features.get(LABEL), List):
        rows = rows.remove_columns(LABEL)
    negatives = len(training_columns(rows.column_names).negatives)
    notes = (f"{folder.name}: {len(rows)} rows, each with {negatives} mined negatives",)
    root = None if transform is None else transform.image_root
    return Source(folder.name, {}, len(rows), image_root=root, notes=notes), Pairs(rows, np.arange(len(rows)))


def _kept(rows: Dataset, reader: ItemReader, *, empty: bool, bad: bool) -> np.ndarray:
    """Which rows stay, ``(N,)``, if those with an empty side or a bad image do or do not."""
    kept = np.ones(len(rows), dtype=bool)
    if not empty:
        kept[list(rows_without_content(rows))] = False
    if not bad:
        kept[list(unreadable_rows(rows, reader))] = False
    return kept
