"""The columns of a training set and what they mean.

sentence-transformers goes by position: of the columns that are not the label, the first is the anchor, the second the
positive and the rest are explicit negatives. The names below are what this package writes; any names may be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ANCHOR = "anchor"
"""The query: text, an image, ``{"image", "text"}`` or chat messages."""

POSITIVE = "positive"
"""The target that answers the query, of the same kinds."""

NEGATIVE_PREFIX = "negative_"
"""Start of the names of the explicit negatives: ``negative_1``, ``negative_2``, ..."""

LABEL = "label"
"""An integer identity of the target (stage 2), the teacher's embeddings of the row (stage 1), or a judge's scores of
its candidates."""

NO_CANDIDATE = -1.0
"""The score of a place in which a row has no candidate: rows of judged negatives may have differing numbers of them."""

LABEL_COLUMNS = ("label", "labels", "score", "scores")
"""Names that sentence-transformers takes for the label; the first one present wins."""

DATASET_NAME = "dataset_name"
"""Added by the Trainer when it trains on several data sets; never content."""

SUBSET = "subset"
"""The data set a row comes from; read by the batch sampler from the stored table, dropped before rows reach the model.
"""


@dataclass(frozen=True)
class Columns:
    """Which column of a training set plays which part."""

    anchor: str
    positive: str | None = None  # None for a data set of one column, as in stage 1
    negatives: tuple[str, ...] = ()
    label: str | None = None


def negative_column(number: int) -> str:
    """Name of the ``number``-th explicit negative, counted from 1.

    >>> negative_column(1)
    'negative_1'
    """
    if number < 1:
        raise ValueError(f"Explicit negatives are counted from 1, got {number}.")
    return f"{NEGATIVE_PREFIX}{number}"


def without_subset(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Drop :data:`SUBSET` from rows: the transform (``with_transform``) of a plain data set that holds the column.

    >>> without_subset({"anchor": ["a"], "positive": ["b"], "subset": ["VQA"]})
    {'anchor': ['a'], 'positive': ['b']}
    """
    return {name: values for name, values in rows.items() if name != SUBSET}


def training_columns(names: Iterable[str], label_columns: Iterable[str] | None = None) -> Columns:
    """Tell the parts of a training set's columns, in their order, by position, as the Trainer does.

    >>> training_columns(["query", "answer", "wrong", "label"])
    Columns(anchor='query', positive='answer', negatives=('wrong',), label='label')
    """
    given = list(names)
    label = next((name for name in (label_columns or LABEL_COLUMNS) if name in given), None)
    inputs = [name for name in given if name not in (label, DATASET_NAME, SUBSET)]
    if not inputs:
        raise ValueError(f"A training set needs a column of inputs beside its label, got the columns {given}.")
    return Columns(inputs[0], inputs[1] if len(inputs) > 1 else None, tuple(inputs[2:]), label)
