"""The content of a training set's rows: distinct queries and targets, and which targets answer which queries."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unime_st.columns import SUBSET, Columns, training_columns, without_subset
from unime_st.data.images import ItemReader
from unime_st.data.stored_images import stored_path
from unime_st.embedding.neighbors import Forbidden
from unime_st.embedding.store import key_array
from unime_st.identity.content import fingerprint

logger = logging.getLogger(__name__)

_READ_ROWS = 4096
_IDENTITIES = ("int", "uint", "bool", "string", "large_string")  # dtypes of a label that names the target


class Contents:
    """A training set as numbers of distinct queries, targets, labels and data sets, as they are stored."""

    def __init__(self, dataset: Dataset, *, by_subset: bool, hash_images: bool) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`dataset` is a {type(dataset).__name__}, but mining needs a `datasets.Dataset`.")
        self.columns: Columns = training_columns(dataset.column_names)
        if self.columns.positive is None or not len(dataset):
            raise ValueError(
                "Mining needs the columns (anchor, positive) and rows, "
                f"got {dataset.column_names} of {len(dataset)} rows."
            )
        transform = dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None
        transform = None if transform is without_subset else transform  # which changes no input
        if transform is not None and not isinstance(transform, ItemReader):
            raise ValueError(
                f"The rows are made by a transform ({type(transform).__name__}) that mining cannot undo. Give the data "
                "set without it, or as `load_mmeb_train` makes it."
            )
        self.reader: ItemReader | None = transform  # None for a data set that stores its inputs themselves
        self.features = dataset.features
        self._hash_images = hash_images
        names = [self.columns.anchor, self.columns.positive, *self.columns.negatives]
        self.table: pa.Table = dataset.with_format("arrow")[:]
        for name in (self.columns.anchor, self.columns.positive):
            refuse_none(name, self.table.column(name))
        rows = len(dataset)
        keys = [key_array(self._keys(name)) for name in names]
        # `queries`, `positives` and `groups` are the numbers, (N,), of each row's query, positive and data set; targets
        # are positives and explicit negatives; `all_targets` (columns, N) are those of each row, its positive first.
        self.query_keys, self._query_rows, self.queries = np.unique(keys[0], return_index=True, return_inverse=True)
        self.target_keys, first, numbers = np.unique(np.concatenate(keys[1:]), return_index=True, return_inverse=True)
        self.positives = numbers[:rows]
        self.all_targets = numbers.reshape(len(names) - 1, rows)
        self._target_rows = first
        self.groups = self._codes(SUBSET) if by_subset and SUBSET in dataset.column_names else np.zeros(rows, np.int64)
        place = np.searchsorted(self.target_keys, self.query_keys).clip(max=len(self.target_keys) - 1)
        self._itself = np.where(self.target_keys[place] == self.query_keys, place, -1)
        label = self.columns.label
        named = label is not None and getattr(dataset.features[label], "dtype", "").startswith(_IDENTITIES)
        kinds = [self.queries] + ([self._codes(str(label))] if named else [])
        self._answers = [_Answers(kind, self.positives) for kind in kinds]

    def __len__(self) -> int:
        return len(self.queries)

    def digest(self) -> str:
        """The hash of everything that the result of mining depends on."""
        total = hashlib.blake2b(digest_size=16)
        for array in (self.query_keys, self.queries, self.target_keys, self.all_targets, self.groups):
            total.update(np.ascontiguousarray(array).tobytes())
        for answers in self._answers:
            total.update(answers.kinds.tobytes())
        return total.hexdigest()

    def group_targets(self, group: int) -> np.ndarray:
        """The numbers of the distinct targets of a data set, ascending."""
        return np.unique(self.all_targets[:, self.groups == group])

    def forbidden(self, rows: np.ndarray) -> Forbidden:
        """Pairs of a place in ``rows`` and a target that is a right answer there, or the query itself."""
        parts = [answers.of(rows) for answers in self._answers]
        itself = self._itself[self.queries[rows]]
        parts.append((np.flatnonzero(itself >= 0), itself[itself >= 0]))
        places, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Forbidden(places, targets)

    def query_cells(self, numbers: np.ndarray) -> list[Any]:
        """The stored cells of distinct queries."""
        return self.table.column(self.columns.anchor).take(pa.array(self._query_rows[numbers])).to_pylist()

    def target_cells(self, numbers: np.ndarray) -> pa.ChunkedArray:
        """The stored cells of distinct targets."""
        names = [self.columns.positive, *self.columns.negatives]
        column, row = np.divmod(self._target_rows[numbers], len(self))
        parts, order = [], []
        for place, name in enumerate(names):
            own = np.flatnonzero(column == place)
            parts += self.table.column(name).take(pa.array(row[own])).chunks
            order.append(own)
        gathered = pa.chunked_array(parts, type=self.table.column(self.columns.positive).type)
        back = np.empty(len(numbers), dtype=np.int64)
        back[np.concatenate(order)] = np.arange(len(numbers))
        return gathered.take(pa.array(back))

    def read(self, cell: Any) -> Any:
        """Make a model's input of a stored cell; its image may be missing or damaged."""
        if not isinstance(cell, dict):
            return cell
        if self.reader is not None:
            return self.reader.read(cell)
        return cell if "bytes" in cell else {key: value for key, value in cell.items() if value is not None}

    def read_usable(self, cell: Any) -> Any:
        """Open an input; None when its image is bad and the set's reader puts up with that."""
        reader = self.reader
        try:
            return self.read(cell)
        except (FileNotFoundError, ValueError) as error:
            if (
                reader is None
                or reader.bad_images is None
                or (bad := reader.check(image := cell.get("image", cell), by_opening=True)) is None
            ):
                raise
            reader.report(image, bad)
            logger.debug("Mining without a cell: %s", error)
            return None

    def _keys(self, name: str) -> Iterator[bytes]:
        column = self.table.column(name)
        with ThreadPoolExecutor() as pool:  # a pool, since reading waits for files
            for start in range(0, len(column), _READ_ROWS):
                cells = column.slice(start, _READ_ROWS).to_pylist()
                yield from pool.map(self._key, repeat(name), count(start), cells, chunksize=64)

    def _key(self, name: str, row: int, cell: Any) -> bytes:
        try:
            return bytes.fromhex(fingerprint(self._located(cell), read_files=self._hash_images))
        except (OSError, ValueError) as error:
            kind = ValueError if isinstance(error, UnicodeError) else type(error)  # which is made of more than a text
            raise kind(f"Row {row}, {name!r}: {error}") from error

    def _located(self, cell: Any) -> Any:
        """The cell with a readable path of its image; a missing image is content of its own."""
        if self.reader is None or not self._hash_images or not isinstance(cell, dict):
            return cell
        image = stored_path(cell.get("image", cell))
        if image is None:
            return cell
        if self.reader.check(image) is None:
            return {**({"text": cell["text"]} if cell.get("text") else {}), "image": self.reader.path(image)}
        return {"text": f"missing image {image}\0{cell.get('text')}"}

    def _codes(self, name: str) -> np.ndarray:
        """Equal numbers for equal values; each missing value is different from all others."""
        codes = self.table.column(name).combine_chunks().dictionary_encode().indices
        values = np.asarray(codes.fill_null(-1)).astype(np.int64)
        missing = values < 0
        values[missing] = values.max(initial=0) + 1 + np.arange(missing.sum())
        return values


