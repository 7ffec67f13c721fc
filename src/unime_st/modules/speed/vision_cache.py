"""Features of a fixed vision tower, kept: each distinct image is computed once.

GradCache runs every row twice, and a batch often shows one image in several rows. While the tower is frozen, or runs
without gradients in evaluation mode, its output depends on the pixels alone, so it is remembered under a hash of them
and of the state of the weights. Within a training step everything is kept; between steps up to a number of bytes, and
the least recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from unime_st.identity.features import mix64

VISION_TOWER_NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "img_processor")
"""The names that multimodal models of transformers, and Phi-3-Vision, give their vision tower."""

_IMAGES_A_CALL = 4  # of a convolutional tower, so that its activations stay in the processor's cache
_PATCH_CONVOLUTIONS = 2
_HASHED_AT_ONCE = 2**22  # this many numbers


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The outermost module with a vision tower's name, or None."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in VISION_TOWER_NAMES:
            return module
    return None


def is_convolutional(tower: nn.Module) -> bool:
    """Whether a tower convolves throughout, as FastVLM's does, and not only to cut an image into patches."""
    return sum(isinstance(module, nn.Conv2d) for module in tower.modules()) > _PATCH_CONVOLUTIONS


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


Key = tuple[Any, ...]
Calls = list[list[Key]]  # the images of each call of the tower


@dataclass
class Answered:
    """The calls of the tower that were answered from the cache, in order; None where one was not."""

    calls: Calls | None = field(default_factory=list)


class VisionCache:
    """Remembers the output of a frozen vision tower for each image.

    It serves towers whose first input and outputs have one row per image, and those that take the patches of all images
    one after the other, with ``grid_thw`` (Qwen-VL). Of the states of all layers, which LLaVA's towers return, it keeps
    those that the model reads.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes  # bound on what is kept outside of `holding`; 0 switches the cache off
        self.hits = 0  # images answered from the cache
        self.misses = 0  # images computed
        # A convolutional tower on the CPU gets few images per call, channels last, which takes half as long.
        self.images_a_call = 0  # 0 for no limit
        self.memory_format = torch.contiguous_format
        self._bytes = 0
        self._held = False
        self._step_version: int | None = None  # sharded weights move in each pass, but do not change in a step
        self._rows: OrderedDict[Key, _Kept] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._bytes = 0

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within this context, a training step, nothing is forgotten: its second pass needs all of the first's."""
        self._held, self._step_version = True, None
        try:
            yield
        finally:
            self._held = False
            self._trim()

    def keeps(self, model: nn.Module) -> bool:
        """Whether this is a training step in which all features of a model's vision tower are kept."""
        tower = vision_tower(model) if self._held and self.max_bytes else None
        return tower is not None and is_frozen(tower)

    def has(self, calls: Calls) -> bool:
        """Whether the answers to some calls of the tower are kept, and for as long as the step lasts."""
        return self._held and all(key in self._rows for keys in calls for key in keys)

    @contextmanager
    def serving(self, model: nn.Module, told: Calls | None = None) -> Iterator[Answered]:
        """Within this context the model's vision tower, if it is frozen or only evaluated, answers from the cache.

        What is yielded tells the keys of its calls. Given those of the same calls before, ``told``, of which all
        answers are kept (:meth:`has`), no pixels are looked at.
        """
        answered = Answered()
        tower = vision_tower(model) if self.max_bytes else None
        trained = tower is not None and not _is_fixed(tower)
        if trained:  # its weights are about to change, by an optimizer's `.data` perhaps, which no counter sees
            self.clear()
        if tower is None or trained or "forward" in vars(tower) or torch.compiler.is_compiling():
            answered.calls = None
            yield answered
            return
        known = None if told is None else iter(told)
        plain = tower.forward
        if not self._held or self._step_version is None:
            self._step_version = _version(tower)
        version = self._step_version
        layers = _layers_read(model)

        def remembered(pixels: Any = None, *args: Any, **kwargs: Any) -> Any:
            pixels = kwargs.pop("pixel_values") if pixels is None and "pixel_values" in kwargs else pixels
            images = None if args or not isinstance(pixels, Tensor) else _Images.of(pixels, kwargs)
            if images is None:
                answered.calls = None
                return plain(pixels, *args, **kwargs)
            convolves = pixels.device.type == "cpu" and is_convolutional(tower)
            self.images_a_call = _IMAGES_A_CALL if convolves else 0
            self.memory_format = torch.channels_last if convolves else torch.contiguous_format
            keys = images.keys(version) if known is None else next(known, [])
            if known is not None and not (len(keys) == len(images.sizes) and self.has([keys])):
                raise RuntimeError("A vision tower was called otherwise than in the first pass over the same rows.")
            answer = self._answer(plain, images, keys, layers)
            if answer is None:
                answered.calls = None
                return plain(pixels, **kwargs)
            if answered.calls is not None:
                answered.calls.append(keys)
            return answer

        tower.forward = remembered  # type: ignore[method-assign]
        try:
            yield answered
        finally:
            del tower.forward

    def _answer(
        self, plain: Callable[..., Any], images: _Images, keys: list[Key], layers: Collection[int] | None
    ) -> Any:
        """The tower's output for the images, or None when it cannot be cut into images."""
        new = {key: number for number, key in enumerate(keys) if key not in self._rows}
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        if new:
            numbers = list(new.values())
            step = self.images_a_call or len(numbers)
            for start in range(0, len(numbers), step):
                part = numbers[start : start + step]
                pixels, arguments = images.some(part)
                if pixels.ndim == 4:
                    pixels = pixels.contiguous(memory_format=self.memory_format)
                with torch.no_grad():
                    output = plain(pixels, **arguments)
                kept = _cut(output, [images.sizes[number] for number in part], layers, packed=images.packed)
                if kept is None:
                    return None
                for key, row in zip(list(new)[start : start + step], kept, strict=True):
                    rows[key] = row
                    self._keep(key, row)
        self.hits += len(keys) - len(new)
        self.misses += len(new)
        for key in keys:
            if key in self._rows:
                self._rows.move_to_end(key)
        kind = rows[keys[0]].kind
        return kind(**{name: _joined([rows[key].values[name] for key in keys]) for name in rows[keys[0]].values})

    def _keep(self, key: Key, row: _Kept) -> None:
        if row.nbytes > self.max_bytes // 4 and not self._held:
            return
        self._rows[key] = row
        self._bytes += row.nbytes
        self._trim()

    def _trim(self) -> None:
        while self._bytes > self.max_bytes and not self._held:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes


