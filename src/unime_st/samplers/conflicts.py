"""Which rows of a training set are false negatives of each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.features import Value

from unime_st.columns import training_columns
from unime_st.fingerprint import content_id

logger = logging.getLogger(__name__)

_READ_ROWS = 4096
_MAX_MEAN_NEIGHBOURS = 2000


@dataclass(frozen=True)
class Conflicts:
    """Rows that may not meet: those that share a key, and pairs of neighbours.

    Attributes:
        keys: ``(N, kinds)`` numbers in [0, ``num_keys``), each kind with its own range; -1 where nobody shares it.
        num_keys: How many shared keys there are.
        starts: ``(N + 1,)``: row ``i``'s neighbours are ``neighbours[starts[i]:starts[i + 1]]``.
        neighbours: Row numbers.
    """

    keys: np.ndarray
    num_keys: int
    starts: np.ndarray
    neighbours: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def key_sizes(self) -> np.ndarray:
        """Rows that share each key, ``(num_keys,)``."""
        return np.bincount(self.keys[self.keys >= 0], minlength=self.num_keys)

    def degrees(self) -> np.ndarray:
        """How many rows each row conflicts with, at most; 0 for a row that fits anywhere. ``(N,)``."""
        return (self._sizes_by_row() - 1).sum(axis=1) + np.diff(self.starts)

    def heaviest_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """The most shared key of each row, -1 for none, and how many rows share it, 1 for none; both ``(N,)``."""
        if self.keys.shape[1] == 0:
            return np.full(len(self), -1), np.ones(len(self), dtype=np.int64)
        sizes = self._sizes_by_row()
        kind = sizes.argmax(axis=1)[:, None]
        return np.take_along_axis(self.keys, kind, 1)[:, 0], np.take_along_axis(sizes, kind, 1)[:, 0]

    def _sizes_by_row(self) -> np.ndarray:
        return np.append(self.key_sizes(), 1)[self.keys]  # the last stands for "no key"

    def neighbours_of(self, row: int) -> np.ndarray:
        """Rows too similar to this one, by the guide."""
        return self.neighbours[self.starts[row] : self.starts[row + 1]]


def find_conflicts(identities: Iterable[np.ndarray], pairs: np.ndarray | None, rows: int) -> Conflicts:
    """Gather what is known about rows into one table.

    Args:
        identities: Arrays ``(N,)``; rows with an equal value in one of them conflict.
        pairs: ``(P, 2)`` further pairs of rows, in any order and direction.
        rows: ``N``.

    Example:
        >>> conflicts = find_conflicts([np.array([7, 8, 7])], np.array([[1, 2]]), 3)
        >>> conflicts.keys.tolist(), conflicts.neighbours_of(2).tolist(), conflicts.degrees().tolist()
        ([[0], [-1], [0]], [1], [1, 1, 2])
    """
    columns, num_keys = [], 0
    for values in identities:
        _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
        shared = counts > 1
        numbers = np.where(shared, np.cumsum(shared) - 1 + num_keys, -1)
        columns.append(numbers[codes])
        num_keys += int(shared.sum())
    keys = np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.int64)
    if pairs is None:
        pairs = np.empty((0, 2), dtype=np.int64)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[both[:, 0] != both[:, 1]]
    flat = np.unique(both[:, 0] * rows + both[:, 1])
    starts = np.searchsorted(flat, np.arange(rows + 1) * rows)
    return Conflicts(keys, num_keys, starts, flat % max(rows, 1))


def row_identities(dataset: Dataset, label_columns: list[str] | None = None) -> Iterator[np.ndarray]:
    """Content of the query, content of the target and, where it is a whole number or a name, the label of every row.

    The stored table is read, underneath any transform, so no image is opened: an image stored as a path is known by the
    path, one stored as bytes by its bytes.
    """
    columns = training_columns(dataset.column_names, label_columns)
    contents = [name for name in (columns.anchor, columns.positive) if name is not None]
    label = columns.label
    if label is not None and not _is_identity(dataset.features[label]):
        label = None
    ids: dict[str, list[Any]] = {name: [] for name in (*contents, *([label] if label else []))}
    stored = dataset.with_format("arrow", columns=list(ids))
    for start in range(0, len(dataset), _READ_ROWS):
        table = stored[start : start + _READ_ROWS]
        for name in contents:
            ids[name] += [_stored_id(value) for value in table.column(name).to_pylist()]
        if label:
            ids[label] += table.column(label).to_pylist()
    for name in contents:
        yield np.asarray(ids[name], dtype=np.int64)
    if label:
        # A row without a label shares it with nobody.
        names = [f"{row}th none" if value is None else f"={value}" for row, value in enumerate(ids[label])]
        yield np.unique(names, return_inverse=True)[1]


def _stored_id(value: Any) -> int:
    try:
        return content_id(value, read_files=False)
    except TypeError:  # numbers and other cells that are not an input of ours
        return content_id(repr(value))


def _is_identity(feature: Any) -> bool:
    """Whether a label says what the target is: not a score, nor a teacher's embedding."""
    dtype = feature.dtype if isinstance(feature, Value) else getattr(feature, "dtype", "")
    return str(dtype).startswith(("int", "uint", "bool", "string", "large_string"))


def guide_pairs(queries: Any, targets: Any, margin: float, chunk: int = 1024) -> np.ndarray:
    """Pairs of rows one of which has a query more similar to the other's target than to its own, by over a margin.

    Args:
        queries: ``(N, D)`` embeddings of the rows' queries, of any length.
        targets: ``(N, D)`` embeddings of their targets.
        margin: In cosine similarity; 0.1 is UniME's.
        chunk: Queries compared at a time.

    Returns:
        ``(P, 2)`` rows.

    Raises:
        ValueError: When the embeddings are not finite, or the margin makes most rows conflict.

    Example:
        >>> guide_pairs(np.eye(3)[:, :2] + 0.01, np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0]]), margin=0.5).tolist()
        [[1, 2]]
    """
    unit_queries, unit_targets = unit_rows("guide_queries", queries), unit_rows("guide_targets", targets)
    rows, total, found = len(unit_queries), 0, []
    for start in range(0, rows, chunk):
        own = (unit_queries[start : start + chunk] * unit_targets[start : start + chunk]).sum(dim=1)
        scores = unit_queries[start : start + chunk] @ unit_targets.T  # (chunk, N)
        pairs = (scores > (own + margin)[:, None]).nonzero().numpy()
        pairs[:, 0] += start
        found.append(pairs[pairs[:, 0] != pairs[:, 1]])
        total += len(found[-1])
        if total > _MAX_MEAN_NEIGHBOURS * rows:
            raise ValueError(
                f"With `margin={margin}` the guide takes more than {_MAX_MEAN_NEIGHBOURS} rows for false negatives of "
                f"an average row (seen after {start + chunk:,} of {rows:,}). Raise the margin, or check that the "
                "embeddings are in the data set's order."
            )
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def unit_rows(name: str, embeddings: Any) -> torch.Tensor:
    """Rows of length 1, float32; a ValueError with the argument's name and the row for numbers that are not finite."""
    tensor = torch.from_numpy(np.array(embeddings, dtype=np.float32))
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).any(dim=1).nonzero()[0])
        raise ValueError(f"`{name}` holds a number that is not finite, first in row {row}. Embed that row again.")
    return torch.nn.functional.normalize(tensor, dim=1)
