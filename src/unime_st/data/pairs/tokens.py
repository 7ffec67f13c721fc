"""How many tokens the rows of a set of pairs have, roughly, by a model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from unime_st.columns import training_columns
from unime_st.data.pairs.walk import each_cell

_MEASURED = 8  # rows of each kind whose images and prompt are put through the whole processor
_AT_ONCE = 1000
_NO_LIMIT = 10**9

Model = Any


def open_tokenizer(model: Model) -> tuple[Callable[[list[str]], list[int]], Any, int | None]:
    """What counts a text's tokens, what prepares whole inputs (None where only texts can be counted), and the limit."""
    if isinstance(model, str | Path):
        try:
            model = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model} has no tokenizer that can be loaded. {error}") from error
    whole = model if hasattr(model, "preprocess") else None
    tokenizer = model.tokenizer if whole is not None else model
    limit = (
        getattr(model, "max_seq_length", None) if whole is not None else getattr(tokenizer, "model_max_length", None)
    )

    def counts(texts: list[str]) -> list[int]:
        encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    return counts, whole, None if limit is None or limit > _NO_LIMIT else int(limit)


def token_counts(stored: Dataset, dataset: Dataset, model: Model) -> tuple[dict[str, np.ndarray], int | None]:
    """Tokens of each input, ``(N,)`` by column, and the limit: its text's, and about what prompt and images add."""
    counts, whole, limit = open_tokenizer(model)
    columns = training_columns(stored.column_names)
    found = {}
    for column in filter(None, (columns.anchor, columns.positive, *columns.negatives)):
        told = [(text_of(cell), kind_of(cell)) for cell in each_cell(stored, column)]
        texts = [text for text, _ in told]
        pieces = [counts(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)]
        tokens = np.array([number for piece in pieces for number in piece], dtype=np.int64)
        kinds = np.array([kind for _, kind in told])
        if whole is not None:
            for kind in set(kinds.tolist()) - {"empty"}:
                rows = np.flatnonzero(kinds == kind)
                tokens[rows] += _added(whole, dataset, column, rows, tokens, limit)
        found[column] = tokens
    return found, limit


def _added(  # noqa: PLR0917
    model: Any, dataset: Dataset, column: str, rows: np.ndarray, tokens: np.ndarray, limit: int | None
) -> int:
    """What prompt and images add to the text, in the mean of some rows that are not cut short."""
    short = rows[np.argsort(tokens[rows], kind="stable")][:_MEASURED]
    added = []
    for row in short.tolist():
        try:
            item = dataset[row][column]
        except (FileNotFoundError, ValueError):
            continue  # a bad image, told elsewhere
        length = int(model.preprocess([{"text": item} if isinstance(item, str) else item])["attention_mask"].sum())
        if limit is None or length < limit:
            added.append(length - int(tokens[row]))
    return round(float(np.mean(added))) if added else 0


def text_of(cell: Any) -> str:
    """The text of a stored cell."""
    text = cell.get("text") if isinstance(cell, Mapping) else cell
    return text if isinstance(text, str) else ""


def kind_of(cell: Any) -> str:
    """What a stored cell holds, in a word.

    >>> kind_of({"image": "a.png", "text": "what?"}), kind_of("a cat"), kind_of({"image": None, "text": None})
    ('image+text', 'text', 'empty')
    """
    text = bool(text_of(cell).strip())
    image = isinstance(cell, Mapping) and bool(cell.get("image") or cell.get("bytes") or cell.get("path"))
    return "image+text" if image and text else "image" if image else "text" if text else "empty"
