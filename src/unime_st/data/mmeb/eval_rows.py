"""A benchmark task as indices into its distinct inputs, so that many candidates per row need no copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unime_st.data.images import resolve_image
from unime_st.data.parquet import (
    Source,
    clean_text,
    default_image_root,
    find_sources,
    read_columns,
    without_placeholders,
)

EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text")
OPTIONAL_EVAL_COLUMNS = ("tgt_img_path", "qry_inst", "tgt_inst")

Pair = tuple[str, str]  # text, image path; "" for none
InstructedReader = Callable[[Source], Iterator[tuple[str, Pair, list[Pair], str]]]


@dataclass
class EvalTask:
    """Queries, and the candidates that each chooses from.

    In a *local* pool, the slice of a query in ``candidates`` holds all of its own, the right answer first. In a
    *global* one, the ``corpus``, it holds only the relevant ones, and the rest of the corpus is wrong.
    """

    items: list[Any]  # distinct inputs, as `encode` takes them
    rows: np.ndarray  # (Q,) the number of each query in the task
    queries: np.ndarray  # (Q,) the place of each query in `items`
    candidates: np.ndarray  # places of candidates in `items`, those of one query after those of another
    offsets: np.ndarray  # (Q + 1,) where the candidates of each query begin, and the end
    gains: np.ndarray | None = None  # relevance of each candidate; None: 1 for the right answers, 0 for others
    corpus: np.ndarray | None = None  # places in `items` of the pool that all queries share; None for local pools
    broken: dict[int, str] = field(default_factory=dict)  # row -> why it cannot be read; such a row is no query
    instructions: dict[int, str] = field(default_factory=dict)  # place in `items` -> what its system turn says

    def asked(self, item: int) -> Any:
        """An item as a model is asked to embed it: with an instruction, chat messages."""
        return with_instruction(self.items[item], self.instructions.get(item))

    def shown(self, item: int) -> Any:
        """An item as people and rerankers see it: its instruction stands before its text."""
        told, content = self.instructions.get(item), self.items[item]
        return {**content, "text": f"{told} {content.get('text', '')}".strip()} if told else content

    def own(self, place: int) -> np.ndarray:
        """The places in ``items`` of the candidates of the query at a place of ``queries``."""
        return self.candidates[self.offsets[place] : self.offsets[place + 1]]

    def gains_of(self, place: int) -> np.ndarray:
        """The relevance of those candidates."""
        own = self.own(place)
        if self.gains is None:
            return np.ones(len(own)) if self.corpus is not None else (np.arange(len(own)) == 0).astype(float)
        return self.gains[self.offsets[place] : self.offsets[place + 1]]

    def right_of(self, place: int) -> list[int]:
        """The places in ``items`` of the right answers."""
        return self.own(place)[self.gains_of(place) > 0].tolist()


def with_instruction(item: Any, instruction: str | None) -> Any:
    """An input ``{"image", "video", "text"}`` with an instruction in the system turn, as chat messages.

    >>> with_instruction({"image": "a.jpg", "text": "a"}, "Find it.")[1]["content"]
    [{'type': 'image', 'image': 'a.jpg'}, {'type': 'text', 'text': 'a'}]
    """
    if not instruction:
        return item
    content = [{"type": kind, kind: value} for kind, value in item.items()]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": content}]


def read_in_turn(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reading that also knows what :func:`with_instruction` makes."""

    def read_item(item: Any) -> Any:
        if not isinstance(item, list):
            return read(item)
        system, user = item
        content = {part["type"]: part[part["type"]] for part in user["content"]}
        return with_instruction(read(content), system["content"])

    return read_item


def eval_pairs(source: Source, told: str | None = None) -> Iterator[tuple[str, Pair, list[Pair]]]:
    """Yield (where, query, candidates) for each row of a task; instructions are joined, placeholders removed.

    Candidates of rows without an instruction for them have the one ``told``.
    """
    cleaned: dict[tuple[str | None, str | None], str] = {}
    for where, row in _rows(source, EVAL_COLUMNS, OPTIONAL_EVAL_COLUMNS):
        text, image, texts, images, instruction, target_instruction = row
        candidates = []
        for own, path in pair_up(texts, images, where):
            before = target_instruction or (told if path or (told and clean_text(own)) else None)
            if (own, before) not in cleaned:
                cleaned[own, before] = clean_text(own, before)
            candidates.append((cleaned[own, before], path or ""))
        yield where, (clean_text(text, instruction), image or ""), candidates


