"""Features of a fixed vision tower, kept: each distinct image is computed once.

GradCache runs every row twice, and a batch often shows one image in several rows. While the tower is frozen, or runs
without gradients in evaluation mode, its output depends on the pixels alone, so it is remembered by a hash of them (and
of which state of the weights it was), up to a number of bytes, the least recently used going first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

VISION_TOWER_NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "img_processor")
"""What multimodal models call their vision tower: transformers', and Phi-3-Vision."""

_IMAGES_A_CALL = 4  # of a convolutional tower: its activations stay in the processor's cache
_PATCH_CONVOLUTIONS = 2


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The outermost module with a vision tower's name, or None."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in VISION_TOWER_NAMES:
            return module
    return None


def is_convolutional(tower: nn.Module) -> bool:
    """Whether a tower convolves throughout, as FastVLM's, and not only to cut an image into patches."""
    return sum(isinstance(module, nn.Conv2d) for module in tower.modules()) > _PATCH_CONVOLUTIONS


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


class VisionCache:
    """Remembers what a frozen vision tower made of each image.

    Only towers whose first input has one row an image, and whose outputs have too, are served (LLaVA, Idefics3,
    SmolVLM, Gemma3, FastVLM); others (Qwen-VL) run as they are.

    Attributes:
        max_bytes: kept at the most; 0 switches the cache off.
        hits: images answered from the cache.
        misses: images computed.
        images_a_call: to the tower, at the most; 0 for no limit.
        memory_format: of the images given to it. A convolutional tower on the CPU gets few at a time, channels last,
            which takes half as long.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.images_a_call = 0
        self.memory_format = torch.contiguous_format
        self._bytes = 0
        self._rows: OrderedDict[bytes, tuple[type[ModelOutput], dict[str, Any], int]] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._bytes = 0

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model's vision tower, if it is frozen or only evaluated, answers from the cache."""
        tower = vision_tower(model) if self.max_bytes else None
        trained = tower is not None and not _is_fixed(tower)
        if trained:  # its weights are about to change, by an optimizer's `.data` perhaps, which no counter sees
            self.clear()
        if tower is None or trained or "forward" in vars(tower) or torch.compiler.is_compiling():
            yield
            return
        plain = tower.forward

        def remembered(pixels: Any = None, *args: Any, **kwargs: Any) -> Any:
            pixels = kwargs.pop("pixel_values") if pixels is None and "pixel_values" in kwargs else pixels
            is_batch = isinstance(pixels, Tensor) and pixels.ndim == 4 and not args
            if not is_batch or not _have_row_an_image(kwargs, len(pixels)):
                return plain(pixels, *args, **kwargs)
            convolves = pixels.device.type == "cpu" and is_convolutional(tower)
            self.images_a_call = _IMAGES_A_CALL if convolves else 0
            self.memory_format = torch.channels_last if convolves else torch.contiguous_format
            return self._answer(plain, pixels, kwargs, _version(tower))

        tower.forward = remembered  # type: ignore[method-assign]
        try:
            yield
        finally:
            del tower.forward

    def _answer(self, plain: Any, pixels: Tensor, kwargs: dict[str, Any], weights: int) -> Any:
        by_row = {name: value for name, value in sorted(kwargs.items()) if isinstance(value, Tensor)}
        others = {name: value for name, value in sorted(kwargs.items()) if name not in by_row}
        tensors = [pixels, *by_row.values()]
        shapes = [(value.dtype, value.shape[1:]) for value in tensors]
        salt = repr((others, shapes, _autocast_dtype(pixels.device.type), pixels.device, weights)).encode()
        keys = [_digest(row, salt) for row in zip(*(value.detach().cpu() for value in tensors), strict=True)]
        new = {key: index for index, key in enumerate(keys) if key not in self._rows}
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        if new:
            places = list(new.values())
            step = self.images_a_call or len(places)
            for start in range(0, len(places), step):
                part = places[start : start + step]
                own = {name: value[part] for name, value in by_row.items()}
                with torch.no_grad():
                    output = plain(pixels[part].contiguous(memory_format=self.memory_format), **others, **own)
                if not _has_row_an_image(output, len(part)):
                    return plain(pixels, **kwargs)
                for place, key in enumerate(list(new)[start : start + step]):
                    rows[key] = _row(output, place)
                    self._keep(key, rows[key])
        self.hits += len(keys) - len(new)
        self.misses += len(new)
        for key in keys:
            if key in self._rows:
                self._rows.move_to_end(key)
        kind = rows[keys[0]][0]
        return kind(**{name: _stacked([rows[key][1][name] for key in keys]) for name in rows[keys[0]][1]})

    def _keep(self, key: bytes, row: tuple[type[ModelOutput], dict[str, Any], int]) -> None:
        if row[2] > self.max_bytes // 4:
            return
        self._rows[key] = row
        self._bytes += row[2]
        while self._bytes > self.max_bytes:
            self._bytes -= self._rows.popitem(last=False)[1][2]


def _is_fixed(tower: nn.Module) -> bool:
    """Whether what the tower gives depends on the pixels alone, and no gradient is asked of it."""
    return is_frozen(tower) or not (torch.is_grad_enabled() or tower.training)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _version(tower: nn.Module) -> int:
    """Changes when the tower's weights or statistics do, in place or by new tensors; costs no look at their values."""
    tensors = [*tower.parameters(), *tower.buffers()]
    return hash(tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))


def _digest(row: tuple[Tensor, ...], salt: bytes) -> bytes:
    total = hashlib.blake2b(salt, digest_size=16)
    for value in row:
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.digest()


def _have_row_an_image(kwargs: dict[str, Any], rows: int) -> bool:
    """Whether every tensor among the arguments tells one thing an image, as a mask does."""
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return all(value.ndim > 1 and value.shape[0] == rows for value in tensors)


def _has_row_an_image(output: Any, rows: int) -> bool:
    def fits(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(fits(element) for element in value)
        return value is None or (isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows)

    return isinstance(output, ModelOutput) and all(fits(value) for value in output.values())


def _row(output: ModelOutput, place: int) -> tuple[type[ModelOutput], dict[str, Any], int]:
    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(element) for element in value)
        return None if value is None else value[place].clone()

    def size(value: Any) -> int:
        if isinstance(value, tuple):
            return sum(size(element) for element in value)
        return 0 if value is None else value.nbytes

    row = {name: cut(value) for name, value in output.items()}
    return type(output), row, sum(size(value) for value in row.values())


def _stacked(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_stacked(list(column)) for column in zip(*values, strict=True))
    return None if values[0] is None else torch.stack(values)
