"""Videos that are kept as folders of frames below a benchmark's folder."""

from __future__ import annotations

import os
from pathlib import Path

from unime_st.paths import resolve_below
from unime_st.videos import even_places, frame_files

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
"""Ends of the names of frames, as MMEB V2 takes them."""


def stored_frames(root: str | Path, name: str, num_frames: int | None = None) -> list[str]:
    """The paths of a video's frames, in order, at most so many; ``name`` is its folder below the root.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no frame, or it or a frame lies outside the root.
    """
    folder = resolve_below(root, name, what="data", must_exist=False)
    if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for a name too long)
        raise FileNotFoundError(f"There is no folder of frames {name!r} below {str(root)!r}. Unpack the task's frames.")
    found = frame_files(folder, FRAME_SUFFIXES)
    return [
        str(resolve_below(root, found[place], what="data", must_exist=False))
        for place in even_places(len(found), num_frames)
    ]