def instructed_pairs(source: Source, *, strips_captions: bool = False) -> Iterator[tuple[str, Pair, list[Pair], str]]:
    """Yield (where, query, candidates, instruction), as Qwen3-VL-Embedding's authors show a row of MMEB.

    The query's instruction stands apart, candidates have none, and texts keep their white space; with
    ``strips_captions`` that around texts beside images goes. Such a text without a word is none.
    """
    for where, row in _rows(source, (*EVAL_COLUMNS, "qry_inst"), ("tgt_img_path", "tgt_inst")):
        text, image, texts, *others = row
        instruction, images = others[0], others[1]
        candidates = []
        for own, path in pair_up(texts, images, where):
            said = without_placeholders(own)
            if path and (strips_captions or not said.strip()):
                said = said.strip()
            candidates.append((said, path or ""))
        yield where, (without_placeholders(text), image or ""), candidates, without_placeholders(instruction).strip()


def _rows(source: Source, required: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield (where, values of the columns) for each row; None where an optional column is missing."""
    for file in source.files:
        columns = read_columns(source, file, required, optional)
        empty = [None] * len(columns["qry_text"])
        values = zip(*(columns.get(name, empty) for name in (*required, *optional)), strict=True)
        for number, row in enumerate(values):
            yield f"{source.name}, row {number} of {file.name}", row


def pair_up(texts: Any, images: Any, where: str) -> list[tuple[str | None, str | None]]:
    """Pair texts with image paths; each is a list, one value, or None where the column or value is missing."""
    if not isinstance(texts, list) and not isinstance(images, list):
        texts, images = [texts], [images]
    lists = [[value] if isinstance(value, str) else value for value in (texts, images)]
    lengths = {len(values) for values in lists if values is not None}
    if len(lengths) > 1:
        raise ValueError(f"{where} has {len(texts)} texts but {len(images)} image paths; they go in pairs.")
    length = max(lengths, default=0)
    return list(zip(*(values or [None] * length for values in lists), strict=True))


def check_row(where: str, query: Pair, candidates: Sequence[Pair]) -> None:
    """Refuse a row without a query or without a right answer."""
    if not any(query) or not candidates or not any(candidates[0]):
        raise ValueError(f"{where} has an empty query or an empty right answer. Mend or remove the row.")


def read_eval_task(
    root: str | Path,
    name: str,
    *,
    split: str = "test",
    image_root: str | Path | None = None,
    target_instruction: str | None = None,
    on_error: Literal["raise", "report"] = "raise",
    read_pairs: InstructedReader | None = None,
) -> EvalTask:
    """Read a task in MMEB-eval's layout; images are absolute paths, not looked for yet; "report" notes broken rows.

    ``read_pairs`` reads queries whose instructions stand apart; None joins instruction and text (:func:`eval_pairs`).
    """
    (source,) = find_sources(root, [name], split)
    folder = default_image_root(root, image_root)
    known: dict[tuple[Pair, str], int] = {}
    items: list[Any] = []
    instructions: dict[int, str] = {}

    def place(pair: Pair, instruction: str = "") -> int:
        if (pair, instruction) not in known:
            text, image = pair
            item = {"image": str(resolve_image(folder, image, must_exist=False))} if image else {}
            if instruction:
                instructions[len(items)] = instruction
            items.append({**item, "text": text} if text else item)
            known[pair, instruction] = len(known)
        return known[pair, instruction]

    queries: list[int] = []
    candidates: list[int] = []
    numbers: list[int] = []
    offsets, rows, broken = [0], 0, {}
    joined = ((*row, "") for row in eval_pairs(source, target_instruction))
    for where, query, pairs, instruction in joined if read_pairs is None else read_pairs(source):
        rows += 1
        try:
            check_row(where, query, pairs)
            own = [place(query, instruction), *(place(pair) for pair in pairs if any(pair))]
        except (ValueError, FileNotFoundError) as error:  # no file can have such a name
            located = error if str(error).startswith(where) else type(error)(f"{where}: {error}")
            if on_error == "raise":
                raise located from error
            broken[rows - 1] = str(located)
            continue
        numbers.append(rows - 1)
        queries.append(own[0])
        candidates += own[1:]
        offsets.append(len(candidates))
    return EvalTask(
        items,
        np.array(numbers, dtype=np.int64),
        np.array(queries, dtype=np.int64),
        np.array(candidates, dtype=np.int64),
        np.array(offsets, dtype=np.int64),
        broken=broken,
        instructions=instructions,
    )