def _is_fixed(tower: nn.Module) -> bool:
    """Whether the tower's output depends on the pixels alone, and no gradient is asked of it."""
    return is_frozen(tower) or not (torch.is_grad_enabled() or tower.training)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _version(tower: nn.Module) -> int:
    """A number that changes when the tower's tensors change, in place or by new ones, without reading their values."""
    tensors = [*tower.parameters(), *tower.buffers()]
    return hash(tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))


class _Kept(NamedTuple):
    """A tower's output for one image."""

    kind: type[ModelOutput]
    values: dict[str, Any]
    nbytes: int


@dataclass(frozen=True)
class _Images:
    """The arguments of a tower's call, image by image."""

    pixels: Tensor  # one row per image, or the patches of all
    by_image: dict[str, Tensor]  # further tensors with one row per image
    others: dict[str, Any]  # further arguments, the same for all
    sizes: list[int]  # the number of rows of `pixels` of each image
    packed: bool  # whether the rows are patches

    @classmethod
    def of(cls, pixels: Tensor, arguments: dict[str, Any]) -> _Images | None:
        """Take a call apart, or return None when its tensors do not have one row per image."""
        tensors = {name: value for name, value in sorted(arguments.items()) if isinstance(value, Tensor)}
        others = {name: value for name, value in sorted(arguments.items()) if name not in tensors}
        grid = tensors.get("grid_thw")
        if pixels.ndim == 2 and grid is not None and len(tensors) == 1:
            sizes = grid.prod(dim=1).tolist()
            return cls(pixels, tensors, others, sizes, packed=True) if sum(sizes) == len(pixels) and sizes else None
        fits = all(value.ndim > 1 and len(value) == len(pixels) for value in tensors.values())
        if pixels.ndim != 4 or not fits or not len(pixels):
            return None
        return cls(pixels, tensors, others, [1] * len(pixels), packed=False)

    def keys(self, weights: int) -> list[Key]:
        """What identifies each image: two 64-bit hashes of each tensor, computed where it is, and all else."""
        rows = _hashes(self.pixels)
        order = torch.arange(len(rows), device=rows.device)
        if self.packed:  # places count from the image's first patch
            sizes = torch.tensor(self.sizes, device=rows.device)
            owner = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), sizes)
            places = order - (sizes.cumsum(0) - sizes)[owner]
            mixed = mix64(rows + mix64(places + 1)[:, None])
            rows = rows.new_zeros(len(sizes), 2).index_add_(0, owner, mixed)
        hashes = torch.cat([rows, *(_hashes(value) for value in self.by_image.values())], dim=1).tolist()
        shapes = [(value.dtype, value.shape[1:]) for value in (self.pixels, *self.by_image.values())]
        autocast = _autocast_dtype(self.pixels.device.type)
        common = (repr((self.others, shapes, autocast, self.pixels.device)), weights)
        return [(*row, size, *common) for row, size in zip(hashes, self.sizes, strict=True)]

    @torch.compiler.disable  # of a compiled model: its guards fail on arrays in inference mode
    def some(self, numbers: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
        ends = np.cumsum(self.sizes)
        rows = np.concatenate([np.arange(ends[number] - self.sizes[number], ends[number]) for number in numbers])
        chosen = torch.as_tensor(list(numbers), device=self.pixels.device)
        own = {name: value[chosen.to(value.device)] for name, value in self.by_image.items()}
        return self.pixels[torch.from_numpy(rows).to(self.pixels.device)], {**self.others, **own}


def _hashes(rows: Tensor) -> Tensor:
    """Two 64-bit hashes of each row's bits, ``(N, 2)``: sums with pseudorandom odd weights."""
    rows = rows.detach().contiguous().flatten(1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = rows.view(kinds[rows.element_size()])
    places = torch.arange(bits.shape[1], device=bits.device)
    weights = [mix64(places + start) | 1 for start in (1, 2**40)]
    step = max(1, _HASHED_AT_ONCE // max(1, bits.shape[1]))
    # A few rows at a time, since as 64-bit numbers they take at least twice the memory.
    parts = (part.long() for part in bits.split(step))
    return torch.cat([torch.stack([(part * weight).sum(dim=1) for weight in weights], dim=1) for part in parts])


def _layers_read(model: nn.Module) -> list[int] | None:
    """The tower's layers whose states a LLaVA-like model reads, or None when it does not say."""
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    return None if layers is None else [layers] if isinstance(layers, int) else list(layers)


def _cut(output: Any, sizes: Sequence[int], layers: Collection[int] | None, *, packed: bool) -> list[_Kept] | None:
    """A tower's output image by image, or None when it cannot be cut."""
    if not isinstance(output, ModelOutput):
        return None
    values = dict(output.items())
    if packed:
        values["last_hidden_state"] = None  # it has every patch, while models read the merged ones
    states = values.get("hidden_states")
    if layers is not None and isinstance(states, tuple):
        read = {layer % len(states) for layer in layers}
        values["hidden_states"] = tuple(state if number in read else None for number, state in enumerate(states))
    total, ends = sum(sizes), np.cumsum(sizes).tolist()
    if not all(_fits(value, total, packed) for value in values.values()):
        return None
    kept = []
    for size, end in zip(sizes, ends, strict=True):
        own = {name: _piece(value, total, end - size, end) for name, value in values.items()}
        kept.append(_Kept(type(output), own, sum(_nbytes(value) for value in own.values())))
    return kept


def _fits(value: Any, total: int, packed: bool) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_fits(element, total, packed) for element in value)
    if not isinstance(value, Tensor):
        return value is None
    return value.ndim > 0 and (len(value) == total or (packed and len(value) > 0 and total % len(value) == 0))


def _piece(value: Any, total: int, start: int, end: int) -> Any:
    """The part of an output for some rows of the input; packed outputs may have merged several rows into one."""
    if isinstance(value, (tuple, list)):
        return type(value)(_piece(element, total, start, end) for element in value)
    if value is None:
        return None
    merged = total // len(value)
    return value[start // merged : end // merged].clone()


def _nbytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(element) for element in value)
    return 0 if value is None else value.nbytes


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], (tuple, list)):
        return type(values[0])(_joined(list(column)) for column in zip(*values, strict=True))
    return None if values[0] is None else torch.cat(values)
