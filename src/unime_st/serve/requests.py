"""What may be asked, and how it becomes inputs of a model: texts stay texts, and no path or address is opened."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from unime_st.serve.limits import MOST_INPUTS, Limits, Room
from unime_st.serve.uploads import bytes_of, open_bounded

ADVICE = {
    "input": '`input` is a text, {"image": data URI, "text": ...} with either or both, or a list of these.',
    "messages": "`messages` are one of the user, whose content is a text or a list of parts of type text or image_url, "
    "and before it one of the system if there is an instruction.",
    "encoding_format": "`encoding_format` is float or base64.",
}
"""Field -> what it may be, for errors; others are described by pydantic."""

_MOST_FIELDS = 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_parts(cls, given: Any) -> Any:
        """An error for each of a hundred thousand parts would cost more than the request."""
        if isinstance(given, dict):
            lists = [value for value in given.values() if isinstance(value, list)]
            if len(given) > _MOST_FIELDS or any(len(value) > MOST_INPUTS for value in lists):
                raise ValueError(f"more than {_MOST_FIELDS} fields, or than {MOST_INPUTS:,} parts in one")
        return given


class Item(_Strict):
    """An input: a text, an image as a data URI, or both."""

    image: str | None = None
    text: str | None = None


class TextPart(_Strict):
    """A text of a chat message."""

    type: Literal["text"]
    text: str


class ImageAddress(_Strict):
    """A data URI, as chat messages spell it."""

    url: str
    detail: str | None = None


class ImagePart(_Strict):
    """An image of a chat message."""

    type: Literal["image_url"]
    image_url: ImageAddress | str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """A chat message."""

    role: Literal["system", "user"]
    content: str | list[Part]


class EmbeddingsRequest(_Strict):
    """OpenAI's request, with images: as items of ``input``, or as ``messages`` of one chat, as vLLM takes them."""

    model: str | None = None
    input: str | Item | list[str | Item] | None = None
    messages: list[Message] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    instruction: str | None = None
    user: str | None = None


class SearchRequest(_Strict):
    """A query: a text, an image or both, or a row of the corpus."""

    text: str | None = None
    image: str | None = None
    like: int | None = None
    instruction: str | None = None
    prefix: str | None = None
    k: int = Field(24, ge=1)


class Reader:
    """Makes a request's inputs; counts their characters and pixels, and gives the pixels back when left.

    Args:
        limits: The bounds of a request.
        pixels: The pixels of all requests.
    """

    def __init__(self, limits: Limits, pixels: Room) -> None:
        self.limits, self.room = limits, pixels
        self.pixels = self.characters = 0

    def __enter__(self) -> Self:
        """Begin a request."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.room.give_back(self.pixels)

    def item(self, image: str | None, text: str | None, name: str) -> dict[str, Any]:
        """An input of the model.

        Raises:
            HTTPException: When it is empty, too large, or not an image.
        """
        item: dict[str, Any] = {}
        if image:
            item["image"] = self.image(image, f"The image of {name}")
        if text and text.strip():
            item["text"] = self.text(text)
        if not item:
            raise HTTPException(400, f"There is nothing in {name}. Give a text, an image or both.")
        return item

    def text(self, text: str) -> str:
        """A text, counted."""
        self.characters += len(text)
        if self.characters > self.limits.max_characters:
            raise HTTPException(
                413, f"The texts have more than the {self.limits.max_characters:,} characters that a request may have."
            )
        return text

    def image(self, data_uri: str, name: str) -> Any:
        """An image, decoded."""
        return open_bounded(bytes_of(data_uri, name), name, self._take_pixels)

    def _take_pixels(self, pixels: int) -> None:
        if self.pixels + pixels > self.limits.max_pixels:
            raise HTTPException(
                413,
                f"The images have more than the {self.limits.max_pixels:,} pixels that are allowed. Shrink them.",
            )
        self.room.take(pixels)
        self.pixels += pixels


def inputs_of(asked: EmbeddingsRequest, reader: Reader) -> tuple[list[Any], str | None]:
    """The inputs of a request, and its instruction.

    Raises:
        HTTPException: For what cannot be embedded, naming it.
    """
    instruction = reader.text(asked.instruction) if asked.instruction else None
    if (asked.input is None) == (asked.messages is None):
        raise HTTPException(400, "Give `input` or `messages`, one of them.")
    if asked.messages is not None:
        if instruction:
            raise HTTPException(400, "With `messages` the instruction is that of the system. Leave `instruction` out.")
        return _chat(asked.messages, reader)
    items: list[Any] = asked.input if isinstance(asked.input, list) else [asked.input]
    if not 1 <= len(items) <= reader.limits.max_inputs:
        raise HTTPException(
            400 if not items else 413, f"`input` has {len(items)} inputs, and may have 1 to {reader.limits.max_inputs}."
        )
    whole = [Item(text=item) if isinstance(item, str) else item for item in items]
    return [reader.item(item.image, item.text, f"input {place}") for place, item in enumerate(whole)], instruction


def query_of(asked: SearchRequest, reader: Reader) -> tuple[list[Any], str | None]:
    """The one input of a search, and its instruction.

    Raises:
        HTTPException: For what cannot be embedded.
    """
    instruction = reader.text(asked.instruction) if asked.instruction and asked.instruction.strip() else None
    return [reader.item(asked.image, asked.text, "the query")], instruction


def advice(error: RequestValidationError) -> HTTPException:
    """What is wrong with a request, in words, without repeating what it holds."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return HTTPException(400, "The body is no valid JSON.")
    place = [str(part) for part in first["loc"][1:]]
    if place and place[0] in ADVICE:
        return HTTPException(400, ADVICE[place[0]])
    return HTTPException(400, f"`{'.'.join(place)[:100] or 'body'}`: {first['msg'].removeprefix('Value error, ')}.")


def _chat(messages: list[Message], reader: Reader) -> tuple[list[Any], str | None]:
    roles = [message.role for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise HTTPException(400, ADVICE["messages"])
    instruction = None
    if len(messages) == 2:
        parts = _parts(messages[0], reader)
        if any(part["type"] != "text" for part in parts):
            raise HTTPException(400, "The message of the system is an instruction: a text.")
        instruction = "\n".join(part["text"] for part in parts)
    return [[{"role": "user", "content": _parts(messages[-1], reader)}]], instruction


def _parts(message: Message, reader: Reader) -> list[dict[str, Any]]:
    """The parts of a message as the model takes them."""
    if isinstance(message.content, str):
        return [{"type": "text", "text": reader.text(message.content)}]
    read: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, TextPart):
            read.append({"type": "text", "text": reader.text(part.text)})
        else:
            address = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            read.append({"type": "image", "image": reader.image(address, "The image of the message")})
    return read


def texts_of(item: Any) -> str:
    """All that an input says in words."""
    if isinstance(item, dict):
        return item.get("text", "")
    return "\n".join(part["text"] for part in item[0]["content"] if part["type"] == "text")
