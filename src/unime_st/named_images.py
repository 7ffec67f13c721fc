"""Which bare strings stand for an image: an address or a file, as stock code decides."""

from __future__ import annotations

import os
from urllib.parse import urlparse

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
REMOTE_PREFIXES = ("http://", "https://")
DATA_PREFIX = "data:image/"


def stands_for_image(text: str) -> bool:
    """Whether ``encode`` opens a bare string as an image: a data URI, an image's address, or an existing file.

    Example:
        >>> stands_for_image("https://a.org/b.png?size=2"), stands_for_image("a picture called b.png")
        (True, False)
    """
    if text.startswith(DATA_PREFIX):
        return True
    if text.startswith(REMOTE_PREFIXES):
        return " " not in text and _address_path(text).endswith(IMAGE_SUFFIXES)
    # Path.is_file raises for a name too long
    return text.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(text)  # noqa: PTH113


def _address_path(address: str) -> str:
    try:
        return urlparse(address).path.lower()
    except ValueError:  # no address after all, e.g. "https://[x]"
        return ""
