"""One opener for images, whatever form they come in: every reader of this package sees the same pixels.

The rule, for files, bytes, PIL images and arrays alike:

* turned as the EXIF orientation says;
* transparency is laid onto white, palettes and colour keys included, as transformers' ``convert_to_rgb`` does;
* 16 bits a channel become 8 by leaving out the lower byte; floats in [0, 1] become bytes; other ranges are refused;
* of an animation, the first frame; everything else as Pillow converts it to RGB.

What stock code makes of a path, which is to drop transparency and to clip deep images, is
``PIL.Image.open(path).convert("RGB")`` given in place of the path.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
"""Ends of an image's name, as stock code lists them: by these ``encode`` tells a path from words."""

IMAGE_FILES = frozenset({*IMAGE_SUFFIXES, ".avif", ".tif"})
"""Ends of the names of image files, where folders and tables of one's own are looked through."""

REMOTE_PREFIXES = ("http://", "https://")
ADDRESSES = (*REMOTE_PREFIXES, "data:")
ENCODED_KEYS = frozenset({"bytes", "path"})
DATA_PREFIX = "data:image/"

_ORIENTATION = 0x0112
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
_NOT_THE_FILES_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT})
_RUN_BY_A_PROGRAM = frozenset({"EPS"})  # Pillow hands these to Ghostscript


T = TypeVar("T")


class UnreadableImageError(ValueError):
    """Something is there, but it is no image, or a damaged one."""


@dataclass(frozen=True)
class PartOfFile(ABC):
    """An image that is made from a file, or part of one, when it is opened; it is known by the file's bytes."""

    file: str | bytes

    @property
    @abstractmethod
    def part(self) -> str:
        """Which part of the file it is, and how it is made; empty where it is all of it, as it is."""

    @abstractmethod
    def open(self) -> Image.Image:
        """Make the image, in RGB; one that cannot be made is an :class:`UnreadableImageError`."""

    def size(self) -> tuple[int, int]:
        """Width and height that it will have."""
        return self.open().size


class SizeOfImage(Image.Image):
    """Stands for an image of which only the size is asked: no pixels are behind it.

    >>> SizeOfImage((640, 480)).resize((32, 24)).size
    (32, 24)
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size = "RGB", size  # as Pillow's own plugins set them

    def resize(self, size: Any, *_: Any, **__: Any) -> SizeOfImage:  # type: ignore[override]
        """The same at another size."""
        return SizeOfImage(tuple(size))


def is_encoded(item: Mapping[str, Any]) -> bool:
    """Whether this is how ``datasets`` stores an image that is not decoded."""
    return bool(item) and item.keys() <= ENCODED_KEYS


def bytes_or_path(stored: Mapping[str, Any]) -> Any:
    """What such an image is known by: its bytes, else its path."""
    return stored["bytes"] if stored.get("bytes") is not None else stored.get("path")


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Decode a file, or the bytes of one, to RGB by the rule of this module; ``name`` is what errors call it.

    Raises:
        FileNotFoundError: There is no such file; folders and special files (pipes, devices) are none.
        UnreadableImageError: It holds no image, a damaged one, or one whose numbers have no known range.
        OSError: The machine has no more files or memory, which says nothing of the image.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("LA", (1, 1), (0, 0)).save(buffer, "png")  # black, but nothing of it shows
        >>> open_image(buffer.getvalue()).getpixel((0, 0))
        (255, 255, 255)
    """
    return _read(source, name, _whole)


def image_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height of what :func:`open_image` makes of a file or bytes, told by the header; same errors.

    >>> buffer, exif = io.BytesIO(), Image.Exif()
    >>> exif[0x0112] = 6  # on its side
    >>> Image.new("RGB", (3, 2)).save(buffer, "jpeg", exif=exif)
    >>> image_size(buffer.getvalue()), open_image(buffer.getvalue()).size
    ((2, 3), (2, 3))
    """
    return _read(source, name, shown_size)


def shown_size(image: Image.Image, _: str = "") -> tuple[int, int]:
    """Width and height of an image, turned as its orientation says, without decoding it."""
    hides_it = (
        image.format == "PNG" and "exif" not in image.info
    )  # Pillow decodes such a file to look behind its pixels
    turned = not hides_it and image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    return (image.height, image.width) if turned else (image.width, image.height)


def _whole(image: Image.Image, name: str) -> Image.Image:
    seen = as_rgb(image, name)
    return seen.copy() if seen is image else seen  # a plain image, which holds no file


def _read(source: str | Path | bytes, name: str | None, make: Callable[[Image.Image, str], T]) -> T:
    """What is made of an image's file or bytes; whatever is wrong with them is said in one way."""
    if isinstance(source, bytes):
        name = name or "bytes"
    else:
        name = name or str(source)
        if not is_file(source):
            raise FileNotFoundError(
                f"There is no image file {name!r}. Check the path and the folder it is relative to."
            )
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in _RUN_BY_A_PROGRAM:
                raise ValueError(f"{image.format} files are programs")  # noqa: TRY301 (worded below)
            return make(image, name)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they come upon
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILES_FAULT:
            raise
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(f"Cannot read an image from {name}: {reason}. Replace or remove it.") from error


