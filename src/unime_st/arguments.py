"""Refusing what an argument cannot be, with its name, before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any


def require_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    whole: bool = True,
    optional: bool = False,
) -> None:
    """Refuse what is no number, or one below ``least`` or not above ``above``; NaN is smaller than anything.

    True is no number, and 2.0 no whole one. ``above`` at minus infinity refuses NaN alone.

    >>> require_number("max_rows", "all", optional=True)
    Traceback (most recent call last):
    ...
    TypeError: `max_rows='all'`, but it must be a whole number, or None.
    >>> require_number("patience", float("nan"), above=0, whole=False)
    Traceback (most recent call last):
    ...
    ValueError: `patience=nan`, but it must be a number above 0.
    """
    if value is None and optional:
        return
    number: Any = value
    kind = "a whole number" if whole else "a number"
    if above is not None and above != -math.inf:
        kind += f" above {above:g}"
    or_none = ", or None" if optional else ""
    if not _is_number(value, whole=whole):
        raise TypeError(f"`{name}={value!r}`, but it must be {kind}{or_none}.")
    if above is not None and not number > above:
        raise ValueError(f"`{name}={value}`, but it must be {kind}{or_none}.")
    if least is not None and not number >= least:
        raise ValueError(f"`{name}={value}`, but it must be at least {least}{or_none}.")


def require_count(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number, or one too small; in either case the message says how small it may be.

    >>> require_count("batch_size", 2.0)
    Traceback (most recent call last):
    ...
    TypeError: `batch_size=2.0`, but it must be a whole number of at least 1.
    """
    if not _is_number(value, whole=True):
        raise TypeError(f"`{name}={value!r}`, but it must be a whole number of at least {least}.")
    require_number(name, value, least=least)


def require_instructions(name: str, value: Any) -> None:
    """Refuse instructions that are neither None nor a mapping of strings to strings.

    Args:
        name: Of the argument.
        value: What was given.

    Raises:
        TypeError: For anything else.

    Example:
        >>> require_instructions("prompts", {"query": 5})
        Traceback (most recent call last):
        ...
        TypeError: `prompts` has 'query': 5, but names and instructions are strings.
    """
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"`{name}={value!r}`, but they must be a mapping of names to instructions, or None.")
    for key, text in (value or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"`{name}` has {key!r}: {text!r}, but names and instructions are strings.")


def _is_number(value: Any, *, whole: bool) -> bool:
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


def require_path(name: str, value: Any) -> Path:
    """A path of what was given for one.

    >>> require_path("cache_dir", None)
    Traceback (most recent call last):
    ...
    TypeError: `cache_dir=None`, but it must be a path: a string or a `Path`.
    """
    if not isinstance(value, str | PathLike) or not isinstance(fspath(value), str):
        raise TypeError(f"`{name}={value!r}`, but it must be a path: a string or a `Path`.")
    return Path(value)
