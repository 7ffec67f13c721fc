"""From whatever a user gives to one form: chat messages with opened images."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from unime_st.named_images import DATA_PREFIX, IMAGE_SUFFIXES, REMOTE_PREFIXES, stands_for_image

_LONGEST_PATH = 4096

Message = dict[str, Any]
Open = Callable[[Any], Image.Image]


def as_messages(
    item: Any, row: int, *, allow_remote_images: bool = False, opened: dict[Any, Image.Image] | None = None
) -> list[Message]:
    """Turn one input into chat messages whose images are opened.

    Args:
        item: text; an image as PIL, path, data URI, bytes, numpy or torch array; ``{"image", "text"}`` where the image
            may be a list; or chat messages (one dict or a list of them).
        row: its place in the batch, for error messages (``encode`` sorts its inputs by length into batches).
        allow_remote_images: open ``http(s)`` addresses.
        opened: images of this batch by their path, address or bytes; those opened here are added.

    Returns:
        Messages of ``{"role", "content": [{"type": "text" | "image" | ..., ...}]}``.

    Raises:
        FileNotFoundError: An image file is not there.
        TypeError: An input of a kind that is not known.
        ValueError: Neither text nor image, an unreadable image, or a remote address that was not allowed.

    Example:
        >>> as_messages({"text": "a cat"}, 0)
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'a cat'}]}]
    """

    def open_once(value: Any) -> Image.Image:
        key = _name_of(value)
        known = opened.get(key) if opened is not None and key is not None else None
        if known is not None:
            return known
        image = open_image(value, row, allow_remote_images=allow_remote_images)
        if opened is not None and key is not None:
            opened[key] = image
        return image

    if isinstance(item, Mapping) and "role" in item and "content" in item:
        item = [item]
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping) and "role" in item[0]:
        messages = [{**message, "content": _chat_parts(message["content"], row, open_once)} for message in item]
    else:
        messages = [{"role": "user", "content": _item_parts(item, row, open_once)}]
    parts = [part for message in messages if message["role"] != "system" for part in message["content"]]
    if not any(part["type"] != "text" or part["text"].strip() for part in parts):
        raise ValueError(f"Row {row} holds neither text nor an image. Remove it, or give it one of them.")
    return messages


def open_image(value: Any, row: int, *, allow_remote_images: bool = False) -> Image.Image:
    """Open one image in any of the accepted forms; files and bytes become RGB, turned as their EXIF data say.

    Args:
        value: PIL image, path, data URI, ``http(s)`` address, bytes, array (H, W, C) or (C, H, W) of bytes or of floats
            in [0, 1], or ``{"bytes", "path"}`` as data sets store an image.
        row: its place in the batch, for error messages.
        allow_remote_images: open ``http(s)`` addresses.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"} and value:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(bytes(value)), f"the bytes of row {row}")
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _from_array(value, row)
    if isinstance(value, str) and value.startswith(REMOTE_PREFIXES):
        if not allow_remote_images:
            raise ValueError(
                f"Row {row} names a remote image, {value!r}, and remote images are opened only when asked for. "
                "Download it, or pass `allow_remote_images=True` to `build_encoder` or `load_encoder`."
            )
        with urlopen(value, timeout=30) as answer:  # noqa: S310 (http and https only, and asked for)
            return _decoded(io.BytesIO(answer.read()), value)
    if isinstance(value, str) and value.startswith(DATA_PREFIX):
        try:
            content = base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"The data URI of row {row} is not valid base64.") from error
        return _decoded(io.BytesIO(content), f"the data URI of row {row}")
    if isinstance(value, (str, Path)):
        path = Path(value)
        if not _is_file(path):
            raise FileNotFoundError(
                f"Row {row}: there is no image file {str(value)!r}. Check the path and the folder it is relative to."
            )
        return _decoded(path, str(path))
    raise TypeError(f"Row {row}: a {type(value).__name__} is not an image. Give PIL, a path, bytes, numpy or torch.")


def _name_of(value: Any) -> str | bytes | None:
    """What an image that is not open is known by within a batch; None for any other."""
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, str | bytes) else None


def _item_parts(item: Any, row: int, open_once: Open) -> list[dict[str, Any]]:
    if isinstance(item, str) and not names_an_image(item, row):
        return [{"type": "text", "text": item}]
    if isinstance(item, Mapping) and not (item and set(item) <= {"bytes", "path"}):
        return _dict_parts(item, row, open_once)
    if item is None:
        raise ValueError(f"Row {row} is None. Remove it, or give it a text or an image.")
    if isinstance(item, (list, tuple)):
        raise TypeError(f'Row {row} is a list. Several images of one input go into {{"image": [...], "text": ...}}.')
    return [{"type": "image", "image": open_once(item)}]


