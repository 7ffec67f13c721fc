"""Looking through pairs as a whole before a GPU's hour is spent on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from unime_st.arguments import require_number
from unime_st.columns import training_columns
from unime_st.data.pairs.contents import groups, row_contents
from unime_st.data.pairs.damage import rows_without_content, unreadable_rows
from unime_st.data.pairs.reader import PairOrigin
from unime_st.data.pairs.report import Finding, PairsReport, Shared
from unime_st.data.pairs.stored import stored_rows
from unime_st.data.pairs.tokens import kind_of, token_counts
from unime_st.data.pairs.walk import each_cell

_EXAMPLES = 3


def check_pairs(
    dataset: Dataset,
    model: Any = None,
    *,
    name: str | None = None,
    batch_size: int = 32,
    num_train_epochs: float = 1.0,
    max_seq_length: int | None = None,
    open_images: bool = True,
    show_progress_bar: bool = False,
) -> PairsReport:
    """Look through all pairs: images, empty cells, equal contents, lengths; nothing found is raised one by one.

    Args:
        dataset: Of :func:`~unime_st.data.load_pairs` or :func:`~unime_st.data.with_images`, or texts alone.
        model: Counts tokens: an encoder, whose prompt and images count too; or a tokenizer, or the name or folder of a
            backbone or encoder, by whose tokenizer texts alone are counted, without loading weights.
        name: The name of the data in the report; None takes the name of the source.
        batch_size: Rows a step, for the estimate of steps.
        num_train_epochs: The number of epochs, for the same estimate.
        max_seq_length: Tokens that an input may have; None for the model's.
        open_images: Decode every image; False only checks that the files are there.
        show_progress_bar: Count rows.

    Returns:
        The report: print it, or see its ``to_dict()``; ``raise_for_problems()`` refuses data that are not fit.

    Raises:
        TypeError: When the rows have a transform of another kind.

    Example:
        >>> rows = Dataset.from_dict({"query": ["a", "b", "a"], "target": ["x", "y", "z"]})
        >>> report = check_pairs(rows)
        >>> report.rows, report.equal_queries.rows, report.equal_queries.pairs, report.problems
        (3, 2, 1, [])
    """
    require_number("batch_size", batch_size, least=1)
    require_number("num_train_epochs", num_train_epochs, least=0, whole=False)
    if num_train_epochs == math.inf:
        raise ValueError("`num_train_epochs=inf`, but a run has an end.")
    require_number("max_seq_length", max_seq_length, least=1, optional=True)
    stored, reader = stored_rows(dataset)
    origin = reader.origin if isinstance(reader.origin, PairOrigin) else None

    def place(row: int) -> str:
        return f"row {row}" if origin is None else origin.place_of(row, stored[row])

    bad = unreadable_rows(stored, reader, open_images=open_images, show_progress_bar=show_progress_bar)
    empty = rows_without_content(stored)
    contents = row_contents(stored, reader, show_progress_bar=show_progress_bar)
    tokens, limit = ({}, None) if model is None else token_counts(stored, dataset, model)
    limit = max_seq_length or limit
    return PairsReport(
        name=name or (origin.name if origin else "the data set"),
        rows=len(stored),
        kinds=_kinds(stored),
        bad_images=tuple(
            Finding(row, place(row), image.column, f"{image.image}: {image.error}")
            for row, images in bad.items()
            for image in images
        ),
        empty_cells=tuple(
            Finding(row, place(row), column, "empty") for row, columns in empty.items() for column in columns
        ),
        bad_rows=tuple(sorted({*bad, *empty})),
        **_equal_contents(contents, place),
        tokens={column: _spread(numbers, limit) for column, numbers in tokens.items()},
        max_seq_length=limit,
        plan=_plan(len(stored), batch_size, num_train_epochs, tokens),
        notes=origin.notes if origin else (),
    )


def _kinds(stored: Dataset) -> dict[str, dict[str, int]]:
    columns = training_columns(stored.column_names)
    sides = filter(None, (columns.anchor, columns.positive, *columns.negatives))
    found = {side: dict(Counter(kind_of(cell) for cell in each_cell(stored, side))) for side in sides}
    if columns.label is not None:
        found["label"] = {"different": len({str(label) for label in each_cell(stored, columns.label)})}
    return found


def _equal_contents(contents: np.ndarray, place: Callable[[int], str]) -> dict[str, Any]:
    """Rows equal on both sides, on the query alone and on the target alone; rows equal on both count once there."""
    whole = (contents >= 0).all(axis=1)
    both = np.full(len(contents), -1, dtype=np.int64)
    both[whole] = np.unique(contents[whole], axis=0, return_inverse=True)[1].ravel()
    _, first = np.unique(both, return_index=True)
    alone = np.isin(np.arange(len(contents)), first) | ~whole
    sides = [np.where(alone, contents[:, side], -1) for side in (0, 1)]
    own = np.flatnonzero(whole & (contents[:, 0] == contents[:, 1]))
    return {
        "duplicates": _shared(both, place),
        "equal_queries": _shared(sides[0], place),
        "equal_targets": _shared(sides[1], place),
        "own_targets": tuple(place(int(row)) for row in own),
    }


def _shared(numbers: np.ndarray, place: Callable[[int], str]) -> Shared:
    found = sorted(groups(numbers).values(), key=len, reverse=True)
    if not found:
        return Shared()
    return Shared(
        contents=len(found),
        rows=sum(map(len, found)),
        pairs=sum(math.comb(len(rows), 2) for rows in found),
        largest=len(found[0]),
        examples=tuple(tuple(place(row) for row in rows[:10]) for rows in found[:_EXAMPLES]),
    )


def _spread(tokens: np.ndarray, limit: int | None) -> dict[str, float]:
    p50, p95 = np.percentile(tokens, [50, 95])
    over = 0 if limit is None else int((tokens > limit).sum())
    return {"p50": float(p50), "p95": float(p95), "max": float(tokens.max()), "over": over}


def _plan(rows: int, batch_size: int, epochs: float, tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """Steps at the most: rows that conflict too much to be placed, and a last batch that is not full, are left out."""
    steps = math.ceil(rows // batch_size * epochs)
    plan: dict[str, float] = {"batch_size": batch_size, "epochs": epochs, "steps": steps}
    if tokens:
        plan["tokens_a_step"] = round(sum(float(counts.mean()) for counts in tokens.values()) * batch_size)
    return plan
