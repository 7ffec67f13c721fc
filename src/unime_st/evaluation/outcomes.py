"""Results by row, by which two evaluations are compared, and how many of them only a rule for ties decides."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unime_st.files import checksum, write_atomically

_COLUMNS = ("task", "row", "score", "tied")
_CHECKSUM = b"unime_st_checksum"
_RULES = b"unime_st_ties"
_SETTINGS = b"unime_st_settings"
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)
_MOST_TIED = 0.01
_TASKS_NAMED = 5

FIRST_WINS = "the first of equal scores wins"
TIE_IS_WRONG = "a tie is wrong"
NOT_TOLD = "not told: right in MMEB, wrong elsewhere"
"""The rule of files that were written before they recorded it."""


@dataclass(frozen=True)
class TaskOutcomes:
    """The results of one task by row."""

    rows: np.ndarray  # (rows,) the number of each row in the task
    scores: np.ndarray  # (rows,) its share of the task's metric (hit@1, nDCG@5, recall@1 ...), in [0, 1]
    tied: np.ndarray  # (rows,) whether only the rule for ties decided that, since a wrong candidate scored the same
    rule: str = FIRST_WINS


def told_of_ties(outcomes: Mapping[str, TaskOutcomes]) -> str:
    """A warning that names the tasks decided by ties in more than 1 % of their rows; "" if there are none."""
    many = {task: own for task, own in outcomes.items() if own.tied.sum() > _MOST_TIED * len(own.tied)}
    if not many:
        return ""
    named = []
    for task, own in list(many.items())[:_TASKS_NAMED]:
        luck, word = (1.0, "were they right") if own.rule == TIE_IS_WRONG else (0.0, "without them")
        score, other = (100 * np.mean(values) for values in (own.scores, np.where(own.tied, luck, own.scores)))
        share = f"{own.tied.sum()} of {len(own.tied)}"
        named.append(f"{task} ({share}; score {score:.1f} %, {other:.1f} % {word})")
    if len(many) > _TASKS_NAMED:
        named.append(f"and {len(many) - _TASKS_NAMED} more")
    return (
        f"Equal scores decide more than 1 % of the rows of: {', '.join(named)}. The embeddings may have collapsed into "
        "one, or inputs differ only in what the model does not see, such as the end of a text that it cuts: these "
        "scores say little."
    )


def write_outcomes(
    path: str | Path, outcomes: Mapping[str, TaskOutcomes], settings: Mapping[str, Any] | None = None
) -> None:
    """Write results by row as one parquet file with the columns task, row, score, tied.

    In its metadata are the rules for ties and, where given, the settings of the evaluation.
    """
    sizes = [len(own.rows) for own in outcomes.values()]
    tasks = pa.array(np.repeat(np.array(list(outcomes), dtype=object), sizes), pa.string())

    def column(name: str, kind: pa.DataType) -> pa.Array:
        parts = [np.asarray(getattr(own, name)) for own in outcomes.values()]
        return pa.array(np.concatenate(parts) if parts else np.zeros(0)).cast(kind)

    columns = [tasks, column("rows", pa.int64()), column("scores", pa.float64()), column("tied", pa.bool_())]
    file = io.BytesIO()
    table = pa.table(columns, names=list(_COLUMNS))
    rules = json.dumps({task: own.rule for task, own in outcomes.items()})
    told = {} if settings is None else {_SETTINGS: json.dumps(settings, default=str).encode()}
    own = {_CHECKSUM: _checksum(table, told.get(_SETTINGS)), _RULES: rules, **told}
    pq.write_table(table.replace_schema_metadata(own), file)
    write_atomically(Path(path), file.getvalue())


def read_outcomes(path: str | Path) -> dict[str, TaskOutcomes]:
    """Read the file of :func:`write_outcomes`; one that is damaged or has other columns is refused."""
    return read_whole(path)[0]


def read_whole(path: str | Path) -> tuple[dict[str, TaskOutcomes], dict[str, Any] | None]:
    """The outcomes and the settings of a file, see :func:`read_outcomes` and :func:`read_settings`."""
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
        told = (table.schema.metadata or {}).get(_CHECKSUM)
        rules = json.loads((table.schema.metadata or {}).get(_RULES, "{}"))
        settings = (table.schema.metadata or {}).get(_SETTINGS)
        damaged = told is not None and told.decode("ascii", "replace") != _checksum(table, settings)
        if told is None and table.schema.metadata:
            damaged = True  # files of versions without checksums have no metadata at all
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"{path} holds no results by row ({error}). Evaluate again.") from error
    if damaged:
        raise ValueError(f"{path} is damaged: its checksum is another. Evaluate again.")
    tasks = np.array(table["task"].to_pylist(), dtype=object)
    arrays = [table[name].to_numpy() for name in _COLUMNS[1:]]
    found = {}
    for task in dict.fromkeys(tasks.tolist()):
        numbers, scores, tied = (array[tasks == task] for array in arrays)
        found[task] = TaskOutcomes(numbers, scores, tied, rules.get(task, NOT_TOLD))
    return found, None if settings is None else json.loads(settings)


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """Read the settings of the evaluation that wrote a file of results by row.

    They are those of the evaluator (prompt, resolution, frames by task, reranker and depth, ...), the fingerprints of
    the encoder and the reranker, the sizes of the processor's images and the versions of the packages.

    Args:
        path: A ``*_rows.parquet``.

    Returns:
        Name -> value; None where the file was written before they were recorded.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged.
    """
    return read_whole(path)[1]


def _checksum(table: pa.Table, settings: bytes | None = None) -> str:
    tasks = "\0".join(table["task"].to_pylist())
    told = [] if settings is None else [settings]
    return checksum(tasks, *(np.asarray(table[name].to_numpy()) for name in _COLUMNS[1:]), *told)
