"""The parts that a report is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["text", "table", "plot", "gallery"]


@dataclass
class Section:
    """One part of a report."""

    kind: Kind
    title: str  # the heading, which may be ""
    data: dict[str, Any]  # the content of the JSON; of a gallery with the names of its thumbnails
    pictures: dict[str, bytes] = field(default_factory=dict)  # file name -> PNG
    dark: dict[str, bytes] = field(default_factory=dict)  # file name -> PNG for a dark page
