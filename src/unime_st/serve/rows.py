"""A corpus as people see it: the text and the picture of each row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from starlette.exceptions import HTTPException

from unime_st.images import PartOfFile, UnreadableImageError, is_file, is_remote
from unime_st.serve.uploads import open_bounded

logger = logging.getLogger(__name__)

THUMBNAIL = 360
"""Pixels of the longer side."""
_KEPT = 2000  # thumbnails, of some 20 kB each
_SHOWN = 2000  # characters of a text


class Inputs(Protocol):
    """What a corpus was encoded from, as ``load_inputs`` reads it."""

    ids: Sequence[str]

    def __getitem__(self, row: int) -> tuple[str, Any]:
        """Id and input of a row; images are absolute paths that were found to be below their folder, or bytes."""


class Rows:
    """Ids, texts and thumbnails of a corpus's rows.

    Args:
        corpus: As ``load_corpus`` gives it.
        inputs: What it was encoded from; None shows ids alone.
        max_pixels: Of an image that a thumbnail is made of.

    Raises:
        ValueError: When the inputs are of another corpus.
    """

    def __init__(self, corpus: Any, inputs: Inputs | None = None, *, max_pixels: int) -> None:
        self.inputs, self.max_pixels = inputs, max_pixels
        self.ids = list(corpus.ids()) if corpus.manifest["with_ids"] else None
        self.places = None if inputs is None else _places(self.ids, inputs.ids, len(corpus))
        self.thumbnail = lru_cache(_KEPT)(self._thumbnail)

    @property
    def has_text_ids(self) -> bool:
        """Whether rows can be chosen by how their ids begin."""
        return self.ids is not None and isinstance(next(iter(self.ids), None), str)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """What is shown of a row: its number, id, text (None where it has none), and whether it has an image."""
        shown = {"row": row, "id": str(row if self.ids is None else self.ids[row])}
        item = self._input(row)
        return {**shown, "text": (item.get("text") or "")[:_SHOWN] or None, "image": bool(item.get("image"))}

    def _input(self, row: int) -> dict[str, Any]:
        if self.inputs is None or self.places is None or self.places[row] < 0:
            return {}
        try:
            return self.inputs[int(self.places[row])][1]
        except ValueError as error:  # its path leaves the folder
            logger.warning("row %d is not shown: %s", row, error)
            return {}

    def _thumbnail(self, row: int) -> bytes:
        """A small WebP of a row's first image; the file is opened by its row, never by a name that is asked for.

        Raises:
            HTTPException: 404 when it has none, or one that cannot be shown.
        """
        image = self._input(row).get("image")
        image = image[0] if isinstance(image, list) else image
        if image is None:
            raise HTTPException(404, f"Row {row} has no image.")
        if isinstance(image, str):
            if is_remote(image) or not is_file(image):
                raise HTTPException(404, f"The image of row {row} is not there.")
            image = Path(image)
        try:
            if isinstance(image, PartOfFile):  # a page, which has its own bound
                small = image.open()
            else:
                small = open_bounded(image, f"The image of row {row}", self._check_pixels)
        except HTTPException as error:
            raise HTTPException(404, error.detail) from error
        except UnreadableImageError as error:
            raise HTTPException(404, f"The image of row {row} cannot be shown.") from error
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        written = BytesIO()
        small.save(written, "WEBP", quality=88)
        return written.getvalue()

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self.max_pixels:
            raise HTTPException(413, "The image is too large to be shown.")


def _places(ids: list[Any] | None, given: Sequence[str], rows: int) -> np.ndarray:
    """For each row of a corpus its row among the inputs, ``(N,)``; -1 where it is not among them."""
    if ids is None or list(given) == ids:
        if len(given) != rows:
            raise ValueError(f"The inputs are {len(given)} and the corpus has {rows} rows without ids. Give its own.")
        return np.arange(rows)
    first = {name: place for place, name in reversed(list(enumerate(given)))}
    places = np.array([first.get(str(name), -1) for name in ids], dtype=np.int64)
    if (found := int((places >= 0).sum())) == 0 and rows:
        raise ValueError(
            f"No id of the corpus, such as {ids[0]!r}, is among the inputs', such as {next(iter(given), None)!r}. Give "
            "the data and the options that it was encoded with."
        )
    if found < rows:
        logger.warning(
            "%d of the corpus's %d rows are not among the inputs: only their ids are shown.", rows - found, rows
        )
    return places
