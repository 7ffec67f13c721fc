"""What an input says, found out once: its texts and media, in their order, and the numbers that stand for them.

An input is flattened into its parts and the parts are hashed, so that ``"a cat"``, ``{"text": "a cat"}`` and a chat
message that says so are one content. A video is its frames: a folder of them and the list of its files are one. Two
identities of images exist:

* *encoded* images (a path, bytes, a ``datasets`` cell that is not decoded) are known by the bytes of the file, so a
  path, a copy of the file and the file's bytes are one content, and nothing is decoded;
* *decoded* images (PIL, numpy, torch) are known by their pixels, as :mod:`unime_st.images` shows them to a model,
  whatever file they came from.

An encoded and a decoded form of one picture do not compare equal: give both in the same form where that matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unime_st.identity.digests import medium_digest
from unime_st.images import is_encoded, stands_for_image
from unime_st.videos import frame_files, stands_for_video, videos_of

_DIGEST_BYTES = 16
_ID_MASK = 2**63 - 1
_MEDIA = ("image", "video", "audio")


class Part(NamedTuple):
    """One text or medium of an input."""

    kind: str  # "text", "image", "video", "audio", or "role" where another than the user speaks
    said: str | bytes  # the text; the digest of a medium
    pixels: int = 0  # of a PIL image; 1 for any other medium, and 0 for a text
    frames: int | None = None  # of a video, where that is known without opening it
    instructs: bool = False  # whether it is an instruction (the text of a system message), which is no content


class Content:
    """An input, and what it says; its files are read and its pixels hashed when this is made, and never again.

    ``item`` is a text, an image (PIL, path, bytes, numpy, torch), ``{"image", "text"}`` where the image may be a list,
    chat messages, or a list of media. A string at the top is an image if it stands for one
    (:func:`~unime_st.images.stands_for_image`), else a text; below ``"image"`` it is a path, URL or data URI, below
    ``"text"`` always text. URLs are not fetched: the address is the identity. Without ``read_files`` an image's path is
    known as written, which costs no reading but takes two copies of a file for two images. ``named`` is the same input,
    but a bare string that names an image, or was found to be a text, stands in a dict.

    >>> content = Content({"image": Image.new("RGB", (4, 3), "grey"), "text": "a cat"})
    >>> content.text, len(content.media), content.pixels
    ('a cat', 1, 12)
    >>> content.id == Content({"text": "a cat"}).id
    False
    """

    __slots__ = ("_digest", "_parts", "item", "named")

    def __init__(self, item: Any, *, read_files: bool = True, named: Any = None) -> None:
        if named is None:  # a bare string may yet be a mistyped path: the door says so
            named = _named(item) if isinstance(item, str) else item
        self.item, self.named = item, named
        if isinstance(item, str) and (named is item or "text" in named):  # most inputs are one text
            self._parts: tuple[Part, ...] = (Part("text", item),) if item else ()
        else:
            self._parts = tuple(_parts(named, read_files))
        self._digest: bytes | None = None

    def __repr__(self) -> str:
        return repr(self.item)

    def given_as(self, item: Any) -> Content:
        """The same content, for the model in another form: its image opened and scaled, say."""
        if item is self.item:
            return self
        other = object.__new__(type(self))
        other.item = other.named = item
        other._parts, other._digest = self._parts, self._digest
        return other

    @property
    def fingerprint(self) -> str:
        """Hash of everything that is said, instructions too; 32 hexadecimal digits."""
        if self._digest is None:
            self._digest = _digest(self._parts)
        return self._digest.hex()

    @property
    def id(self) -> int:
        """Integer in [0, 2^63) of what is said, instructions left out."""
        if any(part.instructs for part in self._parts):
            digest = _digest(part for part in self._parts if not part.instructs)
        else:
            digest = bytes.fromhex(self.fingerprint)
        return int.from_bytes(digest[:8], "big") & _ID_MASK

    @property
    def media(self) -> tuple[bytes, ...]:
        """A digest for each image, video and sound, in their order."""
        return tuple(part.said for part in self._parts if isinstance(part.said, bytes))

    @property
    def text(self) -> str:
        """All texts, one after the other, instructions left out."""
        return "".join(str(part.said) for part in self._parts if part.kind == "text" and not part.instructs)

    @property
    def pixels(self) -> int:
        """The number of pixels of all media; a medium that is no PIL image counts as 1."""
        return sum(part.pixels for part in self._parts)

    @property
    def frames(self) -> tuple[int | None, ...]:
        """The frames of each video; None of one that must be opened to know."""
        return tuple(part.frames for part in self._parts if part.kind == "video")

    @property
    def shows_video(self) -> bool:
        """Whether there is a video: in some families nobody can tell whose its frames are in a batch."""
        return any(part.kind == "video" for part in self._parts)


def _named(text: str) -> Any:
    """The image or video that a bare string names, else the string."""
    if stands_for_image(text):
        return {"image": text}
    return {"video": text} if stands_for_video(text) else text


def takes_contents(model: Any) -> bool:
    """Whether ``encode`` of a model is ours, which takes contents in place of inputs and does not hash them again.

    The method is asked: a wrapper, or a subclass with another ``encode``, gets the inputs themselves.
    """
    ours = getattr(getattr(type(model), "encode", None), "takes_contents", False)
    return ours and "encode" not in getattr(model, "__dict__", {})


def fingerprint(item: Any, *, read_files: bool = True) -> str:
    """Hash everything an input says (see :class:`Content`), the instructions of a chat too: 32 hexadecimal digits.

    >>> fingerprint("a cat") == fingerprint({"text": "a cat", "image": None})
    True
    >>> fingerprint("a cat") == fingerprint([{"role": "user", "content": "a cat"}])
    True
    >>> grey = Image.new("RGB", (2, 2), "grey")
    >>> fingerprint({"image": grey, "text": "a cat"}) == fingerprint({"image": grey, "text": "a dog"})
    False
    """
    return Content(item, read_files=read_files).fingerprint


def content_id(item: Any, *, read_files: bool = True) -> int:
    """Integer in [0, 2^63) for an input's content (see :class:`Content`), instructions (system messages) left out.

    >>> system = {"role": "system", "content": "Say it in one word."}
    >>> content_id([system, {"role": "user", "content": "a cat"}]) == content_id("a cat")
    True
    """
    return Content(item, read_files=read_files).id


def _digest(parts: Iterable[Part]) -> bytes:
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        said = part.said if isinstance(part.said, bytes) else part.said.encode("utf-8", "surrogatepass")
        total.update(f"{part.kind}:{len(said)}:".encode())
        total.update(said)
    return total.digest()


def _parts(item: Any, read_files: bool) -> Iterator[Part]:
    if isinstance(item, str):
        if item:
            yield Part("text", item)
    elif isinstance(item, Mapping) and "role" in item and "content" in item:
        yield from _message_parts(item, read_files)
    elif isinstance(item, Mapping) and not is_encoded(item):
        yield from _dict_parts(item, read_files)
    elif isinstance(item, (list, tuple)):
        for element in item:
            yield from _parts(element, read_files)
    elif item is not None:
        yield _medium("image", item, read_files)


def _message_parts(message: Mapping[str, Any], read_files: bool) -> Iterator[Part]:
    instructs = message["role"] == "system"  # images of such a message are content all the same
    if message["role"] != "user":
        role = str(message["role"])
        role.encode()  # half a surrogate pair is no role
        yield Part("role", role, instructs=instructs)
    for part in _said(message["content"], read_files):
        yield part if part.kind in _MEDIA or not instructs else part._replace(instructs=True)


def _said(content: Any, read_files: bool) -> Iterator[Part]:
    """Parts of a message's content."""
    if not isinstance(content, (list, tuple)):
        yield from _parts(content, read_files)
        return
    for part in content:
        if isinstance(part, Mapping) and "type" in part:
            kind = str(part["type"])
            value = part[kind] if kind in part else next((v for k, v in part.items() if k != "type"), None)
            yield from _dict_parts({kind: value}, read_files)
        else:
            yield from _parts(part, read_files)


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
        several = value if isinstance(value, (list, tuple)) else [value]
        for medium in videos_of(value) if kind == "video" else several:
            if medium is not None:
                yield _medium(kind, medium, read_files)
    text = item.get("text")
    for piece in text if isinstance(text, (list, tuple)) else [text]:
        if piece is None or (isinstance(piece, str) and not piece):
            continue
        if not isinstance(piece, str):
            raise TypeError(f"A text is {piece!r}, a {type(piece).__name__}. Give a string, or leave the text out.")
        yield Part("text", piece)


def _medium(kind: str, value: Any, read_files: bool) -> Part:
    if kind != "video":
        return Part(kind, medium_digest(value, read_files), _pixels(value))
    frames = value
    if read_files and isinstance(value, (str, Path)) and Path(value).is_dir():
        frames = frame_files(value)
    if isinstance(frames, (str, Path, Mapping)) or not hasattr(frames, "__len__"):
        return Part(kind, medium_digest(value, read_files), 1)
    pixels = sum(map(_pixels, frames)) if isinstance(frames, (list, tuple)) else len(frames)
    return Part(kind, medium_digest(value, read_files), pixels, len(frames))


def _pixels(value: Any) -> int:
    return value.width * value.height if isinstance(value, Image.Image) else 1
