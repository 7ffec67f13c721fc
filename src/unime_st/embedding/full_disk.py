"""The error of a full disk, worded for work that can go on from what was written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unime_st.files import FULL


@contextmanager
def explained_full_disk(folder: Path) -> Iterator[None]:
    """Within this context an error for want of space names the folder and says what to do.

    >>> with explained_full_disk(Path("cache")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] The disk of cache is full (...). What was written before is whole: free some space and ...
    """
    try:
        yield
    except OSError as error:
        by_numpy = error.errno is None and "requested and" in str(error)  # the only words it has for it
        if error.errno not in FULL and not by_numpy:
            raise
        raise OSError(
            error.errno or errno.ENOSPC,
            f"The disk of {folder} is full ({error}). What was written before is whole: free some space and call again "
            "with the same arguments, it goes on from there.",
        ) from error
