"""Data sets of one's own whose images are opened as rows are drawn, bad ones put up with if asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, LargeList
from datasets import Image as ImageFeature
from datasets import List as ListFeature

from unime_st.data.bad_images import Place
from unime_st.data.images import ItemReader
from unime_st.data.stored_images import Stored, first_row
from unime_st.images import bytes_or_path

_ROWS_AT_ONCE = 1000


def with_images(
    dataset: Dataset,
    *,
    image_root: str | Path | None = None,
    image_columns: Sequence[str] = (),
    name: str | None = None,
    max_bad_images: int = 0,
    bad_images_log: str | Path | None = None,
    **reader_options: Any,
) -> Dataset:
    """Have a data set's images opened when its rows are drawn, in the data loader's workers, by one rule for all.

    Columns may hold texts, images as ``datasets.Image``, paths below ``image_root``, or ``{"image", "text"}`` with the
    image in one of these forms; nothing is decoded or copied here. What ``datasets`` would decode itself, stopping at
    the first damaged file without naming its row, is opened by an :class:`~unime_st.data.ItemReader` instead: missing,
    damaged and unusable images are named with their row, and up to ``max_bad_images`` of them are put up with.

    Args:
        dataset: Rows, without a transform.
        image_root: Folder of the images that are given by paths; what lies outside is not opened.
        image_columns: Columns of strings that are paths of images. Other strings are texts.
        name: Of the data set in messages and in the log; None for the name it was loaded by.
        max_bad_images: Different images that may be bad: their rows are replaced by others of their batch. 0 makes the
            first one an error.
        bad_images_log: File that names them, needed with ``max_bad_images``;
            :func:`~unime_st.data.bad_image_report` counts by data set.
        **reader_options: ``late_images``, ``max_pixels``, ``image_size`` and ``max_aspect_ratio`` of
            :class:`~unime_st.data.ItemReader`.

    Returns:
        The same rows with the reader as their transform, ready for the Trainer.

    Raises:
        TypeError: For what is no ``datasets.Dataset``, such as a stream.
        ValueError: If it has a transform already, or a column is missing.

    Example:
        >>> rows = Dataset.from_dict({"anchor": ["a cat"], "positive": ["cat.png"]})
        >>> with_images(rows, image_root="images", image_columns=["positive"], name="pets")[0]
        Traceback (most recent call last):
        ...
        FileNotFoundError: pets, row 0: There is no image 'cat.png' below 'images'. ...
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}, but the rows of a `datasets.Dataset` are needed: those of a "
            "stream have no numbers, and cannot be replaced by others. Give one split, or train on the stream itself."
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The data set has a transform already, which would be lost. Give it without (`with_format(None)`); what "
            "`load_mmeb_train` makes takes `max_bad_images` itself."
        )
    if missing := [column for column in image_columns if column not in dataset.column_names]:
        raise ValueError(f"The data set has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}.")
    rows = dataset.with_format(None)
    for column in image_columns:
        rows = rows.cast_column(column, ImageFeature(decode=False))  # stored as {"bytes": None, "path"}
    rows.info.features = Features(_undecoded(rows.features))
    reader = ItemReader(
        image_root,
        origin=RowOrigin(rows, name or rows.info.dataset_name or "the data set"),
        max_bad_images=max_bad_images,
        bad_images_log=bad_images_log,
        **reader_options,
    )
    return rows.with_transform(reader)


def _undecoded(feature: Any) -> Any:
    """A feature, or what is nested in it, with images as they are stored."""
    if isinstance(feature, ImageFeature):
        return ImageFeature(mode=feature.mode, decode=False)
    if isinstance(feature, Mapping):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, ListFeature):
        return ListFeature(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    return feature


@dataclass(frozen=True)
class RowOrigin:
    """Finds the row that a stored image comes from by looking through all, so for error messages only."""

    rows: Dataset
    name: str  # what messages call it

    def __call__(self, image: Stored) -> Place:
        """Find the first row that has the image, as a path or as bytes."""
        value = bytes_or_path(image) if isinstance(image, Mapping) else image
        rows = self.rows.with_format("arrow")
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            table = rows[start : start + _ROWS_AT_ONCE]
            found = [
                first_row(column.combine_chunks(), value) for column in table.columns if not _is_plain(column.type)
            ]
            if places := [row for row in found if row is not None]:
                return Place(self.name, start + min(places))
        return Place(self.name)


def _is_plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))
