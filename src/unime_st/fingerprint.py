"""Content hashes of inputs: what tells that two rows hold the same text or the same image.

An input is flattened into its parts (texts and media, in the order they are given) and the parts are hashed, so that
``"a cat"``, ``{"text": "a cat"}`` and a chat message that says so are one content. Two identities of images exist:

* *encoded* images (a path, bytes, a ``datasets`` cell that is not decoded) are known by the bytes of the file, so a
  path, a copy of the file and the file's bytes are one content, and nothing is decoded;
* *decoded* images (PIL, numpy, torch) are known by their pixels, as :mod:`unime_st.images` shows them to a model,
  whatever file they came from.

An encoded and a decoded form of one picture do not compare equal: give both in the same form where that matters.
"""

from __future__ import annotations

import hashlib
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unime_st.images import as_rgb, stands_for_image

_DIGEST_BYTES = 16
_ID_MASK = 2**63 - 1
_SETTLED_NS = 2 * 10**9
_MEDIA = ("image", "video", "audio")
_REMOTE = ("http://", "https://", "data:")
_ENCODED_KEYS = {"bytes", "path"}

Part = tuple[str, bytes]


def fingerprint(item: Any, *, read_files: bool = True) -> str:
    """Hash everything an input says: its texts and media, and the instructions of a chat too.

    Args:
        item: Text, an image (PIL, path, bytes, numpy, torch), ``{"image", "text"}`` where the image may be a list,
            chat messages, or a list of media. A string at the top is what ``encode`` takes it for: an image if it
            stands for one (:func:`~unime_st.images.stands_for_image`), else text; below ``"image"`` it is a path, URL
            or data URI, below ``"text"`` always text. URLs are not fetched: the address is the identity.
        read_files: Know an image's path by the content of its file; False by the path as written, which costs no
            reading but takes two copies of a file for two images.

    Returns:
        32 hexadecimal digits.

    Raises:
        FileNotFoundError: When a file is to be read and is not there.
        TypeError: For an input of another kind, or a number where a text belongs.

    Example:
        >>> fingerprint("a cat") == fingerprint({"text": "a cat", "image": None})
        True
        >>> fingerprint("a cat") == fingerprint([{"role": "user", "content": "a cat"}])
        True
        >>> grey = Image.new("RGB", (2, 2), "grey")
        >>> fingerprint({"image": grey, "text": "a cat"}) == fingerprint({"image": grey, "text": "a dog"})
        False
    """
    return _digest(_parts(_named(item), read_files, instructions=True)).hex()


def content_id(item: Any, *, read_files: bool = True) -> int:
    """Integer identity of an input's content, instructions (system messages) left out.

    Args:
        item: See :func:`fingerprint`.
        read_files: See :func:`fingerprint`.

    Returns:
        An integer in [0, 2^63), so that it fits an int64 tensor.

    Example:
        >>> system = {"role": "system", "content": "Say it in one word."}
        >>> content_id([system, {"role": "user", "content": "a cat"}]) == content_id("a cat")
        True
    """
    return content_id_and_media(item, read_files=read_files)[0]


def content_id_and_media(item: Any, *, read_files: bool = True) -> tuple[int, tuple[bytes, ...]]:
    """The content's identity and digests of its media, which are read once for both.

    Args:
        item: See :func:`fingerprint`.
        read_files: See :func:`fingerprint`.

    Returns:
        See :func:`content_id` and :func:`media_and_text`.

    Example:
        >>> number, media = content_id_and_media({"image": Image.new("RGB", (2, 2)), "text": "a cat"})
        >>> number == content_id({"image": Image.new("RGB", (2, 2)), "text": "a cat"}), len(media)
        (True, 1)
    """
    parts = list(_parts(_named(item), read_files, instructions=False))
    media = tuple(content for kind, content in parts if kind in _MEDIA)
    return int.from_bytes(_digest(parts)[:8], "big") & _ID_MASK, media


def media_and_text(item: Any, *, read_files: bool = True) -> tuple[tuple[bytes, ...], str]:
    """Split an input into the digests of its media and its text, instructions left out.

    Args:
        item: See :func:`fingerprint`.
        read_files: See :func:`fingerprint`.

    Returns:
        A digest for each image, video and sound, in their order; all texts, one after the other.

    Example:
        >>> media, text = media_and_text({"image": Image.new("RGB", (2, 2)), "text": "a cat"})
        >>> len(media), text
        (1, 'a cat')
    """
    parts = list(_parts(_named(item), read_files, instructions=False))
    media = tuple(content for kind, content in parts if kind in _MEDIA)
    return media, "".join(content.decode("utf-8", "surrogatepass") for kind, content in parts if kind == "text")


def _named(item: Any) -> Any:
    """The input itself; a bare string that stands for an image becomes that image."""
    return {"image": item} if isinstance(item, str) and stands_for_image(item) else item


def _digest(parts: Iterable[Part]) -> bytes:
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for kind, content in parts:
        total.update(f"{kind}:{len(content)}:".encode())
        total.update(content)
    return total.digest()


