"""Results by row: what two evaluations are compared by."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unime_st.files import checksum, write_atomically

_COLUMNS = ("task", "row", "score", "tied")
_CHECKSUM = b"unime_st_checksum"
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class TaskOutcomes:
    """Results of one task by row.

    Attributes:
        rows: Number of each row in the task, shape (rows,).
        scores: Its share of the task's metric (hit@1, nDCG@5, recall@1 ...), in [0, 1], shape (rows,).
        tied: Whether a wrong candidate scored exactly as well as the right one, shape (rows,).
    """

    rows: np.ndarray
    scores: np.ndarray
    tied: np.ndarray


def write_outcomes(path: str | Path, outcomes: Mapping[str, TaskOutcomes]) -> None:
    """Write results by row as one parquet file with the columns task, row, score, tied.

    Args:
        path: The file; replaced whole.
        outcomes: Task -> results.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.parquet"
        >>> write_outcomes(path, {"VQA": TaskOutcomes(np.array([3]), np.array([1.0]), np.array([False]))})
        >>> read_outcomes(path)["VQA"].rows
        array([3])
    """
    sizes = [len(own.rows) for own in outcomes.values()]
    tasks = pa.array(np.repeat(np.array(list(outcomes), dtype=object), sizes), pa.string())

    def column(name: str, kind: pa.DataType) -> pa.Array:
        parts = [np.asarray(getattr(own, name)) for own in outcomes.values()]
        return pa.array(np.concatenate(parts) if parts else np.zeros(0)).cast(kind)

    columns = [tasks, column("rows", pa.int64()), column("scores", pa.float64()), column("tied", pa.bool_())]
    file = io.BytesIO()
    table = pa.table(columns, names=list(_COLUMNS))
    pq.write_table(table.replace_schema_metadata({_CHECKSUM: _checksum(table)}), file)
    write_atomically(Path(path), file.getvalue())


def read_outcomes(path: str | Path) -> dict[str, TaskOutcomes]:
    """Read what :func:`write_outcomes` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or has other columns.
    """
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
        told = (table.schema.metadata or {}).get(_CHECKSUM)
        damaged = told is not None and told.decode("ascii", "replace") != _checksum(table)
        if told is None and table.schema.metadata:
            damaged = True  # what is written without a checksum, by an earlier version, has no metadata at all
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"{path} holds no results by row ({error}). Evaluate again.") from error
    if damaged:
        raise ValueError(f"{path} is damaged: its checksum is another. Evaluate again.")
    tasks = np.array(table["task"].to_pylist(), dtype=object)
    arrays = [table[name].to_numpy() for name in _COLUMNS[1:]]
    return {task: TaskOutcomes(*(array[tasks == task] for array in arrays)) for task in dict.fromkeys(tasks.tolist())}


def _checksum(table: pa.Table) -> str:
    tasks = "\0".join(table["task"].to_pylist())
    return checksum(tasks, *(np.asarray(table[name].to_numpy()) for name in _COLUMNS[1:]))
