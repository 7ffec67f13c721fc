"""What a teacher may give: refused by name where it would teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def refuse_one_text(name: str, texts: Any) -> None:
    """Refuse a string in place of a list of them."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"`{name}` is one text ({texts!r:.80}), whose letters would be taken for texts. Give a list.")


def checked_labels(embeddings: np.ndarray) -> np.ndarray:
    """A teacher's embeddings that are given, as float32."""
    if not np.issubdtype(embeddings.dtype, np.number) or np.iscomplexobj(embeddings) or not embeddings.shape[-1]:
        raise ValueError(f"The embeddings are {embeddings.shape} of {embeddings.dtype}, but they must be real numbers.")
    with np.errstate(over="ignore"):  # found below, with its row
        labels = embeddings.astype(np.float32)
    by_text = labels.reshape(-1, labels.shape[-1])
    row, why = _useless(by_text)
    if row is not None:
        raise ValueError(
            f"The embedding of row {row // (len(by_text) // len(labels))} {why}. Embed that row again, or remove it."
        )
    return labels


def _useless(embeddings: np.ndarray) -> tuple[int | None, str]:
    """The first row that gives no direction, with what is wrong with it; None for none."""
    finite = np.asarray(np.isfinite(embeddings).all(axis=1))
    if not finite.all():
        return int(np.argmin(finite)), f"is not finite, as are {int((~finite).sum()) - 1} more of {len(finite)}"
    zero = np.asarray(~embeddings.any(axis=1))
    if zero.any():
        return int(np.argmax(zero)), f"is zero, so like no other, as are {int(zero.sum()) - 1} more of {len(zero)}"
    return None, ""


def check_embeddings(embeddings: np.ndarray, texts: Sequence[str], rows: np.ndarray, dimension: int | None) -> None:
    """Refuse what a teacher has made of texts, with the rows that these are in what was asked for."""
    if (
        embeddings.ndim != 2
        or len(embeddings) != len(texts)
        or embeddings.shape[1] != (dimension or embeddings.shape[1])
    ):
        expected = f"({len(texts)}, {dimension or 'D'})"
        raise ValueError(
            f"The teacher gave embeddings of shape {embeddings.shape} for {len(texts)} texts, expected {expected}. One "
            "row a text is needed; another dimension than the cache's needs another `teacher_name`."
        )
    row, why = _useless(embeddings)
    if row is not None:
        advice = (
            "Half precision overflows in some teachers: load it in bfloat16 or float32, or remove the row."
            if "finite" in why
            else "Remove the row, or give a teacher that knows its words."
        )
        raise ValueError(f"The teacher's embedding of row {rows[row]} ({texts[row]!r:.80}) {why}. {advice}")
