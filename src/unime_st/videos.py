"""One opener for videos: a folder of frames, a list of images, an array or a file, as RGB frames and when they were.

Frames are taken at even distances, the first and the last among them; where there are no more than asked for, all are
taken. A list of images is one video; a list of folders, files, arrays or lists is several.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unime_st.arguments import require_number
from unime_st.images import IMAGE_FILES, SizeOfImage, UnreadableImageError, check_pixels, is_encoded, is_file

VIDEO_FILES = (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm", ".m4v")
"""Ends of the names of video files."""


class UnreadableVideoError(ValueError):
    """Something is there, but it is no video, or a damaged one."""


@dataclass(frozen=True)
class VideoSettings:
    """Which frames of a video a model sees, and how large.

    Args:
        num_frames: At most so many frames, at even distances; None takes all, which a long file makes very many.
        fps: Frames a second of a file, within ``num_frames``; None takes ``num_frames``. Folders, lists and arrays
            do not tell their rate: their frames are taken as chosen already.
        max_pixels: Larger frames are made smaller, keeping their shape, before the model's processor sees them.
        as_images: The model is shown a video's frames as so many images, in order: for families that take no videos.

    Raises:
        TypeError: ``as_images`` is neither True nor False.
        ValueError: A number is out of range.

    Example:
        >>> VideoSettings(num_frames=8)
        VideoSettings(num_frames=8, fps=None, max_pixels=None, as_images=False)
    """

    num_frames: int | None = 64
    fps: float | None = None
    max_pixels: int | None = None
    as_images: bool = False

    def __post_init__(self) -> None:
        require_number("num_frames", self.num_frames, least=1, optional=True)
        require_number("max_pixels", self.max_pixels, least=1, optional=True)
        require_number("fps", self.fps, whole=False, optional=True)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"`fps={self.fps}`, but it must be above 0 and finite; None takes `num_frames`.")
        if not isinstance(self.as_images, bool):
            raise TypeError(f"`as_images={self.as_images!r}`, but it is True or False.")


class Video(list[Image.Image]):
    """Opened frames in RGB, their numbers in the source, how many that has, and its rate, None if it does not tell."""

    def __init__(self, frames: Sequence[Image.Image], indices: list[int], total: int, fps: float | None = None) -> None:
        super().__init__(frames)
        self.indices, self.total, self.fps = indices, total, fps

    @property
    def metadata(self) -> dict[str, Any]:
        """What transformers' processors are told; they write the time of frames into the prompt (Qwen3-VL, SmolVLM)."""
        duration = None if self.fps is None else self.total / self.fps
        return {"total_num_frames": self.total, "fps": self.fps, "duration": duration, "frames_indices": self.indices}

    def at_least(self, count: int) -> Video:
        """The same with its last frame repeated, where a model takes no fewer."""
        lacking = max(0, count - len(self))
        return Video([*self, *self[-1:] * lacking], self.indices + self.indices[-1:] * lacking, self.total, self.fps)


def natural_order(name: str) -> list[int | str]:
    """A key that sorts numbers in names by their value.

    >>> sorted(["frame_10.jpg", "frame_2.jpg"], key=natural_order)
    ['frame_2.jpg', 'frame_10.jpg']
    """
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


def even_places(count: int, num_frames: int | None) -> list[int]:
    """The places of frames at even distances, the first and the last among them; all where there are no more.

    >>> even_places(8, 3), even_places(2, 3)
    ([0, 3, 7], [0, 1])
    """
    if num_frames is None or num_frames >= count:
        return list(range(count))
    return np.linspace(0, count - 1, num_frames, dtype=int).tolist()


def frame_files(folder: str | Path, suffixes: Sequence[str] = tuple(IMAGE_FILES)) -> list[Path]:
    """The frames that a folder holds, in the order of their numbers; a folder without any is refused."""
    found = [path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes]
    if not found:
        raise UnreadableVideoError(f"The folder {str(folder)!r} holds no frame, which are image files. Fill it.")
    return sorted(found, key=lambda path: (natural_order(path.name), path.name))  # frame_1 and frame_01 are two


def stands_for_video(text: str) -> bool:
    """Whether a bare string is the path of a video file, as stock code decides.

    >>> stands_for_video("a film called film.mp4")
    False
    """
    return text.lower().endswith(VIDEO_FILES) and is_file(text)


