"""The transform of loaded pairs: opens images as rows are drawn, and knows the line of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from unime_st.data.bad_images import Place
from unime_st.data.images import ItemReader
from unime_st.data.pairs.sources import Source
from unime_st.images import is_remote

_ROWS_AT_ONCE = 1000


class Line(Place):
    """A place in a file that is counted by its lines."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.dataset}, line {self.row}"


class PairOrigin:
    """Tells the file and line of pairs or their images; ``source_rows`` ``(N,)`` are the pairs' rows in the source."""

    def __init__(self, source: Source, rows: Dataset, source_rows: np.ndarray) -> None:
        self.name, self.lines, self.notes = source.name, source.lines, source.notes
        self.source_rows = source_rows
        self.rows: Dataset | None = rows

    def __getstate__(self) -> dict[str, Any]:
        stored = self.rows is not None and "Image(" in str(self.rows.features)
        return {**self.__dict__, "rows": None if stored else self.rows}

    def __call__(self, image: Any) -> Place:
        """Find the first row with a stored image by looking through all, so for error messages only."""
        for start in range(0, 0 if self.rows is None else len(self.rows), _ROWS_AT_ONCE):
            chunk = self.rows[start : start + _ROWS_AT_ONCE]  # type: ignore[index]
            columns = [values for values in chunk.values() if values and isinstance(values[0], Mapping)]
            for number, cells in enumerate(zip(*columns, strict=True)):
                if any(_shows(cell, image) for cell in cells):
                    return self.place(start + number)
        return Place(self.name)

    def place(self, row: int) -> Place:
        """Where one of the rows stands."""
        own = int(self.source_rows[row])
        return Place(self.name, own) if self.lines is None else Line(self.name, int(self.lines[own]))

    def place_of(self, row: int, stored: Mapping[str, Any]) -> str:
        """Where a row of a data set stands that may have been shuffled since: by its number if that fails."""
        rows = self.rows
        same = rows is not None and row < len(rows) and rows[row] == stored
        return str(self.place(row)) if same else f"row {row}"


def _shows(cell: Mapping[str, Any], image: Any) -> bool:
    shown = cell.get("image")
    return image in shown if isinstance(shown, list) else shown is not None and shown == image


class PairReader(ItemReader):
    """Opens the images of a batch; an address of the web stays, for the model to open or to refuse.

    >>> PairReader()({"anchor": [{"image": "https://a.org/b.png", "text": None}]})
    {'anchor': [{'image': 'https://a.org/b.png'}]}
    """

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch of columns."""
        read = super().__call__({name: [_hidden(value) for value in values] for name, values in batch.items()})
        return {name: [_shown(value) for value in values] for name, values in read.items()}


@dataclass(frozen=True)
class _Address:
    """An address that the reader takes for an opened image."""

    address: str


def _hidden(cell: Any) -> Any:
    return _with_images(cell, lambda image: _Address(image) if isinstance(image, str) and is_remote(image) else image)


def _shown(cell: Any) -> Any:
    return _with_images(cell, lambda image: image.address if isinstance(image, _Address) else image)


def _with_images(cell: Any, change: Any) -> Any:
    if not isinstance(cell, Mapping) or not cell.get("image"):
        return cell
    shown = cell["image"]
    return {**cell, "image": [change(one) for one in shown] if isinstance(shown, list) else change(shown)}
