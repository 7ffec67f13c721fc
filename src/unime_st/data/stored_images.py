"""Images as data sets store them, and what an opened one is shrunk to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unime_st.arguments import require_number
from unime_st.identity.content import fingerprint

Stored = Any
"""An image as a data set stores it: a path below the folder, ``{"bytes", "path"}``, or bytes."""

_IMAGE_FIELDS = ("image", "bytes", "path")


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


def first_row(array: pa.Array, value: str | bytes) -> int | None:
    """First row of an array whose images, however nested, have one with this path or these bytes."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        found = first_row(pc.list_flatten(array), value)
        return None if found is None else pc.list_parent_indices(array)[found].as_py()
    if pa.types.is_struct(kind):
        parts = zip(kind.names, array.flatten(), strict=True)
        rows = [first_row(part, value) for field, part in parts if field in _IMAGE_FIELDS]
        return min((row for row in rows if row is not None), default=None)
    if isinstance(value, str) and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return None if (row := pc.index(array, pa.scalar(value, kind)).as_py()) < 0 else row
    if isinstance(value, bytes) and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        alike = pc.indices_nonzero(pc.equal(pc.binary_length(array), len(value))).to_pylist()  # reads no image
        return next((row for row in alike if array[row].as_py() == value), None)
    return None
