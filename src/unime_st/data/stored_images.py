"""Images as data sets store them, and what an opened one is shrunk to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unime_st.arguments import require_number
from unime_st.identity.content import fingerprint

Stored = Any
"""An image as a data set stores it: a path below the folder, ``{"bytes", "path"}``, or bytes."""

ENCODED_KEYS = frozenset({"bytes", "path"})
"""Of an image as ``datasets`` stores it."""


def sides_of(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height."""
    sides = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"`image_size={image_size}`, but it must be one side, or (width, height).")
    for side in sides:
        require_number("image_size", side)
    if min(sides) < 1:
        raise ValueError(f"`image_size={image_size}`, but both sides must be at least 1.")
    return sides


def stored_path(image: Stored) -> str | None:
    """The path that stands for an image in a cell; None where the image itself is stored."""
    if isinstance(image, Mapping) and image.get("bytes") is None:
        image = image.get("path")
    return image if isinstance(image, str) else None


def identity(image: Stored) -> str:
    """What a bad image is known by: its path, or a hash where it has none of its own."""
    if (path := stored_path(image)) is not None:
        return path
    name = image.get("path") if isinstance(image, Mapping) else None
    return f"{name or 'image'} #{fingerprint({'image': image})[:16]}"
