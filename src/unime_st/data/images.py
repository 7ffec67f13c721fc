"""Opening the images of a data set: inside its folder only, late, and at one resolution policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from unime_st.columns import SUBSET
from unime_st.data.bad_images import BadImages, Place

Cell = Mapping[str, Any]

_KNOWN_PATHS = 65536


class UnreadableImageError(ValueError):
    """A file is there, but is no image, or a damaged one."""


_BAD_IMAGE = (FileNotFoundError, UnreadableImageError)


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
    single cell too. The column ``subset`` is dropped: it is for the batch sampler.

    With ``max_bad_images`` a row with an image that is missing or damaged is replaced as a whole by a copy of the next
    good row of its batch (the losses know equal contents, so a copy is no false negative), and the image is written
    down: see :class:`~unime_st.data.bad_images.BadImages`. A row that is drawn alone shows a grey picture instead.

    Args:
        image_root: Folder of the images.
        open_images: Whether images are opened; else a cell holds the image's absolute path.
        max_pixels: Shrink an image with more pixels than this to it, keeping its shape.
        image_size: Force every image to this side, or (width, height), as the published evaluations do.
        origin: Tells where an image path comes from, for error messages; called only when reading fails.
        max_bad_images: Different images that may be missing or damaged; 0 makes the first an error.
        bad_images_log: File they are written to; needed with ``max_bad_images``.

    Raises:
        ValueError: When both resolutions are given or one is not positive, or ``bad_images_log`` is missing; on a cell,
            when an image cannot be read or lies outside the folder; on a batch, when none of its rows is good or there
            are more bad images than allowed.
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
        origin: Callable[[str], Place] | None = None,
        max_bad_images: int = 0,
        bad_images_log: str | Path | None = None,
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
        self.bad_images: BadImages | None = None
        if max_bad_images:
            if bad_images_log is None:
                raise ValueError(
                    f"`max_bad_images={max_bad_images}` needs `bad_images_log`: the file that names the images, which "
                    "all workers and resumed runs count by."
                )
            self.bad_images = BadImages(bad_images_log, max_bad_images)
        self._known: dict[str, str] = {}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch of columns; columns that hold no cells pass through."""
        columns = {name: values for name, values in batch.items() if name != SUBSET}
        if self.bad_images is not None and columns:
            columns = self._replace_bad_rows(columns, batch.get(SUBSET))
        return {name: [self._value(value) for value in values] for name, values in columns.items()}

    def _replace_bad_rows(self, columns: dict[str, list[Any]], subsets: list[str] | None) -> dict[str, list[Any]]:
        """Open the images of all rows; each row with a bad one becomes a copy of the next row that has none."""
        rows = len(next(iter(columns.values())))
        opened: dict[str, Any] = {}
        good = [
            self._open_row([values[row] for values in columns.values()], opened, subsets[row] if subsets else None)
            for row in range(rows)
        ]
        if rows == 1 and not good[0]:  # the Trainer draws single rows for the model card
            opened |= {relative: _placeholder() for relative, image in opened.items() if image is None}
            good = [True]
        if rows and not any(good):
            raise ValueError(
                f"None of the {rows} rows of a batch has readable images, so there is nothing to replace them by. "
                "Larger batches make that rarer; the images are named above, and in the log of bad images."
            )
        whole = [row for row in range(rows) if good[row]]
        chosen = [next((other for other in whole if other >= row), whole[0]) for row in range(rows)]
        return {name: [_with_images(values[row], opened) for row in chosen] for name, values in columns.items()}

    def _open_row(self, values: list[Any], opened: dict[str, Any], subset: str | None) -> bool:
        """Open what a row shows that is not open yet; tells whether all of it could be read."""
        good = True
        for relative in (cell["image"] for value in values for cell in _cells_of(value) if cell.get("image")):
            if relative not in opened:
                try:
                    opened[relative] = self._read_image(relative)
                except _BAD_IMAGE as error:
                    opened[relative] = None
                    self.report(relative, error, subset)
                except ValueError as error:
                    raise self._located(error, relative) from error
            good = good and opened[relative] is not None
        return good

    def report(self, relative: str, error: Exception, subset: str | None = None) -> None:
        """Write a bad image down, see :class:`~unime_st.data.bad_images.BadImages`; an error when none is allowed."""
        if self.bad_images is None:
            raise self._located(error, relative) from error

        def place() -> Place:
            found = Place("unknown") if self.origin is None else self.origin(relative)
            return found if subset in (None, found.dataset) else Place(str(subset))

        self.bad_images.report(relative, error, place)

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
        try:
            return self._resolve(relative, must_exist=must_exist)
        except (ValueError, FileNotFoundError) as error:
            raise self._located(error, relative) from error

    def check(self, relative: str, *, by_opening: bool = False) -> Exception | None:
        """What is wrong with an image, if anything: missing or, ``by_opening`` it, damaged.

        Raises:
            ValueError: When the path leaves the folder.
        """
        try:
            path = self._resolve(relative)
            if by_opening:
                self._open(path)
        except _BAD_IMAGE as error:
            return error
        except ValueError as error:
            raise self._located(error, relative) from error
        return None

    def _resolve(self, relative: str, *, must_exist: bool = True) -> str:
        path = self._known.get(relative)
        if path is None:
            path = str(resolve_image(self.image_root, relative, must_exist=must_exist))
            if len(self._known) >= _KNOWN_PATHS:  # else every worker would come to hold every path of a large set
                self._known.clear()
            self._known[relative] = path
        return path

    def _image(self, image: Any) -> Any:
        if not isinstance(image, str):
            return image
        try:
            return self._read_image(image)
        except (ValueError, FileNotFoundError) as error:
            raise self._located(error, image) from error

    def _read_image(self, relative: str) -> Any:
        path = self._resolve(relative, must_exist=self.open_images)
        return self._open(path) if self.open_images else path

    def _located(self, error: Exception, relative: str) -> Exception:
        return type(error)(f"{self.origin(relative)}: {error}") if self.origin is not None else error

    def _open(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Image {path} has gone since it was first read.") from error
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(
                f"Cannot read image {path}: {error}. Replace the file, or remove its rows."
            ) from error
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


def _placeholder() -> Image.Image:
    return Image.new("RGB", (224, 224), "grey")


def _cells_of(value: Any) -> Iterator[Cell]:
    """Cells of a row's value: itself, those of a list, or none."""
    for cell in value if isinstance(value, list) else [value]:
        if isinstance(cell, Mapping):
            yield cell


def _with_images(value: Any, opened: Mapping[str, Any]) -> Any:
    """Put opened images into a row's cells."""
    if isinstance(value, list):
        return [_with_images(cell, opened) for cell in value]
    if isinstance(value, Mapping) and value.get("image"):
        return {**value, "image": opened[value["image"]]}
    return value
