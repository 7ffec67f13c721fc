"""What a processor makes of media but their pixels, told by their sizes: how many tokens, and where.

A processor is asked once for each size, with blank media of it, and its own answer is kept, without the pixels. So a
batch is laid out by any family's rule, without decoding and without holding pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.video_utils import make_batched_metadata

_PIXELS = "pixel"  # what the names of outputs begin with that are as large as the media
_METADATA = "video_metadata"
_QUICK = {"do_rescale": False, "do_normalize": False}  # of blank media only the layout is looked at
_MOST_KEPT = 2**16


class Layouts:
    """Answers of a processor's parts for images and videos, by the media's sizes and the part's settings."""

    def __init__(self) -> None:
        self._kept: dict[Any, _Answer] = {}

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
            output = _joined([self._answer(plain, unit, options, asked) for unit in units])
            if _METADATA in output:
                output[_METADATA] = make_batched_metadata([video for row in units for video in row], metadata)
            return output

        return preprocess

    def _answer(self, plain: Any, unit: Any, options: dict[str, Any], asked: Any) -> _Answer:
        key = (_sizes(unit), asked)
        if key not in self._kept:
            answer = _Answer.of(plain([_blank(unit)], **{**options, **_QUICK}))
            if len(self._kept) == _MOST_KEPT:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[key] = answer
        return self._kept[key]


class _Answer(NamedTuple):
    """Outputs for the media of a row, without tensors: small ones kept among large ones leave holes in memory."""

    shapes: dict[str, tuple[int, ...]]  # of what holds pixels
    tensors: dict[str, list[Any]]
    others: dict[str, list[Any]]

    @classmethod
    def of(cls, output: BatchFeature) -> _Answer:
        tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        return cls(
            {name: tuple(value.shape) for name, value in tensors.items() if name.startswith(_PIXELS)},
            {name: value.tolist() for name, value in tensors.items() if not name.startswith(_PIXELS)},
            {name: value for name, value in output.items() if name not in tensors},
        )


def _joined(answers: Sequence[_Answer]) -> BatchFeature:
    """The output for several rows."""
    first = answers[0]
    output = BatchFeature({name: [one for own in answers for one in own.others[name]] for name in first.others})
    output.update({name: torch.tensor([one for own in answers for one in own.tensors[name]]) for name in first.tensors})
    for name, shape in first.shapes.items():  # tiles differ in number, but nothing is read of them but the size of one
        output[name] = torch.zeros(()).expand(sum(own.shapes[name][0] for own in answers), *shape[1:])
    return output


def _sizes(unit: Any) -> Any:
    if isinstance(unit, Image.Image):
        return unit.size
    return unit.shape if isinstance(unit, np.ndarray) else tuple(map(_sizes, unit))


def _blank(unit: Any) -> Any:
    if isinstance(unit, Image.Image):
        return Image.new("RGB", unit.size)
    return np.zeros(unit.shape, np.uint8) if isinstance(unit, np.ndarray) else list(map(_blank, unit))