def _dict_parts(item: Mapping[str, Any], row: int, open_once: Open) -> list[dict[str, Any]]:
    unknown = sorted(str(key) for key in item if key not in ("image", "text", "video"))
    if unknown:
        raise ValueError(f"Row {row} has the unknown key(s) {', '.join(unknown)}. A dict holds image, video and text.")
    images = item.get("image")
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": open_once(image)}
        for image in (images if isinstance(images, (list, tuple)) else [images])
        if image is not None
    ]
    if item.get("video") is not None:
        parts.append({"type": "video", "video": item["video"]})
    if item.get("text"):
        parts.append({"type": "text", "text": str(item["text"])})
    return parts


def _chat_parts(content: Any, row: int, open_once: Open) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise TypeError(f"Row {row}: the content of a message is a string or a list of parts, not {type(content)}.")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, Mapping):
            raise TypeError(
                f"Row {row}: a part of a message is a {type(part).__name__}. Give a string, or a mapping such as "
                '{"type": "image", "image": ...}.'
            )
        kind = part.get("type", "text")
        if kind == "image":
            value = next((part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None)
            parts.append({"type": "image", "image": open_once(value)})
        else:
            parts.append(dict(part))
    return parts


def names_an_image(text: str, row: int) -> bool:
    """Whether a bare string stands for an image, as stock code decides: an address or an existing file.

    Raises:
        FileNotFoundError: One word that ends as image files do, and no such file: a mistyped path, most likely.
    """
    if stands_for_image(text):
        return True
    if text.startswith(REMOTE_PREFIXES) or not text.lower().endswith(IMAGE_SUFFIXES):
        return False
    if len(text) > _LONGEST_PATH or any(character.isspace() for character in text):
        return False
    raise FileNotFoundError(
        f'Row {row}: {text!r} looks like an image file, but there is none. Mend the path, or pass {{"text": ...}} to '
        "embed the words."
    )


def named_image(item: Any, row: int) -> Any:
    """The input itself; a bare string that names an image becomes that image, as stock code takes it."""
    return {"image": item} if isinstance(item, str) and names_an_image(item, row) else item


def refuse_placeholders(messages: list[Message], row: int, placeholders: Collection[str]) -> None:
    """Refuse a text that spells out the token that stands for an image: it would be counted as one more image.

    Args:
        messages: of one input, as :func:`as_messages` made them.
        row: its place in the batch.
        placeholders: the family's tokens for media.

    Raises:
        ValueError: with the row and the token.

    Example:
        >>> refuse_placeholders(as_messages("a <image>", 0), 0, ["<image>"])
        Traceback (most recent call last):
        ...
        ValueError: The text 'a <image>' (row 0 of the batch) holds '<image>', which is for media. Reword it.
    """
    for message in messages:
        for part in message["content"]:
            found = next((token for token in placeholders if part["type"] == "text" and token in part["text"]), None)
            if found is not None:
                raise ValueError(
                    f"The text {shorten(part['text'], 60)!r} (row {row} of the batch) holds {found!r}, which is for "
                    "media. Reword it."
                )


def _is_file(path: str | Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for a name too long)


def _decoded(source: Any, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read an image from {name}: {error}. Replace or remove it.") from error


def _from_array(array: np.ndarray | torch.Tensor, row: int) -> Image.Image:
    values = array.detach().float().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    is_float = array.is_floating_point() if isinstance(array, torch.Tensor) else values.dtype.kind == "f"
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or not {1, 3} & {values.shape[0], values.shape[2]} or values.size == 0:
        raise ValueError(f"Row {row}: an array of shape {array.shape} is no image. Give (H, W, 3) or (3, H, W).")
    if values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    highest = 1 if is_float or values.dtype.kind == "b" else 255
    if not (values.min() >= 0 and values.max() <= highest):  # written so that NaN is refused too
        kind = "floats" if is_float else "integers"
        raise ValueError(
            f"Row {row}: an image of {kind} must lie in [0, {highest}], got {values.min()} to {values.max()}. Rescale "
            "it, or give a PIL image."
        )
    if highest == 1:
        values = values * 255.0
    pixels = np.ascontiguousarray(np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values)
    return Image.fromarray(pixels.round().astype(np.uint8))
