"""Chat messages to features: what the stock processor is given and asked, and what is made of its answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer

from unime_st.identity.content import Content
from unime_st.modules.cutting import cut_long_rows
from unime_st.modules.inputs import Message, refuse_placeholders, shown_media
from unime_st.modules.speed.shared_images import each_image_once
from unime_st.modules.text_only import NO_IMAGES, absent_parts
from unime_st.modules.videos import (
    as_chosen,
    check_videos,
    frames_as_images,
    frames_must_agree,
    videos_in,
    with_shapes,
)
from unime_st.placement import with_images_once
from unime_st.videos import VideoSettings, even_places

logger = logging.getLogger(__name__)

_NO_LIMIT = 10**9  # tokenizers say 10^30 when they have none


class MessageProcessor(Transformer):
    """The half of the encoder, and of the reranker, that prepares; the other half computes."""

    videos: VideoSettings
    flat_image_positions: bool
    _told_of_cuts = False

    def _features(
        self,
        messages: list[list[Message]],
        rows: Sequence[int],
        prompt: str | None,
        processing_kwargs: Any,
        *,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The stock features of messages, texts cut where they are too long, each image once."""
        placeholders = self._placeholders()
        for row, message in zip(rows, messages, strict=True):
            refuse_placeholders(message, row, placeholders)
            if absent_parts(self.model) and any(part["type"] != "text" for turn in message for part in turn["content"]):
                raise ValueError(f"Row {row} has an image or video. {NO_IMAGES}")
        if self.videos.as_images:
            messages = [frames_as_images(message) for message in messages]
        check_videos(messages, rows, self.processor, self.model.config.model_type)
        limit = min(max_length or _NO_LIMIT, self.max_seq_length or _NO_LIMIT)
        processing: Any = {**(processing_kwargs or {})}
        processing["text"] = {**processing.get("text", {}), "truncation": False}
        with each_image_once(self.processor) as shown:
            features = self._processed(messages, rows, prompt, processing_kwargs=processing, **kwargs)
            while cut := cut_long_rows(messages, features["attention_mask"], limit, rows, self.tokenizer):
                self._tell_of_cuts(limit, cut)
                features = self._processed(messages, rows, prompt, processing_kwargs=processing, **kwargs)
        if self.flat_image_positions and "mm_token_type_ids" in features:
            features["mm_token_type_ids"] = torch.zeros_like(features["mm_token_type_ids"])  # all are words
        if "pixel_values_videos" in features and "num_videos_per_sample" not in features:
            features["num_videos_per_sample"] = torch.tensor([len(videos_in(message)) for message in messages])
        if "num_images_per_sample" in features and "batch_num_images" in self._declared_forward_params:
            features["batch_num_images"] = features["num_images_per_sample"]
        if shown.index is not None:
            features = with_images_once(features, shown.index)
        return features

    def _processed(
        self, messages: list[list[Message]], rows: Sequence[int], prompt: str | None, **options: Any
    ) -> dict[str, Any]:
        """Features of messages; what the processor refuses, such as an image too narrow for it, is named by its row."""
        stock = super().preprocess
        try:
            return stock(with_shapes(messages), prompt=prompt, **as_chosen(messages, options))
        except Exception:
            for row, message in zip(rows, messages, strict=True):
                try:
                    stock(with_shapes([message]), prompt=prompt, **as_chosen([message], options))
                except Exception as error:  # processors raise whatever they come upon
                    raise ValueError(f"Row {row}{shown_media(message)} cannot be processed: {error}") from error
            raise

    @property
    def frames_must_agree(self) -> bool:
        """Whether the videos of a batch must have as many frames each, for the processor stacks or pads them."""
        return not self.videos.as_images and frames_must_agree(self.processor)

    def frame_counts(self, content: Content) -> Any:
        """The frames that are shown of each of an input's videos; where a file hides it, what no other input equals."""
        counts = content.frames
        if None in counts:
            return content.fingerprint
        return tuple(len(even_places(count or 0, self.videos.num_frames)) for count in counts)

    def _media_token_ids(self) -> list[int]:
        ids = [getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return [number for number in ids if number is not None]

    def _placeholders(self) -> set[str]:
        """Tokens that stand for media, in the prompt and in the model's input."""
        words = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video")]
        tokenizer: Any = self.tokenizer
        words += [tokenizer.convert_ids_to_tokens(number) for number in self._media_token_ids()]
        return {word for word in words if isinstance(word, str) and word}

    def _tell_of_cuts(self, limit: int, rows: int) -> None:
        if not self._told_of_cuts:
            self._told_of_cuts = True  # once is enough
            logger.warning("Texts that make a row longer than %d tokens are cut, here in %d rows.", limit, rows)
