"""Videos on their way to a processor: which families take them, in what batches, and all chosen frames shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unime_st.images import SizeOfImage
from unime_st.modules.inputs import Message
from unime_st.videos import Video


def videos_in(message: list[Message]) -> list[Message]:
    """The parts of an input that are videos."""
    return [part for turn in message for part in turn["content"] if part["type"] == "video"]


def frames_as_images(message: list[Message]) -> list[Message]:
    """The same with each opened video's frames as so many images in its place."""

    def shown(part: Message) -> list[Message]:
        if part["type"] == "video" and isinstance(part["video"], Video):
            return [{"type": "image", "image": frame} for frame in part["video"]]
        return [part]

    return [{**turn, "content": [new for part in turn["content"] for new in shown(part)]} for turn in message]


def frames_must_agree(processor: Any) -> bool:
    """Whether the videos of a batch must have as many frames each, for the processor stacks or pads them."""
    own = getattr(processor, "video_processor", None)
    return own is not None and "video_grid_thw" not in own.model_input_names


def check_videos(messages: list[list[Message]], rows: Sequence[int], processor: Any, family: str) -> None:
    """Refuse videos that the family does not take, or not beside what else is in the batch; lengthen too short ones."""
    shown = [videos_in(message) for message in messages]
    if not any(shown):
        return
    own: Any = getattr(processor, "video_processor", None)
    if own is None:
        row = next(row for row, parts in zip(rows, shown, strict=True) if parts)
        raise ValueError(
            f"Row {row} has a video, but the family {family} takes none. Give its frames as images, as an "
            "encoder does by itself with `videos=VideoSettings(as_images=True)`, or take Qwen2-VL, Qwen2.5-VL, "
            "Qwen3-VL, SmolVLM or LLaVA-OneVision."
        )
    for part in (part for parts in shown for part in parts):
        if isinstance(part["video"], Video):
            part["video"] = part["video"].at_least(getattr(own, "temporal_patch_size", 1))
    if frames_must_agree(processor):
        _check_counts(shown, rows, family)
        if "pixel_values" in own.model_input_names:
            _check_alone(messages, rows, family)


def _check_counts(shown: list[list[Message]], rows: Sequence[int], family: str) -> None:
    counts: dict[int, int] = {}
    for row, parts in zip(rows, shown, strict=True):
        for part in parts:
            counts.setdefault(len(part["video"]), row)
    if len(counts) > 1:
        (one, row), (two, other) = list(counts.items())[:2]
        raise ValueError(
            f"Row {row} has a video of {one} frames and row {other} one of {two}, but the family {family} takes one "
            "number in a batch. `encode` sorts them out; elsewhere give frames of one number."
        )


def _check_alone(messages: list[list[Message]], rows: Sequence[int], family: str) -> None:
    """Refuse other inputs beside videos where frames are images to the family."""
    for row, message in zip(rows, messages, strict=True):
        if not videos_in(message) or any(part["type"] == "image" for turn in message for part in turn["content"]):
            raise ValueError(
                f"Row {row} has an image or no video, but others in the batch have videos, which the family {family} "
                "takes for images. `encode` sorts rows out, but takes no image and video in one."
            )


def with_shapes(messages: list[list[Message]]) -> list[list[Message]]:
    """Messages in which zeros that take no memory, ``(T, H, W, 3)``, stand for videos of which only sizes are known."""

    def shape(part: Message) -> Message:
        video = part.get("video")
        if not (isinstance(video, Video) and isinstance(video[0], SizeOfImage)):
            return part
        return {**part, "video": np.broadcast_to(np.uint8(0), (len(video), video[0].height, video[0].width, 3))}

    return [
        [{**turn, "content": [shape(part) for part in turn["content"]]} for turn in message]
        if videos_in(message)
        else message
        for message in messages
    ]


def as_chosen(messages: list[list[Message]], options: dict[str, Any]) -> dict[str, Any]:
    """Options that have the processor show the frames that we chose, and tell it when they were."""
    shown = [part["video"] for message in messages for part in videos_in(message)]
    if not shown or not all(isinstance(video, Video) for video in shown):
        return options
    own: dict[str, Any] = {"do_sample_frames": False}
    if any(video.fps is not None for video in shown):
        own["video_metadata"] = [video.metadata for video in shown]
    processing = options["processing_kwargs"]
    return {**options, "processing_kwargs": {**processing, "video": {**own, **processing.get("video", {})}}}
