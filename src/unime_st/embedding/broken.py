"""Inputs that cannot be read or encoded, named for those who have to find them."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

ITEM_ERRORS = (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError)  # broken PNG: SyntaxError
"""What reading and preparing one input raises."""

_ROW_OF_ONE = re.compile(r"\b([Rr]ow) 0\b( of the batch)?")
_LONGEST_SHOWN = 200


class BrokenInputError(ValueError):
    """An input that cannot be read or encoded.

    Args:
        row: Its number in the whole stream.
        item: The input.
        reason: What is wrong with it.

    Example:
        >>> str(BrokenInputError(70000, "", "ValueError: Row 0 holds neither text nor an image."))
        "Input '' (row 70000) cannot be encoded. ValueError: Row 70000 holds neither text nor an image."
    """

    def __init__(self, row: int, item: Any, reason: str) -> None:
        reason = _ROW_OF_ONE.sub(rf"\1 {row}", reason)
        super().__init__(f"Input {shown(item)} (row {row}) cannot be encoded. {reason}")
        self.row = row


class BrokenItemError(ValueError):
    """An item that cannot be read or encoded, by its place in the list given."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"Item {position} cannot be encoded: {reason}")
        self.position = position
        self.reason = reason


def shown(item: Any) -> str:
    """An input for an error message, cut short."""
    text = repr(item)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
