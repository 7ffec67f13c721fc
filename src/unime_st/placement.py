"""Where a batch's features lie: whole numbers at hand on the CPU, pixels of each image once, all sent without waiting.

On a GPU each number that the CPU reads makes it wait for all work before. What decides about passes (masks, counts,
which image stands where) is therefore read once a batch, and travels beside what goes to the device.

An image that several rows show is in the features once. Its tensors then stand in a mapping of their own, which stock
code passes on as it is when it takes rows, beside a table of the rows' images, of which it takes the rows' part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGES = "distinct_images"
"""The feature with the tensors of each distinct image, ``{name: Tensor}``."""

NUMBERS = "image_numbers"
"""The feature (B, M) with the numbers of each row's images among the distinct ones, in their order, then -1."""

LATE = "late_media"
"""The feature with a batch's inputs, whose media are left until the rows that show them are embedded."""

LATE_ROWS = "late_rows"
"""The feature (B,) with the numbers of the rows among those inputs."""

_AT_HAND = "at_hand"
_PATCHES, _GRID = "pixel_values", "image_grid_thw"
_BY_IMAGE = (_PATCHES, _GRID, "image_sizes", "image_position_ids")


def device_of(columns: Iterable[Mapping[str, Any]]) -> torch.device:
    """Where the tensors of a batch's columns are."""
    return next(value.device for column in columns for value in column.values() if isinstance(value, Tensor))


class AtHand:
    """Features on the CPU, in a class of its own, so that whatever sends tensors to a device leaves them here.

    Args:
        pairs: By name, a tensor of the features, and the same on the CPU.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs


def read(features: Mapping[str, Any], key: str) -> Tensor | None:
    """A feature on the CPU, from what is at hand if it is there; None where there is none."""
    known, value = features.get(_AT_HAND), features.get(key)
    if isinstance(known, AtHand) and key in known.pairs:
        of, found = known.pairs[key]
        if of is value:  # else it is another since, of some rows perhaps
            return found
    return value.cpu() if isinstance(value, Tensor) else None


def with_numbers_at_hand(features: Mapping[str, Any]) -> dict[str, Any]:
    """Features whose whole numbers of one or two dimensions lie on the CPU, brought there by one copy."""
    features = {name: value for name, value in features.items() if name != _AT_HAND}
    images = features.get(IMAGES, {})
    numbers = {
        (inside, name): value
        for inside, tensors in ((False, features), (True, images))
        for name, value in tensors.items()
        if isinstance(value, Tensor) and _is_whole(value) and _is_away(value)
    }
    if not numbers:
        return features
    flat = torch.cat([value.flatten().long() for value in numbers.values()]).cpu()
    parts = flat.split([value.numel() for value in numbers.values()])
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for ((inside, name), value), part in zip(numbers.items(), parts, strict=True):
        found[inside][name] = part.view(value.shape).to(value.dtype)
    return {**features, **found[False], **({IMAGES: {**images, **found[True]}} if images else {})}


def _is_away(value: Tensor) -> bool:
    return value.device.type != "cpu"


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) and 0 < value.ndim <= 2


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU it is copied from pinned memory, while the CPU goes on."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def moved(features: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Features on a device, whose whole numbers stay at hand, see :func:`read`."""
    found = {name: sent(value, device) if isinstance(value, Tensor) else value for name, value in features.items()}
    if IMAGES in features:
        images = features[IMAGES].items()
        found[IMAGES] = {name: value if _is_whole(value) else sent(value, device) for name, value in images}
    numbers = (name for name, value in features.items() if isinstance(value, Tensor) and _is_whole(value))
    known = (name for name in numbers if features[name].device.type == "cpu")
    found[_AT_HAND] = AtHand({name: (found[name], features[name]) for name in known})
    return found


def with_images_once(features: dict[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """Features with each distinct image once, when patches are already and all else has an entry for each image.

    ``index`` tells which of the distinct images each image is, in the order of the rows.
    """
    packed = _GRID in features
    counts = features["num_images_per_sample"].tolist()
    first = torch.tensor([index.index(number) for number in range(max(index) + 1)])
    images = {}
    for name in _BY_IMAGE:
        value = features.pop(name, None)
        if isinstance(value, Tensor):
            images[name] = value if name == _PATCHES and packed else value[first]
    numbers = torch.full((len(counts), max(counts)), -1)
    for row, own in enumerate(torch.tensor(index).split(counts)):
        numbers[row, : len(own)] = own
    return {**features, IMAGES: images, NUMBERS: numbers}


def images_of_rows(images: Mapping[str, Tensor], numbers: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The distinct images that some rows (b, M) show, and these rows' numbers among them; all lie on the CPU."""
    shown = numbers[numbers >= 0].unique()
    place = torch.full((int(shown.max()) + 1 if len(shown) else 0,), -1)
    place[shown] = torch.arange(len(shown))
    kept = torch.where(numbers >= 0, place[numbers.clamp(min=0)] if len(shown) else numbers, numbers)
    return {name: value[_entries(images, name, shown)] for name, value in images.items()}, kept


def with_every_image(features: Mapping[str, Any]) -> dict[str, Any]:
    """Features as stock code has them: the tensors of an image for each row that shows it, and nothing at hand."""
    stock = {name: value for name, value in features.items() if name not in (IMAGES, NUMBERS, _AT_HAND)}
    if IMAGES not in features:
        return stock
    images: Mapping[str, Tensor] = features[IMAGES]
    numbers = read(features, NUMBERS)
    assert numbers is not None
    shown = numbers[numbers >= 0]
    at_hand = {**images, **({_GRID: images[_GRID].cpu()} if _GRID in images else {})}
    device = features[NUMBERS].device
    every = {}
    for name, value in at_hand.items():
        entries = _entries(at_hand, name, shown)
        if value.device == device:
            every[name] = value.index_select(0, sent(entries, device))
        else:
            every[name] = sent(value.cpu()[entries], device)
    return stock | every


def _entries(images: Mapping[str, Tensor], name: str, numbers: Tensor) -> Tensor:
    """Where the entries of some images are in one of their tensors; patches stand one after the other."""
    return ranges(images[_GRID].prod(dim=1), numbers) if name == _PATCHES and _GRID in images else numbers


def ranges(sizes: Tensor, chosen: Tensor) -> Tensor:
    """Entries of the chosen groups, when group ``i`` has ``sizes[i]`` entries and they stand one after the other.

    >>> ranges(torch.tensor([2, 0, 3]), torch.tensor([2, 0]))
    tensor([2, 3, 4, 0, 1])
    """
    ends = sizes.cumsum(0)
    pieces: Iterable[Tensor] = [
        torch.arange(int(ends[group] - sizes[group]), int(ends[group])) for group in chosen.tolist()
    ]
    return torch.cat(list(pieces)) if len(chosen) else torch.empty(0, dtype=torch.long)
