"""Holding rows out of training so that none of their queries or targets is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from unime_st.arguments import require_number
from unime_st.columns import training_columns
from unime_st.data.pairs.contents import row_contents
from unime_st.data.pairs.stored import stored_rows


def split_pairs(dataset: Dataset, held_out: float = 0.1, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split pairs by content: no query, target or label of the one part is in the other.

    Rows that share a query, a target or a label, directly or over other rows, go together, so a part can be smaller or
    larger than asked for; images are known by their files' content.

    Args:
        dataset: Of :func:`~unime_st.data.load_pairs` or :func:`~unime_st.data.with_images`, or texts alone.
        held_out: Share of the rows to hold out, above 0 and below 1.
        seed: Of the choice.

    Returns:
        Rows to train on and rows held out, in their order.

    Raises:
        ValueError: When the share is out of range, or all rows hang together so that none can be held out.

    Example:
        >>> rows = Dataset.from_dict({"query": ["a", "b", "a", "c"], "target": ["w", "x", "y", "z"]})
        >>> train, held = split_pairs(rows, 0.25)
        >>> len(train) + len(held), set(train["query"]) & set(held["query"])
        (4, set())
    """
    require_number("held_out", held_out, whole=False)
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out={held_out}`, but it is a share of the rows: above 0 and below 1.")
    stored, reader = stored_rows(dataset)
    keys = list(row_contents(stored, reader).T)
    if (label := training_columns(stored.column_names).label) is not None:
        keys.append(_numbered(stored[label][:]))
    family = connected(keys)
    sizes = np.bincount(family)
    order = np.random.default_rng(seed).permutation(len(sizes))
    wanted = max(1, round(held_out * len(dataset)))
    chosen: list[int] = []
    room = wanted
    for one in order:  # a family too large for what is left stays in training
        if sizes[one] <= room:
            chosen.append(int(one))
            room -= int(sizes[one])
    held = np.isin(family, chosen)
    if not held.any() or held.all():
        raise ValueError(
            f"No rows can be held out: the {len(dataset)} rows form {len(sizes)} groups that share queries, targets or "
            f"labels, of up to {sizes.max()} rows, and {wanted} rows are to be held out. Give a larger `held_out`, "
            "more varied rows, or a separate set for evaluation."
        )
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))


def _numbered(labels: list[Any]) -> np.ndarray:
    """A number for each label that is an identity, -1 for none."""
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(own, len(seen)) if isinstance(own, int | str) else -1 for own in labels])


def connected(keys: list[np.ndarray]) -> np.ndarray:
    """Number the groups of rows that hang together by equal keys, -1 being equal to nothing; ``(N,)``.

    >>> connected([np.array([0, 0, 1, -1]), np.array([5, 6, 6, -1])]).tolist()
    [0, 0, 0, 1]
    """
    parent = list(range(len(keys[0])))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for key in keys:
        first: dict[int, int] = {}
        for row, number in enumerate(key.tolist()):
            if number >= 0:
                low, high = sorted((root(first.setdefault(number, row)), root(row)))
                parent[high] = low
    return np.unique([root(row) for row in range(len(parent))], return_inverse=True)[1]
