"""Opens, resizes and normalises an image once that several rows of a batch show, and keeps its pixels once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_GRID, _PATCHES, _COUNTS = "image_grid_thw", "pixel_values", "batch_num_images"
_BY_ROW = ("pixel_attention_mask", "rows", "cols")  # outputs of families that pad the images of each row (Idefics3)


class Shown:
    """Which of the distinct images each image of a batch is, when equal images have equal tensors for that reason."""

    index: list[int] | None = None


@contextmanager
def each_image_once(processor: Any) -> Iterator[Shown]:
    """Within this context a processor works on each image object once, however many rows hold it.

    Its output is the same, but that patches with a grid are those of the distinct images alone, which what is yielded
    then tells. Where images are laid out in a way that is not known here, all of them are processed.
    """
    shown = Shown()
    images = getattr(processor, "image_processor", None)
    if images is None or "preprocess" in vars(images):
        yield shown
        return
    plain = images.preprocess

    def preprocess(given: Any, *args: Any, **kwargs: Any) -> Any:
        shown.index = None
        distinct, index = _distinct(given)
        if len(distinct) == len(index):
            return plain(given, *args, **kwargs)
        nested = [[image] for image in distinct] if isinstance(given[0], list | tuple) else distinct
        output = plain(nested, *args, **kwargs)
        depends_on_row = _COUNTS in output and any(len(row) > 1 for row in given)  # one among several gets no tiles
        if depends_on_row or not _repeat(output, index, len(distinct)):
            return plain(given, *args, **kwargs)
        shown.index = index
        return output

    images.preprocess = preprocess
    try:
        yield shown
    finally:
        del images.preprocess


def _distinct(given: Any) -> tuple[list[Any], list[int]]:
    """Each image object of a list, or of a list of lists, once, and for each image its place among them."""
    flat = [image for row in given for image in (row if isinstance(row, list | tuple) else [row])]
    places: dict[int, int] = {}
    index = [places.setdefault(id(image), len(places)) for image in flat]
    return [flat[index.index(place)] for place in range(len(places))], index


def _repeat(output: Any, index: Sequence[int], count: int) -> bool:
    """Repeat the output of each image as the index says, in place, but patches; False when its layout is unknown."""
    if any(key in output for key in _BY_ROW):
        return False
    chosen = torch.tensor(index)
    repeated = {}
    for key, value in output.items():
        if key == _PATCHES and _GRID in output:  # large, and no processor looks at them
            continue
        if not hasattr(value, "__len__") or len(value) != count:
            return False
        repeated[key] = value[chosen] if isinstance(value, Tensor) else [value[place] for place in index]
    output.update(repeated)
    return True
