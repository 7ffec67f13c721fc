"""Tasks whose candidates have names: rows of a table to an ``EvalTask``, broken ones told by task and row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unime_st.data.mmeb.eval_rows import EvalTask

Input = dict[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class NamedRow:
    """A query and what it chooses from: all of its candidates, or in a pool that all share those known of it."""

    query: Input
    candidates: Mapping[str, Input]  # by name, in order
    relevance: Mapping[str, float]  # of the right ones, by name
    instruction: str = ""  # what the query's system turn says


@dataclass(frozen=True)
class Prompts:
    """What is said before a query, and of a candidate that is a video or a page.

    With ``in_system`` it is as Qwen3-VL-Embedding's authors do: the query's goes into its system turn, without
    "Question:" and with a full stop for its colon, and candidates show themselves alone.

    >>> Prompts("Find it:", in_system=True).instruction, Prompts("Find it:").asking("a cat")
    ('Find it.', 'Find it: a cat')
    """

    query: str
    target: str = ""
    in_system: bool = False

    @property
    def instruction(self) -> str:
        """What the query's system turn says; "" where it has none."""
        said = self.query.strip().removesuffix("Question:").rstrip() if self.in_system else ""
        return f"{said[:-1]}." if said.endswith(":") else said

    def asking(self, text: str | None = None) -> str:
        """What is said beside the media of a query."""
        if self.in_system:
            return text or ""
        return self.query if text is None else f"{self.query} {text}"

    @property
    def of_target(self) -> str:
        """What is said beside a candidate that is a video or a page."""
        return "" if self.in_system else self.target


def with_text(item: Input, text: str) -> Input:
    """An input beside a text, if there is one."""
    return {**item, "text": text} if text else item


def read_table(folder: str | Path, config: str | None, split: str, columns: Iterable[str], where: str) -> Any:
    """Open a data set in a folder: a copy of its repository on the Hub, or what ``save_to_disk`` wrote.

    What was saved lies in the folder itself or in one named after the configuration. Only the columns named are read.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has no such configuration, split or columns.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    source = Path(folder)
    if not source.is_dir():
        raise FileNotFoundError(
            f"{where}: there is no folder {str(source)!r}. Fetch the data set's repository into it."
        )
    saved = [path for path in (source / (config or ""), source) if (path / "state.json").is_file()]
    try:
        table = load_from_disk(str(saved[0])) if saved else load_dataset(str(source), config, split=split)
    except (DatasetGenerationError, DatasetNotFoundError, OSError, ValueError) as error:
        told = f"configuration {config!r}, split {split!r}" if config else f"split {split!r}"
        raise ValueError(f"{where}: {source} cannot be read ({told}): {error}") from error
    wanted = list(columns)
    if missing := [name for name in wanted if name not in table.column_names]:
        raise ValueError(
            f"{where}: {source} has no column {', '.join(missing)}. Found: {', '.join(table.column_names)}."
        )
    return table.select_columns(wanted)


def task_of(
    name: str,
    records: Iterable[Record],
    read: Callable[[Record], NamedRow],
    *,
    pool: Mapping[str, Input] | None = None,
    shared: bool = False,
    on_error: Literal["raise", "report"] = "raise",
) -> EvalTask:
    """Make a task of records, each of which ``read`` turns into a row.

    With ``shared`` all queries choose from one pool: the candidates of the rows, each name once, then the rest of
    ``pool``, as published. A row that cannot be read is an error, or with "report" noted in ``broken``.
    """
    builder = _Builder()
    rows: list[tuple[int, int, NamedRow]] = []
    broken: dict[int, str] = {}
    for number, record in enumerate(records):
        try:
            row = read(record)
            _check(row)
        except (FileNotFoundError, LookupError, TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, LookupError) else type(error)  # of an empty list of captions, say
            located = kind(f"{name}, row {number}: {error}")
            if on_error == "raise":
                raise located from error
            broken[number] = str(located)
            continue
        rows.append((number, builder.place(row.query, row.instruction), row))
    candidates, gains, offsets = [], [], [0]
    for _, _, row in rows:
        for own, item in row.candidates.items():
            if not shared or own in row.relevance:
                candidates.append(builder.candidate(own, item))
                gains.append(float(row.relevance.get(own, 0)))
        offsets.append(len(candidates))
    corpus = None
    if shared:
        names = {own: item for _, _, row in rows for own, item in row.candidates.items()}
        corpus = np.array([builder.candidate(own, item) for own, item in {**names, **(pool or {})}.items()], np.int64)
    return EvalTask(
        builder.items,
        np.array([number for number, _, _ in rows], np.int64),
        np.array([query for _, query, _ in rows], np.int64),
        np.array(candidates, np.int64),
        np.array(offsets, np.int64),
        np.array(gains),
        corpus,
        broken,
        builder.instructions,
    )


def _check(row: NamedRow) -> None:
    if not any(value > 0 for value in row.relevance.values()):
        raise ValueError("The row has no right answer. Mend or remove it.")
    if strange := [name for name in row.relevance if name not in row.candidates]:
        raise ValueError(f"The right answer {strange[0]!r} is not among the row's candidates. Mend or remove it.")


class _Builder:
    """Distinct inputs and their places."""

    def __init__(self) -> None:
        self.items: list[Input] = []
        self.instructions: dict[int, str] = {}
        self._known: dict[Any, int] = {}

    def place(self, item: Input, instruction: str = "") -> int:
        said = tuple((kind, tuple(value) if isinstance(value, list) else value) for kind, value in item.items())
        key = said, instruction
        if key not in self._known:
            self._known[key] = len(self.items)
            if instruction:
                self.instructions[len(self.items)] = instruction
            self.items.append(item)
        return self._known[key]

    def candidate(self, name: str, item: Input) -> int:
        """The place of a candidate; one name is one input throughout a task."""
        if ("name", name) not in self._known:
            self._known["name", name] = self.place(item)
        return self._known["name", name]