def videos_of(value: Any) -> list[Any]:
    """The videos that stand below ``"video"``: a list of images is one, a list of anything else several.

    >>> len(videos_of(["a.jpg", "b.jpg"])), len(videos_of([["a.jpg"], "b.mp4"])), len(videos_of(None))
    (1, 2, 0)
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        raise ValueError("A video is an empty list. Give its frames, or leave it out.")
    return [value] if all(map(_is_frame, value)) else list(value)


def _is_frame(value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim <= 3
    if isinstance(value, str | Path):
        return not (str(value).lower().endswith(VIDEO_FILES) or os.path.isdir(value))  # noqa: PTH112 (any string)
    return isinstance(value, Image.Image | bytes) or (isinstance(value, Mapping) and is_encoded(value))


def open_video(
    value: Any, settings: VideoSettings, open_frame: Callable[[Any], Image.Image], *, sizes_alone: bool = False
) -> Video:
    """Open a video; ``open_frame`` opens one frame of a list, an array or a folder.

    With ``sizes_alone`` no frame of a file is decoded, and a :class:`~unime_st.images.SizeOfImage` stands for each.

    Raises:
        FileNotFoundError: There is no such folder or file.
        UnreadableVideoError: The folder holds no frame, or the file is no video or a damaged one.
        ImportError: A file needs PyAV, which is not installed.
        TypeError: It is no video in any of these forms.
    """
    if isinstance(value, str | Path):
        if os.path.isdir(value):  # noqa: PTH112 (any string)
            value = frame_files(value)
        elif is_file(value):
            return _decoded(Path(value), settings, sizes_alone=sizes_alone)
        else:
            raise FileNotFoundError(f"There is no video {str(value)!r}, neither a file nor a folder of frames.")
    elif not isinstance(value, list | tuple) and getattr(value, "ndim", 0) != 4:
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise TypeError(
            f"A {type(value).__name__}{shape} is no video. Give a file, a folder of frames, a list of images, or an "
            "array (T, H, W, 3) or (T, 3, H, W)."
        )
    if not len(value):
        raise UnreadableVideoError("A video has no frames. Give some, or leave it out.")
    places = even_places(len(value), settings.num_frames)
    return Video([fitted(open_frame(value[at]), settings.max_pixels) for at in places], places, len(value))


def fitted(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """A frame within its bound of pixels."""
    pixels = image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / pixels)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def _decoded(path: Path, settings: VideoSettings, *, sizes_alone: bool = False) -> Video:
    """The chosen frames of a file: one pass over its packets counts them, another decodes as far as needed."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"Decoding the video {str(path)!r} needs PyAV, which is not installed: `pip install 'unime_st[video]'`. "
            "Folders of frames and lists of images need nothing."
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableVideoError(f"The file {str(path)!r} holds no video. Replace or remove it.")
            rate = container.streams.video[0].average_rate
            width, height = container.streams.video[0].width, container.streams.video[0].height
            # of a film cut without being encoded again, what lies before the cut is stored but never shown
            total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))
        fps = float(rate) if rate else None
        most = settings.num_frames
        if settings.fps is not None and fps is not None:
            wanted = max(1, round(total / fps * settings.fps))
            most = wanted if most is None else min(most, wanted)
        places = even_places(total, most)
        if sizes_alone and places:
            return Video([fitted(SizeOfImage((width, height)), settings.max_pixels)] * len(places), places, total, fps)
        wanted_places, found = set(places), {}
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                check_pixels(frame.width, frame.height)
                if number in wanted_places:
                    found[number] = fitted(frame.to_image().convert("RGB"), settings.max_pixels)
                if len(found) == len(places):
                    break
    except (av.error.FFmpegError, UnreadableImageError) as error:
        raise UnreadableVideoError(f"Cannot read the video {str(path)!r}: {error}. Replace or remove it.") from error
    if len(found) < len(places) or not found:
        raise UnreadableVideoError(
            f"The video {str(path)!r} is cut off: {len(found)} of its {len(places)} chosen frames can be decoded. "
            "Replace or remove it."
        )
    return Video([found[place] for place in places], places, total, fps)
