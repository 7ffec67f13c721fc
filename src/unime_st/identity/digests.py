"""Digests of images, videos and sounds: of a file's bytes where there is a file, of the pixels where there is none."""

from __future__ import annotations

import hashlib
import stat
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unime_st.images import ADDRESSES, PartOfFile, as_rgb, bytes_or_path, is_encoded
from unime_st.videos import frame_files

_DIGEST_BYTES = 16
_SETTLED_NS = 2 * 10**9


def medium_digest(value: Any, read_files: bool) -> bytes:
    """Digest of one image, video or sound, whose file is read if it is named and ``read_files`` says so."""
    if isinstance(value, Mapping) and is_encoded(value):
        value = bytes_or_path(value)
    if isinstance(value, (str, Path)):
        return _named_medium(str(value), read_files)
    if isinstance(value, PartOfFile):
        whole = medium_digest(value.file, read_files=True)
        return hash_of(b"part", whole, value.part.encode()) if value.part else whole
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hash_of(b"file", bytes(value))
    if isinstance(value, Sequence):
        return hash_of(b"list", *(medium_digest(element, read_files) for element in value))
    return _decoded_medium(value)


def _named_medium(name: str, read_files: bool) -> bytes:
    if name.startswith(ADDRESSES):
        return hash_of(b"address", name.encode())
    if read_files and Path(name).is_dir():  # a video kept as its frames is the list of them
        return hash_of(b"list", *(_file_digest(frame) for frame in frame_files(name)))
    return _file_digest(name) if read_files else hash_of(b"path", name.encode("utf-8", "surrogatepass"))


def _decoded_medium(value: Any) -> bytes:
    if isinstance(value, Image.Image):
        return _array_digest(np.asarray(as_rgb(value)))
    if isinstance(value, torch.Tensor):  # bfloat16 has no numpy type: hash the bytes
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hash_of(b"tensor", f"{value.dtype}{tuple(value.shape)}".encode(), raw.tobytes())
    if isinstance(value, np.ndarray):
        return _array_digest(value)
    if isinstance(value, Mapping):
        return hash_of(b"dict", *(part for key in sorted(value) for part in (str(key).encode(), _value(value[key]))))
    raise TypeError(
        f"Cannot tell the content of a {type(value).__name__}; give text, a PIL image, a path, bytes, a numpy or torch "
        'image, {"image", "text"} or chat messages.'
    )


def _value(value: Any) -> bytes:
    """Digest of what a medium's mapping holds: arrays by all of their numbers, which `repr` would leave out."""
    if isinstance(value, Image.Image | torch.Tensor | np.ndarray | Mapping):
        return _decoded_medium(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return hash_of(b"file", bytes(value))
    if isinstance(value, list | tuple):
        return hash_of(b"list", *(_value(element) for element in value))
    return hash_of(b"value", repr(value).encode("utf-8", "surrogatepass"))


def hash_of(*chunks: bytes) -> bytes:
    """Hash chunks, so that where one ends counts too."""
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for chunk in chunks:
        total.update(len(chunk).to_bytes(8, "big"))
        total.update(chunk)
    return total.digest()


def _array_digest(array: np.ndarray) -> bytes:
    return hash_of(b"pixels", f"{array.dtype.str}{array.shape}".encode(), array.tobytes())


def _file_digest(path: str | Path) -> bytes:
    """Digest of a file, which is read once as long as it stays the same file, unchanged.

    Its device, number, size and two times tell that, of which no program sets the last. A file that changed less than
    two seconds ago may change again within one tick of the clock, so it is read each time.
    """
    try:
        status = Path(path).stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {str(path)!r} to hash; is it relative to another folder?") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise FileNotFoundError(f"{str(path)!r} is no regular file, so it is not read.")
    changed = max(status.st_ctime_ns, status.st_mtime_ns)
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if changed > time.time_ns() - _SETTLED_NS:
        return hash_of(b"file", Path(path).read_bytes())
    return _file_digest_of(str(path), state)


@lru_cache(maxsize=65536)
def _file_digest_of(path: str, _state: tuple[int, ...]) -> bytes:
    return hash_of(b"file", Path(path).read_bytes())
