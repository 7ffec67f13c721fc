"""Videos that are kept as folders of frames: which frames there are, and which of them a model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from unime_st.paths import resolve_below

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
"""Ends of the names of frames, as MMEB V2 takes them."""

_Item = TypeVar("_Item")


def natural_order(name: str) -> list[int | str]:
    """A key that sorts numbers in names by their value.

    >>> sorted(["frame_10.jpg", "frame_2.jpg"], key=natural_order)
    ['frame_2.jpg', 'frame_10.jpg']
    """
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


def sample_evenly(frames: Sequence[_Item], num_frames: int | None) -> list[_Item]:
    """Choose frames at even distances, the first and the last among them; all where there are no more than asked for.

    >>> sample_evenly("abcdefgh", 3), sample_evenly("ab", 3)
    (['a', 'd', 'h'], ['a', 'b'])
    """
    if num_frames is None or num_frames >= len(frames):
        return list(frames)
    return [frames[place] for place in np.linspace(0, len(frames) - 1, num_frames, dtype=int)]


def stored_frames(root: str | Path, name: str, num_frames: int | None = None) -> list[str]:
    """The paths of a video's frames, in order, at most so many; ``name`` is its folder below the root.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no frame, or it or a frame lies outside the root.
    """
    folder = resolve_below(root, name, what="data", must_exist=False)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of frames {name!r} below {str(root)!r}. Unpack the task's frames.")
    found = sorted((path.name for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES), key=natural_order)
    if not found:
        raise ValueError(f"The folder {str(folder)!r} holds no frame ({', '.join(FRAME_SUFFIXES)}). Unpack it again.")
    return [
        str(resolve_below(root, folder / frame, what="data", must_exist=False))
        for frame in sample_evenly(found, num_frames)
    ]
