"""From whatever a user gives to one form: chat messages with opened images."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image

from unime_st import images, videos
from unime_st.identity.content import Content
from unime_st.images import (
    DATA_PREFIX,
    IMAGE_SUFFIXES,
    bytes_or_path,
    is_encoded,
    is_remote,
    stands_for_image,
)
from unime_st.videos import VideoSettings, stands_for_video, videos_of

_LONGEST_PATH = 4096
_REMOTE = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # of whatever protocol: players know many

_SOURCES = ("video", "audio", "url", "path")  # where a part of a message says what it shows

Message = dict[str, Any]
Open = Callable[[Any], Image.Image]
Local = Callable[[Any, str], Any]


def as_messages(
    item: Any,
    row: int,
    *,
    allow_remote_images: bool = False,
    allow_blank: bool = False,
    opened: dict[Any, Any] | None = None,
    video_settings: VideoSettings | None = None,
    sizes_alone: bool = False,
) -> list[Message]:
    """Turn one input into chat messages ``{"role", "content": [{"type", ...}]}`` whose images are opened.

    ``row`` is its number among the caller's inputs, for errors. ``opened`` holds the images of a batch by their path,
    address or bytes, or as objects, and images opened here are added. Videos are opened as ``video_settings`` say, and
    stay as they are without. A text without a word is taken, as stock code
    does, only with ``allow_blank`` and if it is all that the input has. With ``sizes_alone`` no file is decoded: a
    :class:`~unime_st.images.SizeOfImage` stands for each image and frame.
    """

    def open_once(value: Any) -> Image.Image:
        key = _name_of(value)
        known = opened.get(key) if opened is not None and key is not None else None
        if known is not None:
            return known[1]
        image = open_image(value, row, allow_remote_images=allow_remote_images, sizes_alone=sizes_alone)
        if opened is not None and key is not None:
            opened[key] = (value, image)  # the value too: another object may get its number once it is gone
        return image

    def local(medium: Any, kind: str) -> Any:
        medium = _local(medium, row, kind, allow_remote_images)
        if kind != "video" or video_settings is None or isinstance(medium, Mapping) or _is_address(medium):
            return medium  # as transformers takes it
        return _open_video(medium, row, video_settings, open_once, sizes_alone=sizes_alone)

    if isinstance(item, Mapping) and "role" in item and "content" in item:
        item = [item]
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping) and "role" in item[0]:
        messages = [{**message, "content": _chat_parts(message["content"], row, open_once, local)} for message in item]
    else:
        messages = [{"role": "user", "content": _item_parts(named_input(item, row), row, open_once, local)}]
    if says_nothing(messages) and not (allow_blank and _is_blank_text(item)):
        raise ValueError(f"Row {row} holds neither text nor an image. Remove it, or give it one of them.")
    return messages


def says_nothing(messages: list[Message]) -> bool:
    """Whether an input has no medium and no word.

    >>> says_nothing([{"role": "user", "content": [{"type": "text", "text": " "}]}])
    True
    """
    parts = [part for message in messages if message["role"] != "system" for part in message["content"]]
    return not any(part["type"] != "text" or part["text"].strip() for part in parts)


def _is_blank_text(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, Mapping) and set(item) == {"text"})


def open_image(value: Any, row: int, *, allow_remote_images: bool = False, sizes_alone: bool = False) -> Image.Image:
    """Open one image in any of the accepted forms, by the one rule of :mod:`unime_st.images`; errors name the row.

    With ``sizes_alone`` only the header of a file is read, and a :class:`~unime_st.images.SizeOfImage` stands for it.
    """
    read = _sized if sizes_alone else images.open_image
    if isinstance(value, Image.Image | images.PartOfFile):
        return _seen(value, row, sizes_alone=sizes_alone)
    if isinstance(value, Mapping) and is_encoded(value):
        value = bytes_or_path(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return read(bytes(value), f"the bytes of row {row}")
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _seen(images.from_array(value, f"Row {row}"), row, sizes_alone=sizes_alone)
    if isinstance(value, str) and is_remote(value):
        if not allow_remote_images:
            raise ValueError(_not_asked_for(row, value, "image"))
        with urlopen(value, timeout=30) as answer:  # noqa: S310 (http and https only, and asked for)
            return read(answer.read(), value)
    if isinstance(value, str) and value.startswith(DATA_PREFIX):
        try:
            content = base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"The data URI of row {row} is not valid base64.") from error
        return read(content, f"the data URI of row {row}")
    if isinstance(value, (str, Path)):
        if not images.is_file(value):
            raise FileNotFoundError(
                f"Row {row}: there is no image file {str(value)!r}. Check the path and the folder it is relative to."
            )
        return read(value, f"{value} (row {row})")
    raise TypeError(
        f"Row {row}: a {type(value).__name__} is not an image, nor a text. Give a text, a PIL image, a path, "
        'bytes, numpy or torch, or {"image", "text"}.'
    )


def _sized(source: str | Path | bytes, name: str) -> Image.Image:
    return images.SizeOfImage(images.image_size(source, name))


def _seen(image: Image.Image | images.PartOfFile, row: int, *, sizes_alone: bool) -> Image.Image:
    """An image in RGB; what its file lacks is found here, and not by the processor."""
    if isinstance(image, images.PartOfFile):
        try:
            return images.SizeOfImage(image.size()) if sizes_alone else image.open()
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(f"Row {row}: {error}") from error
    if sizes_alone:
        return images.SizeOfImage(images.shown_size(image))
    try:
        image.load()
    except Exception as error:  # decoders of damaged files raise whatever they come upon
        raise ValueError(f"Row {row}: the image cannot be read: {error}. Replace or remove it.") from error
    return images.as_rgb(image, f"the image of row {row}")


def _not_asked_for(row: int, address: str, kind: str) -> str:
    return (
        f"Row {row} names a remote {kind}, {shorten(address, 80)!r}, and remote media are opened only when asked for. "
        "Download it, or pass `allow_remote_images=True` to `build_encoder` or `load_encoder`."
    )


def _local(medium: Any, row: int, kind: str, allow_remote: bool) -> Any:
    """Pass a video or sound on; a remote address in it, in its frames or in nested mappings must have been allowed."""
    if isinstance(medium, Mapping):
        return {key: _local(value, row, kind, allow_remote) for key, value in medium.items()}
    if isinstance(medium, (list, tuple)):
        return type(medium)(_local(value, row, kind, allow_remote) for value in medium)
    if isinstance(medium, str) and not allow_remote and _REMOTE.match(medium):
        raise ValueError(_not_asked_for(row, medium, kind))
    return medium


def _is_address(medium: Any) -> bool:
    return isinstance(medium, str) and bool(_REMOTE.match(medium))


def _open_video(
    medium: Any, row: int, settings: VideoSettings, open_once: Open, *, sizes_alone: bool = False
) -> videos.Video:
    """Open a video; errors name the row, those of a frame by themselves."""
    of_frames: list[Exception] = []

    def open_frame(frame: Any) -> Image.Image:
        try:
            return open_once(frame)
        except Exception as error:
            of_frames.append(error)
            raise

    try:
        return videos.open_video(medium, settings, open_frame, sizes_alone=sizes_alone)
    except (FileNotFoundError, videos.UnreadableVideoError, TypeError) as error:
        if error in of_frames:
            raise
        raise type(error)(f"Row {row}: {error}") from error


def checked_text(text: Any, name: str) -> str:
    """Pass a text on that tokenizers take, and refuse anything else under the name that errors call it.

    Half of a surrogate pair, which broken JSON and file names hold, makes a string that is no valid UTF-8.

    >>> checked_text(float("nan"), "Row 3: the text")
    Traceback (most recent call last):
    ...
    TypeError: Row 3: the text is nan, a float. Give a string, or leave it out.
    """
    if not isinstance(text, str):
        raise TypeError(
            f"{name} is {shorten(repr(text), 60)}, a {type(text).__name__}. Give a string, or leave it out."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = ascii(text[max(0, error.start - 10) : error.end + 10])
        raise ValueError(
            f"{name} is not valid UTF-8 at character {error.start}: {broken} holds half of a surrogate pair. Mend it "
            'where it was read, or pass `text.encode("utf-8", "replace").decode()`.'
        ) from error
    return text


def shown_media(messages: list[Message]) -> str:
    """What the images of an input look like, for an error message; "" when there are none.

    >>> shown_media(as_messages(Image.new("RGB", (900, 4)), 0))
    ' (an image of 900 x 4 pixels)'
    """
    sizes = [
        f"{part['image'].width} x {part['image'].height}"
        for message in messages
        for part in message["content"]
        if part["type"] == "image"
    ]
    if not sizes:
        return ""
    return f" ({'an image' if len(sizes) == 1 else 'images'} of {', '.join(sizes)} pixels)"


def _name_of(value: Any) -> str | bytes | int | images.PartOfFile | None:
    """What an image is known by within a batch: its path or bytes, or the object that it is."""
    if isinstance(value, Mapping):
        value = bytes_or_path(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Image.Image | np.ndarray | torch.Tensor):
        return id(value)
    return value if isinstance(value, str | bytes | images.PartOfFile) else None


def _item_parts(item: Any, row: int, open_once: Open, local: Local) -> list[dict[str, Any]]:
    if isinstance(item, Mapping) and not is_encoded(item):
        return _dict_parts(item, row, open_once, local)
    if item is None:
        raise ValueError(f"Row {row} is None. Remove it, or give it a text or an image.")
    if isinstance(item, (list, tuple)):
        raise TypeError(f'Row {row} is a list. Several images of one input go into {{"image": [...], "text": ...}}.')
    return [{"type": "image", "image": open_once(item)}]


def _dict_parts(item: Mapping[str, Any], row: int, open_once: Open, local: Local) -> list[dict[str, Any]]:
    unknown = sorted(str(key) for key in item if key not in ("image", "text", "video"))
    if unknown:
        raise ValueError(f"Row {row} has the unknown key(s) {', '.join(unknown)}. A dict holds image, video and text.")
    several = item.get("image")
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": open_once(image)}
        for image in (several if isinstance(several, (list, tuple)) else [several])
        if image is not None
    ]
    parts += [{"type": "video", "video": local(video, "video")} for video in videos_of(item.get("video"))]
    if item.get("text") is not None:
        text = checked_text(item["text"], f"Row {row}: the text")
        if text or not parts:
            parts.append({"type": "text", "text": text})
    return parts


def _chat_parts(content: Any, row: int, open_once: Open, local: Local) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": checked_text(content, f"Row {row}: the text")}]
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"Row {row}: the content of a message is a string or a list of parts, not a {type(content).__name__}."
        )
    return [_chat_part(part, row, open_once, local) for part in content]


def _chat_part(part: Any, row: int, open_once: Open, local: Local) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": checked_text(part, f"Row {row}: the text")}
    if not isinstance(part, Mapping):
        raise TypeError(
            f"Row {row}: a part of a message is a {type(part).__name__}. Give a string, or a mapping such as "
            '{"type": "image", "image": ...}.'
        )
    kind = part.get("type", "text")
    if kind == "text":
        return {"type": "text", "text": checked_text(part.get("text"), f"Row {row}: the text")}
    if kind == "image":
        value = next((part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None)
        return {"type": "image", "image": open_once(value)}
    if kind not in ("video", "audio"):
        raise ValueError(f"Row {row}: a part of a message is of type {kind!r}. Known are text, image, video and audio.")
    return {
        kind if key in _SOURCES else key: value
        if key == "type"
        else local(value, kind if key in _SOURCES else "medium")
        for key, value in part.items()
    }


def names_an_image(text: str, row: int) -> bool:
    """Whether a bare string stands for an image, as stock code decides: an address or an existing file.

    One word that ends as the names of image files do, but names none, is refused: most likely it is a mistyped path.
    """
    if stands_for_image(text):
        return True
    if is_remote(text) or not text.lower().endswith(IMAGE_SUFFIXES):
        return False
    if len(text) > _LONGEST_PATH or any(character.isspace() for character in text):
        return False
    raise FileNotFoundError(
        f'Row {row}: {text!r} looks like an image file, but there is none. Mend the path, or pass {{"text": ...}} to '
        "embed the words."
    )


def contents_of(inputs: Sequence[Any], rows: Sequence[int]) -> list[Content]:
    """The door: what each input says, told once; one whose content is known already passes through."""
    named = [named_input(item, row) for row, item in zip(rows, inputs, strict=True)]
    return [
        item if isinstance(item, Content) else _content(item, given, row)
        for row, item, given in zip(rows, inputs, named, strict=True)
    ]


def named_input(item: Any, row: int) -> Any:
    """What the model is given: of a bare string, the image that it names or the text that it is."""
    if isinstance(item, Content):
        return item.named
    if not isinstance(item, str):
        return item
    return {"video" if stands_for_video(item) else "image" if names_an_image(item, row) else "text": item}


def named_and_known(
    inputs: Sequence[Any], rows: Sequence[int], contents: Sequence[Content] | None
) -> tuple[list[Any], list[Content | None]]:
    """What the model is given for each input, and its content where known: not if a subclass has replaced the input."""
    told: Sequence[Content | None] = contents or [None] * len(inputs)
    pairs = list(zip(inputs, told, strict=True))
    known = [content if content is not None and content.item is item else None for item, content in pairs]
    named = [
        named_input(item, row) if content is None else content.named
        for row, item, content in zip(rows, inputs, known, strict=True)
    ]
    return named, known


def _content(item: Any, named: Any, row: int) -> Content:
    try:
        return Content(item, named=named)
    except UnicodeError as error:  # made of more than a text
        raise ValueError(f"Row {row}: {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise type(error)(f"Row {row}: {error}") from error


def refuse_placeholders(messages: list[Message], row: int, placeholders: Collection[str]) -> None:
    """Refuse a text that spells out the token that stands for an image: it would be counted as one more image.

    >>> refuse_placeholders(as_messages("a <image>", 0), 0, ["<image>"])
    Traceback (most recent call last):
    ...
    ValueError: The text 'a <image>' (row 0) holds '<image>', which is for media. Reword it.
    """
    for message in messages:
        for part in message["content"]:
            found = next((token for token in placeholders if part["type"] == "text" and token in part["text"]), None)
            if found is not None:
                raise ValueError(
                    f"The text {shorten(part['text'], 60)!r} (row {row}) holds {found!r}, which is for "
                    "media. Reword it."
                )