def refuse_none(name: str, column: pa.ChunkedArray, first_row: int = 0) -> None:
    """Refuse a column with an empty cell, such as a dict of which every part is None."""
    missing = np.concatenate([_nothing(chunk) for chunk in column.chunks] or [np.zeros(0, bool)])
    if missing.any():
        row = first_row + int(np.argmax(missing))
        raise ValueError(
            f"Row {row} has no {name!r} (None), as have {int(missing.sum()) - 1} more. Mining "
            "needs a content in each cell: leave those rows out, e.g. with `dataset.filter`."
        )


def _nothing(cells: pa.Array) -> np.ndarray:
    missing = np.asarray(cells.is_null())
    if pa.types.is_struct(cells.type) and cells.type.num_fields:
        missing = missing | np.logical_and.reduce([_nothing(part) for part in cells.flatten()])
    return missing


class _Answers:
    """The distinct positives of the rows of each kind, a kind being one query or one label."""

    def __init__(self, kinds: np.ndarray, positives: np.ndarray) -> None:
        self.kinds = kinds
        pairs = np.unique(np.stack([kinds, positives], axis=1), axis=0)
        self._targets = pairs[:, 1]
        self._starts = np.searchsorted(pairs[:, 0], np.arange(kinds.max(initial=-1) + 2))

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places in ``rows`` and the right answers there."""
        starts = self._starts[self.kinds[rows]]
        counts = self._starts[self.kinds[rows] + 1] - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(np.arange(len(rows)), counts), self._targets[np.repeat(starts, counts) + within]
