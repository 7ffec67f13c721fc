"""Folders that are there whole or not at all: made beside their place, then put there in one step."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unime_st.files import hold, one_at_a_time

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_MARK = "-unfinished-"
_OLD = "-replaced"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``target`` when the context ends without an error.

    Also after a kill the old folder or the new one is at ``target``, whole: on Linux they change places in one step.
    Where the file system cannot do that, the old one is moved aside first, and :func:`recover` puts it back after a
    kill then.
    """
    target = Path(os.path.realpath(target))  # a link stays, and what it leads to is replaced
    with one_at_a_time(target.parent):  # so that no other cleans up between a folder and its lock
        recover(target)
        _remove_leftovers(target)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MARK}", dir=target.parent))
        lock = _lock(scratch)
    try:
        yield scratch
        scratch.chmod(0o755)
        with one_at_a_time(target.parent):
            _put(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what was not finished, or the old one
        if lock is not None:
            os.close(lock)


def _put(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
    elif not _exchange(scratch, target):
        aside = scratch.with_name(f"{scratch.name}{_OLD}")
        target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """Put back a folder that a kill has left beside its place; nothing is done if something is there."""
    target = Path(os.path.realpath(target))
    if target.exists() or not target.parent.is_dir():
        return
    aside = sorted(target.parent.glob(f".{_escaped(target.name)}{_MARK}*{_OLD}"), key=lambda path: path.stat().st_mtime)
    if aside:
        aside[-1].rename(target)


def _remove_leftovers(target: Path) -> None:
    """Remove the folders of killed writers."""
    for scratch in target.parent.glob(f".{_escaped(target.name)}{_MARK}*"):
        lock = _lock(scratch)
        if lock is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a folder until its descriptor is closed, or the process ends; None if another does, or it cannot be told."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if hold(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an older C library
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
