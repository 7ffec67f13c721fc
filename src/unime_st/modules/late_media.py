"""Media left until the rows that show them are embedded: what a batch carries in place of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unime_st.identity.content import Content
from unime_st.identity.features import CONTENT_KEY
from unime_st.modules.inputs import Message, named_and_known
from unime_st.modules.layouts import Layouts
from unime_st.modules.processing import MessageProcessor
from unime_st.modules.speed.vision_cache import Calls, VisionCache
from unime_st.modules.told_rows import told_row
from unime_st.placement import IMAGES, LATE, LATE_ROWS, read
from unime_st.videos import Video

ORIGIN = "late_origin"
"""The entry, in features whose media were left, that tells where they come from."""

_PIXELS = "pixel"  # what the names of tensors begin with that hold pixels, or tell which there are

_LAID_OUT = ("input_ids", "attention_mask", "num_images_per_sample", "num_videos_per_sample")


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


class LatePreparation(MessageProcessor):
    """What lays a batch out whose media are left, and makes the features of some of its rows when they are asked for.

    ``late_media`` is the number of mini-batches prepared ahead, None where media are not left.
    """

    late_media: int | None
    layouts: Layouts
    vision_cache: VisionCache

    @property
    def mini_batches_ahead(self) -> int:
        """Mini-batches whose media are prepared ahead in a thread."""
        return self.late_media or 0

    def with_media(self, features: dict[str, Any]) -> dict[str, Any]:
        """Features of some rows with their media, if :meth:`preprocess` left these; of kept media without pixels."""
        late = features.get(LATE)
        if late is None:
            return features
        told = read(features, LATE_ROWS)
        assert told is not None
        rows = tuple(told.tolist())
        layout, calls = late.laid_out.get(rows, (None, None))
        if calls is not None and self.vision_cache.has(calls):
            return {**layout, ORIGIN: Origin(late, rows, None, calls)}
        found = self._made_late(late, rows)
        layout = without_pixels(found) if self.vision_cache.keeps(self.model) else None
        return {**found, ORIGIN: Origin(late, rows, layout, None)}

    def _made_late(self, late: LateMedia, rows: Sequence[int]) -> dict[str, Any]:
        contents = [late.contents[row] for row in rows]
        try:
            return self._preprocess([content.item for content in contents], rows, contents, **late.options)
        except (OSError, TypeError, ValueError) as error:
            error.add_note(told_row(error, [content.item for content in late.contents]))
            raise

    def _laid_out(
        self, inputs: Sequence[Any], rows: Sequence[int], contents: Sequence[Content] | None, asked: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Features whose media are left for later, with the tokens that these will have; None where that cannot be."""
        named, known = named_and_known(inputs, rows, contents)
        messages = self._messages(named, rows, sizes_alone=True)
        if not may_wait(messages):
            return None
        with self.layouts.in_place_of_pixels(self.processor):
            found = self._features(messages, rows, **asked)
        told = [content or Content(item, named=name) for item, name, content in zip(inputs, named, known, strict=True)]
        features = {name: found[name] for name in _LAID_OUT if name in found}
        features[CONTENT_KEY] = torch.tensor([content.id for content in told], dtype=torch.long)
        return {**features, LATE: LateMedia(told, asked), LATE_ROWS: torch.arange(len(told))}

    def _preprocess(
        self,
        inputs: Sequence[Any],
        rows: Sequence[int],
        contents: Sequence[Content] | None,
        *,
        allow_blank: bool = False,
        **asked: Any,
    ) -> dict[str, Any]:
        """Features of inputs with all their media."""
        raise NotImplementedError

    def _messages(self, named: Sequence[Any], rows: Sequence[int], **options: bool) -> list[list[Message]]:
        """Inputs as chat messages."""
        raise NotImplementedError
