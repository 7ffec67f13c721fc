"""Images that arrive from outside: bounded before they are decoded, and held in memory only."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image
from starlette.exceptions import HTTPException

from unime_st.images import as_rgb

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_ADVICE = "Send a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF."


def bytes_of(data_uri: str, name: str) -> bytes:
    """The file in a data URI.

    Args:
        data_uri: ``data:image/png;base64,...``; addresses and paths are not opened.
        name: What errors call it.

    Raises:
        HTTPException: 400 when it is none, 415 for an SVG.
    """
    head, comma, body = data_uri.partition(",")
    if not head[:5].lower() == "data:" or not comma or not head.lower().endswith(";base64"):
        raise HTTPException(
            400, f"{name} must be a data URI, data:image/png;base64,...: addresses and paths are not opened."
        )
    if "svg" in head.lower():
        raise _is_svg(name)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"{name} is not valid base64: {error}.") from error


def open_bounded(source: bytes | Path, name: str, take_pixels: Callable[[int], None]) -> Image.Image:
    """Decode an image as :mod:`unime_st.images` does, after its size was read from its head and found to fit.

    Args:
        source: The bytes of a file, or its path.
        name: What errors call it.
        take_pixels: Is told the number of pixels before they are decoded, and raises where that is too many.

    Returns:
        An RGB image.

    Raises:
        HTTPException: 415 for what is no image or an SVG, 413 for too many pixels, 400 for a damaged one.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_known_formats()) as image:
            take_pixels(max(image.width * image.height, _pixels_of_tile(image)))
            image.load()
            seen = as_rgb(image, name)
            return seen.copy() if seen is image else seen
    except HTTPException:
        raise
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"{name} has far too many pixels. Shrink it.") from error
    except Image.UnidentifiedImageError as error:
        if isinstance(source, bytes) and b"<svg" in source[:4096].lower():
            raise _is_svg(name) from error
        raise HTTPException(415, f"{name} is not an image that can be read. {_ADVICE}") from error
    except Exception as error:  # decoders of damaged files raise whatever they come upon
        raise HTTPException(400, f"{name} is damaged: {str(error) or type(error).__name__}. Save it anew.") from error


def _pixels_of_tile(image: Image.Image) -> int:
    """Of a TIFF's tile, which is decoded whole however small the image is; 0 where there are none."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)


def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _is_svg(name: str) -> HTTPException:
    return HTTPException(415, f"{name} is an SVG, which is a drawing's source and has no pixels. {_ADVICE}")
