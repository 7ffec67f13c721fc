"""Media left until the rows that show them are embedded: what a batch carries in place of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unime_st.identity.content import Content
from unime_st.modules.inputs import Message
from unime_st.placement import IMAGES
from unime_st.videos import Video

ORIGIN = "late_origin"
"""The entry, in features whose media were left, that tells where they come from."""

_PIXELS = "pixel"  # what the names of tensors begin with that hold pixels, or tell which there are

Calls = list[Any]


@dataclass
class LateMedia:
    """The inputs of a column of a batch, and how they are to be processed.

    ``laid_out`` has, of rows that were embedded, their features without pixels, and the calls of the vision tower whose
    answers a training step keeps: its second pass over them need not open their media again.
    """

    contents: list[Content]
    options: dict[str, Any]
    laid_out: dict[tuple[int, ...], tuple[dict[str, Any], Calls]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Origin:
    """The rows that features were made of; what to remember of them, or the calls by which they are remembered."""

    late: LateMedia
    rows: tuple[int, ...]
    layout: dict[str, Any] | None
    calls: Calls | None


def may_wait(messages: list[list[Message]]) -> bool:
    """Whether there are media, and all of them can be told by their sizes until they are opened."""
    media = [part for message in messages for turn in message for part in turn["content"] if part["type"] != "text"]
    return bool(media) and all(part["type"] == "image" or isinstance(part.get("video"), Video) for part in media)


def without_pixels(features: Mapping[str, Any]) -> dict[str, Any]:
    """Features with one bit in place of the pixels of each picture or patch: whether there are any but zeros.

    It is all that models ask of pixels before the vision tower: pictures of zeros are padding.
    """
    found = {name: _bits(value) if name.startswith(_PIXELS) else value for name, value in features.items()}
    if IMAGES in features:
        found[IMAGES] = without_pixels(features[IMAGES])
    return found


def _bits(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    own = {2: 1, 4: 3, 5: 3}[value.ndim] if value.is_floating_point() else 2  # a patch, a picture, a picture's mask
    bits = (value != 0).flatten(-own).any(dim=-1).to(value.dtype)
    return bits[(..., *[None] * own)].expand(value.shape)
