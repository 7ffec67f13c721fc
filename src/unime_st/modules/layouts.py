"""What a processor makes of media but their pixels, told by their sizes: how many tokens, and where.

A processor is asked once for each size, with blank media of it, and its own answer is kept, without the pixels. So a
batch is laid out by any family's rule, without decoding and without holding pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.video_utils import make_batched_metadata

_PIXELS = "pixel"  # what the names of outputs begin with that are as large as the media
_METADATA = "video_metadata"
_MOST_KEPT = 2**16


class Layouts:
    """Answers of a processor's parts for images and videos, by the media's sizes and the part's settings."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, dict[str, Any]] = OrderedDict()

    @contextmanager
    def in_place_of_pixels(self, processor: Any) -> Iterator[None]:
        """Within this context a processor lays rows out as ever, but its pixels are zeros that take no memory."""
        parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
        patched = [part for part in parts if part is not None]
        for part in patched:
            part.preprocess = self._in_place_of(part)
        try:
            yield
        finally:
            for part in patched:
                del part.preprocess

    def _in_place_of(self, part: Any) -> Any:
        plain, settings = part.preprocess, repr(part)

        def preprocess(given: Any, **options: Any) -> BatchFeature:
            metadata = options.pop(_METADATA, None)
            units = [unit for unit in given if not isinstance(unit, list) or unit]  # the media of a row, or one medium
            asked = (settings, repr(options))
            answers = [self._answer(plain, unit, options, asked) for unit in units]
            output = BatchFeature({name: _joined(name, [own[name] for own in answers]) for name in answers[0]})
            if _METADATA in output:
                output[_METADATA] = make_batched_metadata([video for row in units for video in row], metadata)
            return output

        return preprocess

    def _answer(self, plain: Any, unit: Any, options: dict[str, Any], asked: Any) -> dict[str, Any]:
        key = (_sizes(unit), asked)
        if key not in self._kept:
            answer = plain([_blank(unit)], **options)
            self._kept[key] = {name: _without_numbers(name, value) for name, value in answer.items()}
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]


def _sizes(unit: Any) -> Any:
    if isinstance(unit, Image.Image):
        return unit.size
    return unit.shape if isinstance(unit, np.ndarray) else tuple(map(_sizes, unit))


def _blank(unit: Any) -> Any:
    if isinstance(unit, Image.Image):
        return Image.new("RGB", unit.size)
    return np.zeros(unit.shape, np.uint8) if isinstance(unit, np.ndarray) else list(map(_blank, unit))


def _without_numbers(name: str, value: Any) -> Any:
    return value.new_zeros(()).expand(value.shape) if name.startswith(_PIXELS) and isinstance(value, Tensor) else value


def _joined(name: str, values: Sequence[Any]) -> Any:
    """The outputs for several units as the output for all."""
    if not isinstance(values[0], Tensor):
        return [element for value in values for element in value]
    if name.startswith(_PIXELS):  # tiles differ in number, but nothing is read of them but the size of one
        return values[0].new_zeros(()).expand(sum(map(len, values)), *values[0].shape[1:])
    return torch.cat(list(values))
