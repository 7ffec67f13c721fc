"""Which of a row's judged candidates are kept."""

from __future__ import annotations

import math

import numpy as np

from unime_st.arguments import require_count, require_number


def every(stride: int, count: int) -> list[int]:
    """Places 0 .. count - 1 in the order of a walk that takes every ``stride``-th and comes round again.

    >>> every(5, 12)
    [0, 5, 10, 1, 6, 11, 2, 7, 3, 8, 4, 9]
    """
    return [place for start in range(min(stride, count)) for place in range(start, count, stride)]


def chosen_negatives(
    scores: np.ndarray, positive_score: float, *, margin: float, stride: int, num_negatives: int
) -> list[int]:
    """Choose among a row's candidates ``(n,)``, nearest first: UniME-V2 (arXiv 2510.13515, section 3.2).

    Candidates with a score above ``positive_score - margin`` are false negatives and fall out, as do those with NaN,
    which could not be judged. Of the rest, every ``stride``-th is taken, coming round until there are
    ``num_negatives`` or none is left: neighbours in the ranking are alike.

    >>> chosen_negatives(np.array([0.9, 0.2, 0.1, 0.3]), 0.8, margin=0.01, stride=2, num_negatives=2)
    [1, 3]
    """
    valid = np.flatnonzero(scores <= positive_score - margin)
    return valid[every(stride, len(valid))[:num_negatives]].tolist()


def check_choice(num_negatives: int, margin: float, stride: int, too_few: str) -> None:
    """Refuse settings that are out of range."""
    require_count("num_negatives", num_negatives)
    require_count("stride", stride)
    require_number("margin", margin, above=-math.inf, whole=False)
    if too_few not in ("keep", "drop"):
        raise ValueError(f"`too_few={too_few!r}`, but it must be 'keep' or 'drop'.")
