"""The parts that a report is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["text", "table", "plot", "gallery"]


@dataclass
class Section:
    """One part of a report.

    Attributes:
        kind: what it is.
        title: its heading; may be "".
        data: what goes into the JSON; for galleries with the names of their thumbnails.
        pictures: file name -> PNG.
        dark: file name -> PNG for a dark page.
    """

    kind: Kind
    title: str
    data: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    dark: dict[str, bytes] = field(default_factory=dict)
