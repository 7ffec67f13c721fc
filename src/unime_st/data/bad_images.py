"""Images that cannot be opened: written down, counted, and put up with up to a limit."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where an image path stands."""

    dataset: str  # or all those it may be in
    row: int | None = None  # its number in its file or data set; None when not known
    file: str | None = None  # None when not known, or for rows of a data set in memory

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        return f"{self.dataset}{row}{f' of {self.file}' if self.file else ''}"


class BadImages:
    """A log of bad images, one JSON line each, that workers, processes and resumed runs share.

    >>> import tempfile
    >>> log = Path(tempfile.mkdtemp()) / "bad.jsonl"
    >>> bad = BadImages(log, limit=1)
    >>> bad.report("a.png", FileNotFoundError("no such file"), lambda: Place("VOC2007", 3, "original-0.parquet"))
    >>> bad_image_report(log)
    {'VOC2007': 1}
    >>> bad.report("b.png", ValueError("truncated"), lambda: Place("SUN397"))
    Traceback (most recent call last):
    ...
    ValueError: 2 images cannot be opened, more than `max_bad_images=1` allows: SUN397 1, VOC2007 1. ...
    """

    def __init__(self, log: str | Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"`max_bad_images={limit}`, but it must be 0 or more; 0 makes the first one an error.")
        self.log = Path(log).absolute()
        self.limit = limit
        self._seen: set[str] = set()

    def report(self, image: str, error: Exception, place: Callable[[], Place]) -> None:
        """Write an image down by its path, unless it is there already; ``place`` is called for a new one only."""
        if image in self._seen:
            return
        known = _read(self.log)
        if image not in known:
            where = place()
            known[image] = where.dataset
            line = {"dataset": where.dataset, "row": where.row, "file": where.file, "image": image, "error": str(error)}
            self._append(json.dumps(line))
            logger.warning("%s: %s Its row is replaced by another (%d such images so far).", where, error, len(known))
        self._seen.add(image)
        if len(known) > self.limit:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(known.values()).items()))
            raise ValueError(
                f"{len(known)} images cannot be opened, more than `max_bad_images={self.limit}` allows: {counts}. "
                f"{self.log} names them. Mend the files or remove their rows and delete that log, or raise the limit; "
                "then resume from the last checkpoint."
            )

    def _append(self, line: str) -> None:
        """Add a line by a single write, which no other process's can fall into."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, f"{line}\n".encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("Cannot write to %s (%s): not kept there: %s", self.log, error, line)


def bad_image_report(log: str | Path) -> dict[str, int]:
    """Count the different bad images of each data set.

    Args:
        log: As given to :func:`~unime_st.data.load_mmeb_train`; no file means no bad image.

    Returns:
        Data set -> number of images, most first.

    Example:
        >>> bad_image_report("none.jsonl")
        {}
    """
    return dict(Counter(_read(Path(log)).values()).most_common())


def _read(log: Path) -> dict[str, str]:
    """Data set of each image in a log; a line that a full disk has cut short is passed over."""
    known: dict[str, str] = {}
    if log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                known.setdefault(entry["image"], entry["dataset"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return known
