"""Waiting for the files of other processes: the log says so, and the wait ends at some time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

from unime_st.arguments import require_number

logger = logging.getLogger(__name__)

PATIENCE = 600.0
"""Seconds without a new file after which another process counts as gone."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 2.0
_SAY_EVERY = 60.0


class Waiting:
    """One process's wait for the files of others, told in the log; each new file gives them their whole time again.

    >>> waiting = Waiting("Teacher", Path("cache"), patience=0.05)
    >>> rounds = 0
    >>> while waiting.goes_on([1], "3 inputs"):
    ...     rounds += 1
    >>> rounds > 0
    True
    """

    def __init__(self, description: str, folder: Path, patience: float = PATIENCE) -> None:
        require_number("patience", patience, above=0, whole=False)
        self._description, self._folder, self._patience = description, folder, patience
        self._began = self._news = time.monotonic()
        self._since = time.strftime("%H:%M:%S")
        self._said = -math.inf
        self._pause = _FIRST_PAUSE

    def news(self) -> None:
        """A file has come."""
        self._news, self._pause = time.monotonic(), _FIRST_PAUSE

    def goes_on(self, ranks: Iterable[int], owed: str) -> bool:
        """Sleep a moment; return whether there is still hope that ``ranks`` bring what is ``owed``."""
        now = time.monotonic()
        left = self._patience - (now - self._news)
        if left <= 0:
            return False
        if now - self._said >= _SAY_EVERY:
            first = self._said == -math.inf
            self._said = now
            logger.log(
                logging.INFO if first else logging.WARNING,
                "%s: this process is done and waits for %s from rank %s in %s, since %s (%.0f s). If nothing comes for "
                "another %.0f s, it does that part itself.",
                self._description, owed, ", ".join(map(str, sorted(ranks))), self._folder, self._since,
                now - self._began, left,
            )  # fmt: skip
        time.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True

    def give_up(self, ranks: Iterable[int], owed: str) -> None:
        """Say that the part of others is done here from now on."""
        logger.warning(
            "%s: rank %s owes %s, and no file came to %s for %.0f s; doing that here. Is it still running, and does it "
            "make this call? `patience` sets how long to wait.",
            self._description, ", ".join(map(str, sorted(ranks))), owed, self._folder, self._patience,
        )  # fmt: skip
