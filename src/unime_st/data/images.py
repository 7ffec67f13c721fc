"""Opening the images of a data set: inside its folder only, late, and at one resolution policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unime_st.arguments import require_number
from unime_st.columns import SUBSET
from unime_st.data.bad_images import BadImages, Place
from unime_st.data.stored_images import Stored, identity, sides_of, stored_path
from unime_st.images import (
    ENCODED_KEYS,
    PartOfFile,
    UnreadableImageError,
    bytes_or_path,
    image_size,
    is_encoded,
    open_image,
)
from unime_st.paths import resolve_below

__all__ = ["ItemReader", "UnreadableImageError", "resolve_image"]

Cell = Mapping[str, Any]

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
        ValueError: When the path leads out of the folder, by ``..``, a symbolic link or otherwise.
        FileNotFoundError: When no such file exists.

    Example:
        >>> resolve_image("images", "../secret.png")
        Traceback (most recent call last):
        ...
        ValueError: Image path '../secret.png' leaves the image folder 'images'. ...
    """
    return resolve_below(image_root, relative, must_exist=must_exist)


@dataclass(frozen=True)
class Resolution:
    """How large images are shown, see :class:`ItemReader`."""

    max_pixels: int | None = None
    image_size: tuple[int, int] | None = None
    max_aspect_ratio: float | None = None

    def of(self, size: tuple[int, int], name: str) -> tuple[int, int]:
        """Width and height that an image of this size is shown at; a shape out of bounds is refused."""
        width, height = size
        if self.image_size is not None:
            size = self.image_size
        elif self.max_pixels is not None and width * height > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (width * height))
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
        if self.max_aspect_ratio is not None and max(size) > self.max_aspect_ratio * min(size):
            raise UnreadableImageError(
                f"Cannot use image {name}: at {size[0]} x {size[1]} one side is longer than the other by more than "
                f"`max_aspect_ratio={self.max_aspect_ratio:g}`, which Qwen's processors refuse. Crop or remove it."
            )
        return size


@dataclass(frozen=True)
class LateImage(PartOfFile):
    """An image of a data set that is opened when a model is shown it, and known by the bytes of its file.

    Args:
        file: The file's path, or its bytes.
        name: What errors call it.
        resolution: How large it is shown.
    """

    name: str
    resolution: Resolution

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def part(self) -> str:
        """How it is resized, if it is."""
        shown = self.resolution
        resized = shown.max_pixels is not None or shown.image_size is not None
        return f"{shown.max_pixels} pixels, {shown.image_size}" if resized else ""

    def open(self) -> Image.Image:
        """Decode and resize it.

        Raises:
            UnreadableImageError: It is no image, a damaged one, or of a shape that cannot be used.
        """
        image = self._read(open_image)
        size = self.resolution.of(image.size, self.name)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def size(self) -> tuple[int, int]:
        """Width and height that it will have, by its header; errors as of :meth:`open`, but for damage behind it."""
        return self.resolution.of(self._read(image_size), self.name)

    def _read(self, read: Callable[[str | bytes, str], Any]) -> Any:
        try:
            return read(self.file, self.name)
        except UnreadableImageError as error:
            cause = error.__cause__ or error
            reason = (str(cause) or type(cause).__name__).partition(" <_io.")[0]  # a buffer's address says nothing
            raise UnreadableImageError(
                f"Cannot read image {self.name}: {reason}. Replace the file, or remove its rows."
            ) from error


