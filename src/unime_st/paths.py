"""Paths that data name: files below the folder they belong to, and nowhere else, for data come from strangers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

_LONGEST_SHOWN = 200


def resolve_below(folder: str | Path, relative: str | Path, *, what: str = "image", must_exist: bool = True) -> Path:
    """Find a file below a folder, and nowhere else: its absolute path, symbolic links followed.

    Absolute paths are taken where they lead below the folder. Files of a snapshot that the Hub's client has fetched are
    links to ``blobs`` beside the snapshots, and count as below it. ``what`` is looked for, in messages.

    Raises:
        ValueError: When the path climbs out by ``..``, is one of another system's absolute ones, or leads out of the
            folder, through a symbolic link or not.
        FileNotFoundError: When there is no such file, nor can be, as with a null byte in the name.

    Example:
        >>> resolve_below("images", "../secret.png")
        Traceback (most recent call last):
        ...
        ValueError: Image path '../secret.png' leaves the image folder 'images'. ...
    """
    name = str(relative)
    try:
        root = Path(os.path.realpath(folder))
        path = Path(os.path.realpath(root / name))
    except ValueError as error:  # a null byte, or what no file system can spell
        raise _missing(folder, name, what, str(error)) from error
    if _is_foreign(name) or not any(path.is_relative_to(fence) for fence in _fences(root)):
        argument = "`image_root`" if what == "image" else "folder"
        raise ValueError(
            f"{what.capitalize()} path {_shown(name)} leaves the {what} folder {str(folder)!r}. Paths must stay below "
            f"it, symbolic links included; copy the {what} inside or give another {argument}."
        )
    if must_exist:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError as error:
            raise _missing(folder, name, what) from error
        except OSError as error:  # no right to look, a name too long, links in a circle
            raise _missing(folder, name, what, error.strerror) from error
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise _missing(folder, name, what, "what is there is no regular file")
    return path


def _is_foreign(name: str) -> bool:
    """Whether a path climbs, or is absolute on another system than this."""
    there = PureWindowsPath(name)  # knows both kinds of slash
    return ".." in there.parts or bool(there.anchor and not Path(name).is_absolute())


def _fences(root: Path) -> Iterator[Path]:
    """Where a path below a folder may lead; the later ones are asked for seldom."""
    yield root
    yield from (parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")


def _missing(folder: str | Path, name: str, what: str, reason: str | None = None) -> FileNotFoundError:
    advice = "Unpack the data set's images there, or give `image_root`." if what == "image" else "Check the folder."
    return FileNotFoundError(
        f"There is no {what} {_shown(name)} below {str(folder)!r}{f' ({reason})' if reason else ''}. {advice}"
    )


def _shown(name: str) -> str:
    return repr(name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...")