def _parts(item: Any, read_files: bool, instructions: bool) -> Iterator[Part]:
    """Yield (kind, content) of every part; media come as digests, texts as UTF-8."""
    if isinstance(item, str):
        if item:
            yield "text", item.encode("utf-8", "surrogatepass")
    elif isinstance(item, Mapping) and "role" in item and "content" in item:
        yield from _message_parts(item, read_files, instructions)
    elif isinstance(item, Mapping) and not _is_encoded(item):
        yield from _dict_parts(item, read_files)
    elif isinstance(item, (list, tuple)):
        for element in item:
            yield from _parts(element, read_files, instructions)
    elif item is not None:
        yield "image", _medium(item, read_files)


def _message_parts(message: Mapping[str, Any], read_files: bool, instructions: bool) -> Iterator[Part]:
    if message["role"] == "system" and not instructions:  # its images are content all the same
        everything = _message_parts(message, read_files, instructions=True)
        yield from ((kind, content) for kind, content in everything if kind in _MEDIA)
        return
    if message["role"] != "user":
        yield "role", str(message["role"]).encode()
    content = message["content"]
    if not isinstance(content, (list, tuple)):
        yield from _parts(content, read_files, instructions)
        return
    for part in content:
        if isinstance(part, Mapping) and "type" in part:
            kind = str(part["type"])
            value = part[kind] if kind in part else next((v for k, v in part.items() if k != "type"), None)
            yield from _dict_parts({kind: value}, read_files)
        else:
            yield from _parts(part, read_files, instructions)


def _dict_parts(item: Mapping[str, Any], read_files: bool) -> Iterator[Part]:
    """Media first, then the text: the order of the keys means nothing."""
    unknown = sorted(str(key) for key in item if key not in (*_MEDIA, "text"))
    if unknown:
        raise TypeError(
            f"An input has the key(s) {unknown}; a dict holds {', '.join(_MEDIA)} and text, or is a chat message with "
            "role and content."
        )
    for kind in _MEDIA:
        value = item.get(kind)
        for medium in value if isinstance(value, (list, tuple)) else [value]:
            if medium is not None:
                yield kind, _medium(medium, read_files)
    text = item.get("text")
    for piece in text if isinstance(text, (list, tuple)) else [text]:
        if piece is None or (isinstance(piece, str) and not piece):
            continue
        if not isinstance(piece, str):
            raise TypeError(f"A text is {piece!r}, a {type(piece).__name__}. Give a string, or leave the text out.")
        yield "text", piece.encode("utf-8", "surrogatepass")


def _is_encoded(item: Mapping[str, Any]) -> bool:
    """Whether this is how ``datasets`` stores an image that is not decoded."""
    return bool(item) and set(item) <= _ENCODED_KEYS


def _medium(value: Any, read_files: bool) -> bytes:
    """Digest of one image, video or sound."""
    if isinstance(value, Mapping) and _is_encoded(value):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, Path)):
        return _named_medium(str(value), read_files)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _hash(b"file", bytes(value))
    if isinstance(value, Sequence):
        return _hash(b"list", *(_medium(element, read_files) for element in value))
    return _decoded_medium(value)


def _named_medium(name: str, read_files: bool) -> bytes:
    if name.startswith(_REMOTE):
        return _hash(b"address", name.encode())
    return _file_digest(name) if read_files else _hash(b"path", name.encode("utf-8", "surrogatepass"))


def _decoded_medium(value: Any) -> bytes:
    if isinstance(value, Image.Image):
        return _array_digest(np.asarray(as_rgb(value)))
    if isinstance(value, torch.Tensor):  # bfloat16 has no numpy type: hash the bytes
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _hash(b"tensor", f"{value.dtype}{tuple(value.shape)}".encode(), raw.tobytes())
    if isinstance(value, np.ndarray):
        return _array_digest(value)
    if isinstance(value, Mapping):
        return _hash(b"dict", *(part for key in sorted(value) for part in (str(key).encode(), _value(value[key]))))
    raise TypeError(
        f"Cannot tell the content of a {type(value).__name__}; give text, a PIL image, a path, bytes, a numpy or torch "
        'image, {"image", "text"} or chat messages.'
    )


def _value(value: Any) -> bytes:
    """Digest of what a medium's mapping holds: arrays by all of their numbers, which `repr` would leave out."""
    if isinstance(value, Image.Image | torch.Tensor | np.ndarray | Mapping):
        return _decoded_medium(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _hash(b"file", bytes(value))
    if isinstance(value, list | tuple):
        return _hash(b"list", *(_value(element) for element in value))
    return _hash(b"value", repr(value).encode("utf-8", "surrogatepass"))


def _hash(*chunks: bytes) -> bytes:
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for chunk in chunks:
        total.update(len(chunk).to_bytes(8, "big"))
        total.update(chunk)
    return total.digest()


def _array_digest(array: np.ndarray) -> bytes:
    return _hash(b"pixels", f"{array.dtype.str}{array.shape}".encode(), array.tobytes())


def _file_digest(path: str | Path) -> bytes:
    """Digest of a file, which is read once as long as it stays the same file, unchanged.

    What tells that: device, number, size, and the times of the last change of content and of anything, the second of
    which no program sets. A file that changed less than two seconds ago may change again within one tick of the clock,
    so it is read each time. What remains is a file system without numbers or with a clock of its own that runs slow.
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
        return _hash(b"file", Path(path).read_bytes())
    return _file_digest_of(str(path), state)


@lru_cache(maxsize=65536)
def _file_digest_of(path: str, _state: tuple[int, ...]) -> bytes:
    return _hash(b"file", Path(path).read_bytes())
