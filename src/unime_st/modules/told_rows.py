"""Telling what the row holds that an error names by its number among the inputs of a call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from reprlib import Repr
from typing import Any

_ROW = re.compile(r"\b[Rr]ow (\d+)\b")
_IN_SHORT = Repr()
_IN_SHORT.maxstring = _IN_SHORT.maxother = 120


def told_row(error: Exception, inputs: Sequence[Any]) -> str:
    """Say how rows are counted, and what the row that an error names holds, to find it in a data set.

    >>> error = ValueError("Row 1 holds a word too many.")
    >>> told_row(error, ["a", {"image": "b.png", "text": "c"}]).partition("batch. ")[2]
    "Row 1 is {'image': 'b.png', 'text': 'c'}."
    """
    counted = "Rows are counted among the inputs of one call: in training, in one column of a batch."
    found = _ROW.search(str(error))
    if found is None or not (row := int(found[1])) < len(inputs):
        return counted
    return f"{counted} Row {row} is {_IN_SHORT.repr(inputs[row])}."
