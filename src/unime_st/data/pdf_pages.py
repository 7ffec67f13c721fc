"""PDF files as a corpus of pages, each rendered when it is encoded."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unime_st.arguments import require_number
from unime_st.images import PartOfFile, UnreadableImageError, check_pixels

logger = logging.getLogger(__name__)

_POINTS = 72  # of a PDF to the inch
_LONGEST_SIDE = 65_535  # pixels; pdfium fails at much longer ones (the standard allows 28,800 at 144 dpi)
_MOST_FAILED = 100  # pages in a row, before a file is given up
_ONE_AT_A_TIME = threading.Lock()  # pdfium is not made for threads


@dataclass(frozen=True)
class PdfPage(PartOfFile):
    """A page of a PDF file: an image for ``encode``, rendered when it is opened, and known by file and number.

    Args:
        file: The file.
        number: Number of the page, from 1.
        dpi: Dots an inch.
        max_pixels: Pages that would be larger are rendered smaller, keeping their shape.
    """

    file: str
    number: int
    dpi: int
    max_pixels: int | None

    @property
    def part(self) -> str:
        """Which page, and how it is rendered."""
        return f"page {self.number}, {self.dpi} dpi, {self.max_pixels} pixels"

    def open(self) -> Image.Image:
        """Render the page in RGB.

        Raises:
            UnreadableImageError: The page is damaged.
        """
        pdfium = _pdfium()
        with _ONE_AT_A_TIME:
            try:
                with pdfium.PdfDocument(self.file) as document:
                    page = document[self.number - 1]
                    scale = _scale(page, self.dpi, self.max_pixels)
                    return page.render(scale=scale).to_pil().convert("RGB")
            except (pdfium.PdfiumError, UnreadableImageError) as error:
                raise UnreadableImageError(
                    f"Cannot render page {self.number} of {self.file}: {error}. Replace the file, or leave it out."
                ) from error


class PdfPages(Sequence[tuple[str, dict[str, Any]]]):
    """The pages of PDF files as pairs (id, input), for ``encode_corpus(model, PdfPages(folder), ..., with_ids=True)``.

    A file is opened once to count its pages; those that cannot be read, or would be too large to render, are passed
    over, with a warning, and listed. So is the rest of a file of which a hundred pages in a row cannot be read: files
    may claim a million pages that they do not have. A page is rendered when it is encoded, and known by the bytes of
    its file, so that a run that goes on after a kill renders only what is missing. Its id is the path of its file and
    its number, ``papers/a.pdf#page=3``, which browsers open at that page.

    Args:
        source: A folder, which is looked through with those below, a PDF file, or a list of files.
        dpi: Dots an inch at which pages are rendered.
        max_pixels: Pages that would be larger are rendered smaller, keeping their shape; None takes those that
            Pillow would take of a file.

    Attributes:
        damaged: File, or file and page as an id has them -> why it was passed over.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ImportError: pypdfium2 is not installed.
        ValueError: There is no page that can be read, or a number is out of range.
    """

    def __init__(
        self, source: str | Path | Iterable[str | Path], *, dpi: int = 144, max_pixels: int | None = 2_000_000
    ) -> None:
        require_number("dpi", dpi, least=1)
        require_number("max_pixels", max_pixels, least=1, optional=True)
        self.damaged: dict[str, str] = {}
        self._pages: list[tuple[str, PdfPage]] = []
        for name, file in _files(source):
            for number in self._readable(name, file, dpi, max_pixels):
                self._pages.append((f"{name}#page={number}", PdfPage(str(file), number, dpi, max_pixels)))
        for name, why in self.damaged.items():
            logger.warning("%s passed over: %s", name, why)
        if not self._pages:
            told = "; ".join(f"{name}: {why}" for name, why in self.damaged.items()) or "there is no .pdf file"
            raise ValueError(f"{source} holds no page that can be read ({told}).")

    def _readable(self, name: str, file: Path, dpi: int, max_pixels: int | None) -> list[int]:
        """The numbers of a file's pages that can be loaded and have a size to render; others are noted."""
        pdfium = _pdfium()
        found = []
        failed: list[str] = []  # of pages in a row
        with _ONE_AT_A_TIME:
            try:
                with pdfium.PdfDocument(file) as document:
                    size = file.stat().st_size
                    for number in range(1, len(document) + 1):
                        try:
                            _scale(document[number - 1], dpi, max_pixels)
                        except (pdfium.PdfiumError, UnreadableImageError) as error:
                            failed.append(f"{name}#page={number}")
                            self.damaged[failed[-1]] = str(error)
                        else:
                            found.append(number)
                            failed = []
                        if len(found) > size:  # it names a page again and again
                            self.damaged[name] = f"it claims to have {len(document)} pages in {size} bytes"
                            return []
                        if len(failed) == _MOST_FAILED:
                            self._give_up(failed, len(document))
                            break
            except (pdfium.PdfiumError, OSError) as error:
                self.damaged[name] = str(error)
        return found

    def _give_up(self, failed: list[str], claimed: int) -> None:
        """Note pages that failed in a row, and all behind them, as one."""
        first, *_ = whys = [self.damaged.pop(page) for page in failed]
        self.damaged[failed[0]] = (
            f"{first}; nor can the next {len(whys) - 1} pages be read, of {claimed} that the file claims to have: the "
            "rest of it is passed over"
        )

    @property
    def ids(self) -> list[str]:
        """The id of each page."""
        return [name for name, _ in self._pages]

    def __len__(self) -> int:
        """Count the pages that can be read."""
        return len(self._pages)

    def __getitem__(self, place: Any) -> Any:
        """A page's id and input, or a list of them."""
        found = self._pages[place]
        if isinstance(place, slice):
            return [(name, {"image": page}) for name, page in found]
        return found[0], {"image": found[1]}


def _scale(page: Any, dpi: int, max_pixels: int | None) -> float:
    """Pixels to the point at which a page is rendered; a page that would be too long or too large is refused."""
    width, height = page.get_size()
    scale = dpi / _POINTS
    if max_pixels is not None:
        scale = min(scale, math.sqrt(max_pixels / (width * height)))
    size = math.ceil(width * scale), math.ceil(height * scale)
    if max(size) > _LONGEST_SIDE:
        raise UnreadableImageError(f"at {size[0]} x {size[1]} pixels a side is longer than {_LONGEST_SIDE}")
    if max_pixels is None:
        check_pixels(*size)
    return scale


def _files(source: str | Path | Iterable[str | Path]) -> list[tuple[str, Path]]:
    """Names and paths of the files: names are relative to a folder, else as given."""
    if isinstance(source, str | Path) and Path(source).is_dir():
        found = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
        return [(path.relative_to(source).as_posix(), path.absolute()) for path in found]
    given = [source] if isinstance(source, str | Path) else list(source)
    if missing := [str(path) for path in given if not Path(path).is_file()]:
        raise FileNotFoundError(f"There is no PDF file {missing[0]!r}, nor a folder of that name. Check the path.")
    return [(str(path), Path(path).absolute()) for path in given]


def _pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDF files need pypdfium2, which is not installed: `pip install 'unime_st[pdf]'`.") from error
    return pypdfium2
