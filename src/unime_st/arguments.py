"""Refusing what an argument cannot be, with its name, before it is used."""

from __future__ import annotations

from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any


def require_number(
    name: str, value: Any, *, least: float | None = None, whole: bool = True, optional: bool = False
) -> None:
    """Refuse what is no number, or one too small; NaN is smaller than anything.

    Args:
        name: Of the argument.
        value: What was given.
        least: The smallest allowed; None for any.
        whole: Whether it must be an integer, Python's or numpy's.
        optional: Whether None is allowed.

    Raises:
        TypeError: For another type.
        ValueError: For a number below ``least``.

    Example:
        >>> require_number("max_rows", "all", optional=True)
        Traceback (most recent call last):
        ...
        TypeError: `max_rows='all'`, but it must be a whole number, or None.
    """
    if value is None and optional:
        return
    number: Any = value
    kinds: tuple[type, ...] = (Integral,) if whole else (Real,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"`{name}={value!r}`, but it must be {kind}{', or None' if optional else ''}.")
    if least is not None and not number >= least:
        raise ValueError(f"`{name}={value}`, but it must be at least {least}{', or None' if optional else ''}.")


def require_path(name: str, value: Any) -> Path:
    """A path of what was given for one.

    Raises:
        TypeError: For another type.

    Example:
        >>> require_path("cache_dir", None)
        Traceback (most recent call last):
        ...
        TypeError: `cache_dir=None`, but it must be a path: a string or a `Path`.
    """
    if not isinstance(value, str | PathLike) or not isinstance(fspath(value), str):
        raise TypeError(f"`{name}={value!r}`, but it must be a path: a string or a `Path`.")
    return Path(value)