class ItemReader:
    """Turns stored cells into inputs of a model: opens the image, and leaves out what a cell does not have.

    It is the transform of the data sets made here, so it runs in the data loader's workers, and may be called on a
    single cell too; :func:`~unime_st.data.with_images` puts it on a data set of one's own. A cell is
    ``{"image", "text"}`` or an image alone, stored as a path below the folder or, as ``datasets`` stores images, as
    ``{"bytes", "path"}``. Strings in columns are texts, and pass through like all else. The column ``subset`` is
    dropped: it is for the batch sampler.

    With ``max_bad_images`` a row with an image that is missing or damaged is replaced as a whole by a copy of the next
    good row of its batch (the losses know equal contents, so a copy is no false negative), and the image is written
    down: see :class:`~unime_st.data.bad_images.BadImages`. A row that is drawn alone shows a grey picture instead.

    Args:
        image_root: Folder of the images; None when all are stored in the data set, and a path is an error.
        open_images: Whether images are opened; else a cell holds the image's absolute path.
        late_images: Give images that are opened only when a model is shown them, in place of opened ones: for an
            encoder with ``late_media``, which opens those of a mini-batch at a time. Their headers are read here;
            damage behind these is an error in the step, or with ``max_bad_images`` is looked for here by decoding each
            image once more. Equal images are told by their files' bytes, not by their pixels.
        max_pixels: Shrink an image with more pixels than this to it, keeping its shape.
        image_size: Force every image to this side, or (width, height), as the published evaluations do.
        max_aspect_ratio: An image with a side longer than the other by more than this counts as damaged: Qwen's
            processors take 200 at most. None takes all.
        origin: Tells where a stored image comes from, for error messages; called only when reading fails.
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
        image_root: str | Path | None = None,
        *,
        open_images: bool = True,
        late_images: bool = False,
        max_pixels: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        max_aspect_ratio: float | None = 200.0,
        origin: Callable[[Stored], Place] | None = None,
        max_bad_images: int = 0,
        bad_images_log: str | Path | None = None,
    ) -> None:
        if max_pixels is not None and image_size is not None:
            raise ValueError("Give `max_pixels` or `image_size`, not both: one keeps an image's shape, the other not.")
        require_number("max_pixels", max_pixels, whole=False, optional=True)
        if max_pixels is not None and not max_pixels >= 1:
            raise ValueError(f"`max_pixels={max_pixels}`, but an image needs at least one pixel.")
        sides = None if image_size is None else sides_of(image_size)
        require_number("max_aspect_ratio", max_aspect_ratio, whole=False, optional=True)
        if max_aspect_ratio is not None and not max_aspect_ratio >= 1:
            raise ValueError(f"`max_aspect_ratio={max_aspect_ratio}`, but a square has 1; None takes all images.")
        require_number("max_bad_images", max_bad_images)
        self.image_root = None if image_root is None else Path(image_root)
        self.open_images = open_images
        self.late_images = late_images
        self.resolution = Resolution(max_pixels, sides, max_aspect_ratio)
        self.origin = origin
        self.bad_images: BadImages | None = None
        if max_bad_images:
            if bad_images_log is None:
                raise ValueError(
                    f"`max_bad_images={max_bad_images}` needs `bad_images_log`: the file that names the images, which "
                    "all workers and resumed runs count by."
                )
            self.bad_images = BadImages(bad_images_log, max_bad_images)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch of columns; columns that hold no cells pass through."""
        columns = {name: values for name, values in batch.items() if name != SUBSET}
        if self.bad_images is None or not columns:
            return {name: [self._value(value, self._image) for value in values] for name, values in columns.items()}
        return self._replace_bad_rows(columns, batch.get(SUBSET))

    def _replace_bad_rows(self, columns: dict[str, list[Any]], subsets: list[str] | None) -> dict[str, list[Any]]:
        """Read all rows; each with a bad image becomes a copy of the next row that has none."""
        rows = len(next(iter(columns.values())))
        read: dict[str, list[Any]] = {name: [] for name in columns}
        opened: dict[Any, Any] = {}
        whole = []
        for row in range(rows):
            bad: list[Stored] = []
            subset = subsets[row] if subsets else None

            def open_or_note(image: Stored, bad: list[Stored] = bad, subset: str | None = subset) -> Any:
                return self._open_or_note(image, opened, bad, subset)

            for name, values in columns.items():
                read[name].append(self._value(values[row], open_or_note))
            if not bad or rows == 1:  # the Trainer draws single rows for the model card
                whole.append(row)
        if rows and not whole:
            raise ValueError(
                f"None of the {rows} rows of a batch has readable images, so there is nothing to replace them by. "
                "Larger batches make that rarer; the images are named above, and in the log of bad images."
            )
        chosen = [next((other for other in whole if other >= row), whole[0]) for row in range(rows)]
        return {name: [values[row] for row in chosen] for name, values in read.items()}

    def _open_or_note(self, image: Stored, opened: dict[Any, Any], bad: list[Stored], subset: str | None) -> Any:
        """Open an image once a batch; a bad one is noted, written down, and shown as grey."""
        key = image if isinstance(image, str) else id(image)
        if key not in opened:
            try:
                opened[key] = self._read_image(image)
            except _BAD_IMAGE as error:
                opened[key] = None
                self.report(image, error, subset)
            except ValueError as error:
                raise self._located(error, image) from error
        if opened[key] is not None:
            return opened[key]
        bad.append(image)
        return Image.new("RGB", (224, 224), "grey")

    def report(self, image: Stored, error: Exception, subset: str | None = None) -> None:
        """Write a bad image down, see :class:`~unime_st.data.bad_images.BadImages`; an error when none is allowed."""
        if self.bad_images is None:
            raise self._located(error, image) from error

        def place() -> Place:
            found = Place("unknown") if self.origin is None else self.origin(image)
            return found if subset in (None, found.dataset) else Place(str(subset))

        self.bad_images.report(identity(image), error, place)

    def read(self, cell: Cell) -> Any:
        """Read one cell: ``{"image", "text"}``, either of them None or left out, or a stored image alone."""
        return self._value(cell, self._image)

    def read_absolute(self, item: Any) -> Any:
        """Open and resize the image or frames of an input given by absolute paths, which were checked before."""
        if not isinstance(item, Mapping):
            return item
        opened: dict[str, Any] = {}
        if isinstance(item.get("image"), str):
            opened["image"] = self._decoded(item["image"], item["image"])
        if isinstance(item.get("video"), list):
            opened["video"] = [self._decoded(frame, frame) for frame in item["video"]]
        return {**item, **opened}

    def _value(self, value: Any, open_: Callable[[Stored], Any]) -> Any:
        if isinstance(value, Mapping):
            if is_encoded(value):
                return open_(value) if any(part is not None for part in value.values()) else None
            return value if "role" in value else self._cell(value, open_)  # a chat message stays
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return [self._value(cell, open_) for cell in value]
        return value

    @staticmethod
    def _cell(cell: Cell, open_: Callable[[Stored], Any]) -> dict[str, Any]:
        item: dict[str, Any] = {}
        if images := cell.get("image"):
            item["image"] = [open_(image) for image in images] if isinstance(images, list) else open_(images)
        if cell.get("text"):
            item["text"] = cell["text"]
        return item | {name: part for name, part in cell.items() if name not in ("image", "text") and part is not None}

    def path(self, relative: str, *, must_exist: bool = True) -> str:
        """Find an image's absolute path, see :func:`resolve_image`; errors say where the path comes from."""
        try:
            return self._resolve(relative, must_exist=must_exist)
        except (ValueError, FileNotFoundError) as error:
            raise self._located(error, relative) from error

    def check(self, image: Stored, *, by_opening: bool = False) -> Exception | None:
        """What is wrong with an image, if anything: missing or, ``by_opening`` it, damaged."""
        try:
            if by_opening:
                read = self._read_image(image)
                if isinstance(read, LateImage):
                    read.open()
            elif (path := stored_path(image)) is not None:
                self._resolve(path)
        except _BAD_IMAGE as error:
            return error
        except ValueError as error:
            raise self._located(error, image) from error
        return None

    def _resolve(self, relative: str, *, must_exist: bool = True) -> str:
        if self.image_root is None:
            raise ValueError(
                f"The data set names a file, {relative!r}, in place of holding the image. Give the folder of its "
                "images as `image_root`: what lies outside it is not opened."
            )
        return str(resolve_image(self.image_root, relative, must_exist=must_exist))

    def _image(self, image: Stored) -> Any:
        try:
            return self._read_image(image)
        except (ValueError, FileNotFoundError) as error:
            raise self._located(error, image) from error

    def _read_image(self, image: Stored) -> Any:
        """Open an image as stored; what is no stored image, such as an opened one, stays."""
        name = None
        if isinstance(image, Mapping) and image.keys() <= ENCODED_KEYS:
            name = image.get("path")
            image = bytes_or_path(image)
        if isinstance(image, str):
            path = self._resolve(image, must_exist=self.open_images)  # each time: a link may have come since
            return self._decoded(path, path) if self.open_images else path
        if isinstance(image, bytes) and self.open_images:
            return self._decoded(image, name or "stored as bytes")
        return image

    def _located(self, error: Exception, image: Stored) -> Exception:
        return type(error)(f"{self.origin(image)}: {error}") if self.origin is not None else error

    def _decoded(self, source: str | bytes, name: str) -> Any:
        image = LateImage(source, name, self.resolution)
        if not self.late_images:
            return image.open()
        if self.bad_images is None:
            image.size()  # what its header tells: whether it is there, an image, and of a shape that can be used
        else:  # damage must be known now, while another row can stand in
            image.open()
        return image
