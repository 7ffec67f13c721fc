"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk."""

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_PARTIAL = ".partial"
_ATTEMPTS = 3
_PART = 1 << 20  # bytes of an array that are in memory at once


def write_atomically(path: Path, content: bytes | str | np.ndarray) -> None:
    """Write bytes, text (as UTF-8) or an array (never pickled) under another name, then rename: whole or not at all.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "deep" / "a.txt"
    >>> write_atomically(path, "whole")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('whole', 1)
    """
    _write_whole(path, content, Path.replace)


def create_exclusively(path: Path, content: str) -> bool:
    """Write a file that is not there yet, whole or not at all; False if it is there, and then nothing is touched.

    Where the file system has no hard links, of two that begin in the same instant the last one's is kept.
    """
    if path.exists():
        return False
    try:
        _write_whole(path, content, _link)
    except FileExistsError:
        return False
    return True


def _link(partial: Path, path: Path) -> None:
    """Give a file its name unless another has it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        if path.exists():
            raise FileExistsError(path) from None
        partial.replace(path)


def _write_whole(path: Path, content: bytes | str | np.ndarray, put: Callable[[Path, Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for attempt in count():
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
            try:
                _write(partial, content, path, put)
            except FileNotFoundError:  # a cleaner that cannot see locks took it for a dead writer's
                if attempt == _ATTEMPTS:
                    raise
            else:
                return
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"The disk of {path.parent} is full, so {path.name} was not written; what is there is whole. Free some "
            "space and start again: it goes on from there",
        ) from error


def _write(partial: Path, content: bytes | str | np.ndarray, path: Path, put: Callable[[Path, Path], Any]) -> None:
    try:
        with partial.open("xb") as file:
            hold(file.fileno(), wait=True)
            if isinstance(content, np.ndarray):
                # Into a real file numpy writes in C, and a full disk has no number then.
                np.save(SimpleNamespace(write=file.write), content, allow_pickle=False)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while the lock is held
                put(partial, path)
        if fcntl is None:  # Windows renames no open file
            put(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write under, whose file takes the place of ``path`` when the context ends without an error.

    For libraries that write to a name alone; :func:`write_atomically` takes content.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with whole_file(path) as partial:
        ...     written = partial.write_text("whole")
        ...     print(path.exists())
        False
        >>> path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            hold(descriptor, wait=True)
            yield partial
            os.fsync(descriptor)
            if fcntl is not None:  # while the lock is held
                partial.replace(path)
        finally:
            os.close(descriptor)
        if fcntl is None:  # Windows renames no open file
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class StoredArray:
    """An array (N, ...) that lies in a file in C order, and is read in parts.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a"
    >>> _ = path.write_bytes(np.arange(6, dtype="<f4").tobytes())
    >>> StoredArray(path, np.dtype("<f4"), (2, 2), 8).rows(np.array([1, 0])).tolist()
    [[4.0, 5.0], [2.0, 3.0]]
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Read rows by their numbers ``(n,)``; ``ValueError`` if the file has become shorter."""
        shape, row_bytes = self.shape[1:], self.num_bytes // self.shape[0]
        found = np.empty((len(numbers), *shape), self.dtype)
        order = np.argsort(numbers, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(numbers[order]) != 1) + 1) if len(order) else []
        with self.path.open("rb", buffering=0) as file:  # a memory map would hold whole stretches around each row
            for run in runs:
                file.seek(self.start + int(numbers[run[0]]) * row_bytes)
                found[run] = np.fromfile(file, self.dtype, len(run) * math.prod(shape)).reshape(len(run), *shape)
        return found

    def parts(self) -> Iterator[bytes]:
        """Read its bytes in order."""
        left = self.num_bytes
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left > 0 and (part := file.read(min(left, _PART))):
                left -= len(part)
                yield part


def checksum(*values: np.ndarray | StoredArray | bytes | str) -> str:
    """Hash what a file holds, array by array; it is kept inside the file and compared when that is read.

    >>> checksum(np.zeros(2)) == checksum(np.zeros(2)), checksum("ab", "c") == checksum("a", "bc")
    (True, False)
    """
    total = hashlib.sha256()  # twice as fast as blake2b where the processor helps
    for value in values:
        if isinstance(value, StoredArray):
            parts: Iterable[Any] = value.parts()
            kind, length = f"{value.dtype.str}{value.shape}", value.num_bytes
        elif isinstance(value, np.ndarray):
            parts = [np.ascontiguousarray(value).reshape(-1).view(np.uint8)]
            kind, length = f"{value.dtype.str}{value.shape}", value.nbytes
        else:
            content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            parts, kind, length = [content], type(value).__name__, len(content)
        total.update(f"{kind}:{length}:".encode())
        for part in parts:
            total.update(part)
    return total.hexdigest()[:32]


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half-written in a folder, which nobody holds a lock on any more."""
    for partial in folder.glob(f".*{_PARTIAL}"):
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except OSError:
            continue
        try:
            if hold(descriptor):
                partial.unlink(missing_ok=True)
        except OSError:  # of a disk that is read-only
            continue
        finally:
            os.close(descriptor)


class FolderLock:
    """Held by all processes of a run that writes into a folder, so that others can tell whether one is at work.

    On a disk that is read-only, where none can be at work, it holds nothing.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with FolderLock(folder) as first:
    ...     alone = first.alone()
    ...     with FolderLock(folder) as second:
    ...         print(alone, second.alone())
    True False
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
        else:
            hold(self._descriptor, shared=True, wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            _let_go(self._descriptor)

    def alone(self) -> bool:
        """Whether no other process holds it; False where the file system has no locks."""
        if self._descriptor is None:
            return False
        alone = hold(self._descriptor)
        hold(self._descriptor, shared=True, wait=True)
        return alone

    def others(self) -> bool:
        """Whether another process holds it too; False where that cannot be told."""
        if self._descriptor is None or fcntl is None:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        finally:
            hold(self._descriptor, shared=True, wait=True)
        return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Within this context no other process is in it with the same folder: it waits; the folder is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        hold(descriptor, wait=True)
        yield
    finally:
        _let_go(descriptor)


def _let_go(descriptor: int) -> None:
    """Unlock and close; closing alone would leave the lock to a process that was forked meanwhile."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def hold(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another has it, or the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
