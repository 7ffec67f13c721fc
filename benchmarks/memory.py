"""Memory of a piece of work: the most a process holds during it, over what it held before."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self


class peak_above:  # noqa: N801 used as a function
    """Most resident memory within the block, over that at its start, looked at every two milliseconds."""

    bytes = 0

    def __enter__(self) -> Self:
        self.start, self.most, self.running = resident(), resident(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.bytes = max(self.most, resident()) - self.start


def resident() -> int:
    """Bytes this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def megabytes_of(script: str, arguments: Sequence[str]) -> int:
    """Run a script in a process of its own, which prints a number of bytes last."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return round(int(done.stdout.split()[-1]) / 2**20)
