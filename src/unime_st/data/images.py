"""Opening the images of a data set: inside its folder only, late, and at one resolution policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

Cell = Mapping[str, Any]


def resolve_image(image_root: str | Path, relative: str | Path, *, must_exist: bool = True) -> Path:
    """Find an image below a folder, and nowhere else: data sets come from strangers.

    Args:
        image_root: The folder.
        relative: Path below it, as a row gives it.
        must_exist: Whether a missing file is an error here.

    Returns:
        The absolute path, symbolic links followed.

    Raises:
        ValueError: When the path is absolute, climbs out by ``..`` or leaves the folder through a symbolic link.
        FileNotFoundError: When no such file exists.

    Example:
        >>> resolve_image("images", "../secret.png")
        Traceback (most recent call last):
        ...
        ValueError: Image path '../secret.png' leaves the image folder 'images'. ...
    """
    name = str(relative)
    root = Path(image_root).resolve()
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    path = root / name
    if absolute or ".." in PurePosixPath(name.replace("\\", "/")).parts or not path.resolve().is_relative_to(root):
        raise ValueError(
            f"Image path {name!r} leaves the image folder {str(image_root)!r}. Paths must stay below it, symbolic "
            "links included; copy the image inside or give another `image_root`."
        )
    path = path.resolve()
    if must_exist and not path.is_file():
        raise FileNotFoundError(
            f"There is no image {name!r} below {str(image_root)!r}. Unpack the data set's images there, or give "
            "`image_root`."
        )
    return path


class ItemReader:
    """Turns stored cells into inputs of a model: opens the image, and leaves out what a cell does not have.

    It is the transform of the data sets made here, so it runs in the data loader's workers, and may be called on a
    single cell too.

    Args:
        image_root: Folder of the images.
        open_images: Whether images are opened; else a cell holds the image's absolute path.
        max_pixels: Shrink an image with more pixels than this to it, keeping its shape.
        image_size: Force every image to this side, or (width, height), as the published evaluations do.
        origin: Tells where an image path comes from, for error messages; called only when reading fails.

    Raises:
        ValueError: When both resolutions are given or one is not positive; on a cell, when an image cannot be read or
            lies outside the folder.
        FileNotFoundError: On a cell, when its image is missing.

    Example:
        >>> reader = ItemReader("images")
        >>> reader({"anchor": [{"image": None, "text": "a cat"}], "label": [7]})
        {'anchor': [{'text': 'a cat'}], 'label': [7]}
    """

    def __init__(
        self,
        image_root: str | Path,
        *,
        open_images: bool = True,
        max_pixels: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        origin: Callable[[str], str] | None = None,
    ) -> None:
        if max_pixels is not None and image_size is not None:
            raise ValueError("Give `max_pixels` or `image_size`, not both: one keeps an image's shape, the other not.")
        if max_pixels is not None and max_pixels < 1:
            raise ValueError(f"`max_pixels={max_pixels}`, but an image needs at least one pixel.")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"`image_size={image_size}`, but both sides must be at least 1.")
        self.image_root = Path(image_root)
        self.open_images = open_images
        self.max_pixels = max_pixels
        self.origin = origin
        self._known: dict[str, str] = {}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch of columns; columns that hold no cells pass through."""
        return {name: [self._value(value) for value in values] for name, values in batch.items()}

    def read(self, cell: Cell) -> dict[str, Any]:
        """Read one cell ``{"image": relative path or None, "text": str or None}``."""
        item: dict[str, Any] = {}
        if cell.get("image"):
            item["image"] = self._image(cell["image"])
        if cell.get("text"):
            item["text"] = cell["text"]
        return item

    def read_absolute(self, item: Any) -> Any:
        """Open and resize the images of an input given by absolute paths, which were checked before."""
        if not isinstance(item, Mapping) or not isinstance(item.get("image"), str):
            return item
        return {**item, "image": self._open(item["image"])}

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self.read(value)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return [self.read(cell) for cell in value]
        return value

    def path(self, relative: str, *, must_exist: bool = True) -> str:
        """Find an image's absolute path, see :func:`resolve_image`; errors say where the path comes from."""
        if relative not in self._known:
            try:
                self._known[relative] = str(resolve_image(self.image_root, relative, must_exist=must_exist))
            except (ValueError, FileNotFoundError) as error:
                raise self._located(error, relative) from error
        return self._known[relative]

    def _image(self, relative: str) -> Any:
        path = self.path(relative, must_exist=self.open_images)
        if not self.open_images:
            return path
        try:
            return self._open(path)
        except (ValueError, FileNotFoundError) as error:
            raise self._located(error, relative) from error

    def _located(self, error: ValueError | FileNotFoundError, relative: str) -> Exception:
        return type(error)(f"{self.origin(relative)}: {error}") if self.origin is not None else error

    def _open(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Image {path} has gone since it was first read.") from error
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"Cannot read image {path}: {error}. Replace the file, or remove its rows.") from error
        return self._resize(image)

    def _resize(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.image_size is not None:
            size = self.image_size
        elif self.max_pixels is not None and width * height > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (width * height))
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
        else:
            return image
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