def as_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Bring a PIL image to RGB by the rule of this module; one that is there already is returned itself.

    >>> as_rgb(Image.new("I;16", (1, 1), 0x8000)).getpixel((0, 0))
    (128, 128, 128)
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_deep(image, name)
    if image.mode == "F":
        return Image.fromarray(_bytes_of(np.asarray(image), name)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        seen = image.convert("LA") if image.mode == "La" else image
        seen = seen.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(array: np.ndarray | torch.Tensor, name: str = "the image") -> Image.Image:
    """Make an RGB image of numbers ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``, by the rule of this module.

    C is 1, 3, or 4 (transparency). Floats lie in [0, 1], integers in [0, 255], or in [0, 65535] if their type is
    unsigned of 16 bits; other ranges, NaN included, are refused.

    >>> from_array(np.full((3, 1, 2), 0.5)).size
    (2, 1)
    """
    if isinstance(array, torch.Tensor):
        tensor = array.detach().cpu()
        values = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()  # numpy has no bfloat16
    else:
        values = np.asarray(array)
    if values.ndim == 2:
        values = values[:, :, None]
    channels = {1, 3, 4}
    if values.ndim != 3 or values.size == 0 or not channels & {values.shape[0], values.shape[2]}:
        raise ValueError(f"{name}: an array of shape {tuple(array.shape)} is no image. Give (H, W, 3) or (3, H, W).")
    if values.shape[2] not in channels:
        values = values.transpose(1, 2, 0)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name}: an array of {values.dtype} is no image. Give bytes, or floats in [0, 1].")
    if (values.dtype.kind, values.dtype.itemsize) == ("u", 2):  # in either order of bytes
        values = (values >> 8).astype(np.uint8)
    elif values.dtype.kind in "fb":
        values = _bytes_of(values.astype(np.float32), name)
    elif not (values.min() >= 0 and values.max() <= 255):
        raise ValueError(
            f"{name}: an image of integers must lie in [0, 255], got {values.min()} to {values.max()}. Rescale it, or "
            "give a PIL image."
        )
    pixels = np.ascontiguousarray(values.astype(np.uint8))
    return as_rgb(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), name)


def check_pixels(width: int, height: int) -> None:
    """Refuse the size of a decompression bomb, as Pillow does: above twice ``PIL.Image.MAX_IMAGE_PIXELS``."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > 2 * most:
        raise UnreadableImageError(
            f"{width} x {height} pixels are more than {2 * most}, so it may be a decompression bomb; if it is "
            "none, raise `PIL.Image.MAX_IMAGE_PIXELS`"
        )


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file; a name too long, or with a null byte, has none."""
    try:
        return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for a name too long)
    except ValueError:  # of a surrogate
        return False


def is_image_file(path: str) -> bool:
    """Whether there is a file that Pillow recognises by its content, which is not decoded.

    >>> is_image_file("a sentence")
    False
    """
    if not is_file(path):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.format not in _RUN_BY_A_PROGRAM
    except Image.DecompressionBombError:
        return True  # too large a one, as is said when it is opened
    except Exception:  # noqa: BLE001 (see `open_image`)
        return False


def stands_for_image(text: str) -> bool:
    """Whether ``encode`` opens a bare string as an image: a data URI, an image's address, or a file that is an image.

    A file is known by its content; stock code goes by a list of suffixes, and takes the path of any other image, such
    as ``a.tif`` or ``a.avif``, for words.

    >>> stands_for_image("https://a.org/b.png?size=2"), stands_for_image("a picture called b.png")
    (True, False)
    """
    if text.startswith(DATA_PREFIX):
        return True
    if is_remote(text):
        return " " not in text and _address_path(text).endswith(IMAGE_SUFFIXES)
    if text.lower().endswith(IMAGE_SUFFIXES):
        return is_file(text)  # damaged or not: what is wrong with it is said when it is opened
    return is_image_file(text)


def is_remote(text: str) -> bool:
    """Whether a string is an address of the web, however its scheme is spelled."""
    return text[:8].lower().startswith(REMOTE_PREFIXES)


def _address_path(address: str) -> str:
    try:
        return urlparse(address).path.lower()
    except ValueError:  # no address after all, e.g. "https://[x]"
        return ""


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    """Scale 16 bits to 8, in whichever of Pillow's modes they came; a colour that stands for nothing becomes white."""
    values = np.asarray(image).astype(np.int64)
    if values.size and not (values.min() >= 0 and values.max() <= 0xFFFF):
        raise UnreadableImageError(
            f"{name} has pixels of {values.min()} to {values.max()} in mode {image.mode}, where 16 bits hold 0 to "
            "65535. Rescale them to bytes first."
        )
    pixels = (values >> 8).astype(np.uint8)
    key: Any = image.info.get("transparency")
    if isinstance(key, int):
        pixels = np.where(values == key, np.uint8(255), pixels)
    return Image.fromarray(pixels).convert("RGB")


def _bytes_of(values: np.ndarray, name: str) -> np.ndarray:
    """Floats in [0, 1] as bytes."""
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # written so that NaN is refused too
        raise UnreadableImageError(
            f"{name}: an image of floats must lie in [0, 1], got {values.min()} to {values.max()}. Rescale it, or "
            "give a PIL image of bytes."
        )
    return (values * 255.0).round().astype(np.uint8)
