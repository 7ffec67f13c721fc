"""Refusing arguments by name that would be taken without a word."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number, or too small a one.

    Raises:
        TypeError: For another type; True and 2.0 are no counts.
        ValueError: When it is below ``least``.

    Example:
        >>> check_count("batch_size", 0)
        Traceback (most recent call last):
        ValueError: `batch_size=0`, but it must be at least 1.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}={value!r}`, but it must be a whole number of at least {least}.")
    if value < least:
        raise ValueError(f"`{name}={value}`, but it must be at least {least}.")


def check_number(name: str, value: Any, *, above: float = -math.inf) -> None:
    """Refuse what is no number, NaN, or not above a bound.

    Raises:
        TypeError: For another type.
        ValueError: For NaN, and for what is too small.

    Example:
        >>> check_number("margin", float("nan"))
        Traceback (most recent call last):
        ValueError: `margin=nan`, but it must be a number.
    """
    bound = "" if above == -math.inf else f" above {above:g}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise TypeError(f"`{name}={value!r}`, but it must be a number{bound}.")
    if not value > above:
        raise ValueError(f"`{name}={value}`, but it must be a number{bound}.")
