"""Turns texts with numbered image placeholders, and images, into the inputs of Phi-3-Vision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

_NUMBERED = re.compile(r"<\|image_(\d+)\|>")
IMAGE_TOKEN = "<|image|>"  # noqa: S105 (a token of the vocabulary)


class Phi3VProcessor(ProcessorMixin):
    """The tokenizer and the image processor of Phi-3-Vision in one.

    ``<|image_1|>``, ... name the images of a row, in order; each becomes the id of ``<|image|>``, once for every
    embedding of the image. As in the published code, each text between images is tokenized separately, so a tokenizer
    that begins a text with a special token adds it after each image.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer has no {IMAGE_TOKEN!r}, so it is not that of a phi3_v model. Check the files it comes "
                "from."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """The names of a call's outputs."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Make the inputs of a batch, of images flat or by row; placeholders must name those of a row in order."""
        if text is None:
            raise ValueError("Phi3VProcessor needs `text`; an image goes in as '<|image_1|>'.")
        rows = [text] if isinstance(text, str) else list(text)
        kinds: Any = getattr(self, "valid_processor_kwargs", ProcessingKwargs)  # older versions need this argument
        merged = self._merge_kwargs(kinds, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options = dict(merged["text_kwargs"])
        pieces = [_NUMBERED.split(row) for row in rows]
        by_row = _images_by_row(images, [len(own) // 2 for own in pieces])
        for number, (own, pictures) in enumerate(zip(pieces, by_row, strict=True)):
            _check_numbers(number, [int(name) for name in own[1::2]], len(pictures))
        pictures = list(chain.from_iterable(by_row))
        features = self.image_processor(pictures, **merged["images_kwargs"]) if pictures else {}
        counts = iter(self._token_counts(features))
        lengths = [[next(counts) for _ in own] for own in by_row]
        return_tensors = options.pop("return_tensors", None)
        tokens = self._tokenize([own[::2] for own in pieces], lengths, options)
        return BatchFeature({**tokens, **features}, tensor_type=return_tensors)

    def _token_counts(self, features: Any) -> list[int]:
        edge = self.image_processor.crop_size
        sizes = torch.as_tensor(features["image_sizes"]).tolist() if features else []
        return [self.image_processor.count_grid_tokens(width // edge, height // edge) for height, width in sizes]

    def _tokenize(
        self, texts: list[list[str]], lengths: list[list[int]], options: dict[str, Any]
    ) -> dict[str, list[list[int]]]:
        """Token ids of rows whose texts are interleaved with images, given each image's number of embeddings."""
        padding = {key: options.pop(key, None) for key in ("padding", "pad_to_multiple_of", "padding_side")}
        truncation, limit = options.pop("truncation", None), options.pop("max_length", None)
        wanted = {**options, "padding": False, "return_attention_mask": False}
        flat = iter(self.tokenizer(list(chain.from_iterable(texts)), **wanted)["input_ids"])
        ids: list[list[int]] = []
        for own, images in zip(texts, lengths, strict=True):
            row = list(next(flat))
            for length, _ in zip(images, own[1:], strict=True):
                row += [self.image_token_id] * length + list(next(flat))
            ids.append(row)
        is_cut = truncation not in (None, False, "do_not_truncate") or (truncation is None and limit is not None)
        if is_cut:
            ids = self._cut(ids, limit or self.tokenizer.model_max_length)
        padded = self.tokenizer.pad(
            {"input_ids": ids},
            max_length=limit,
            padding=padding["padding"] or False,
            pad_to_multiple_of=padding["pad_to_multiple_of"],
            padding_side=padding["padding_side"],
        )
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}

    def _cut(self, ids: list[list[int]], limit: int) -> list[list[int]]:
        for number, row in enumerate(ids):
            if self.image_token_id in row[limit:]:
                raise ValueError(
                    f"Row {number} has {len(row)} tokens, and cutting it to {limit} would cut an image. Raise the "
                    "limit, or give smaller or fewer images, or a lower `num_crops`."
                )
        return [row[:limit] for row in ids]


def _images_by_row(images: Any, named: list[int]) -> list[list[Any]]:
    """The images of each row; a flat list is dealt out by the number that each row names."""
    if images is None:
        return [[] for _ in named]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(own, (list, tuple)) or own is None for own in images):
        if len(images) != len(named):
            raise ValueError(f"There are {len(named)} texts, but images of {len(images)} rows. Give a list a row.")
        return [list(own or []) for own in images]
    if len(images) != sum(named):
        raise ValueError(
            f"The texts name {sum(named)} images ('<|image_1|>', ...), but {len(images)} came with them. Name each "
            "once."
        )
    left = iter(images)
    return [[next(left) for _ in range(count)] for count in named]


def _check_numbers(row: int, named: list[int], count: int) -> None:
    if named != list(range(1, count + 1)):
        names = ", ".join(f"<|image_{number}|>" for number in named) or "none"
        raise ValueError(
            f"Row {row} has {count} image(s), but its text names {names}. Name them <|image_1|>, <|image_2|>, ... in "
            "order, once each, and nowhere else in the text."
        )
