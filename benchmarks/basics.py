"""What the scripts begin and end with: where things are, arguments, kept results, tables, processes and their memory.

A script imports this first, for it sets what libraries read when they are imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[1:1] = [str(ROOT / "examples"), str(ROOT / "tests")]

import numpy as np  # noqa: E402

from unime_st.files import write_atomically  # noqa: E402

DRAWS = 2000  # of a bootstrap


def parser(
    doc: str | None, *, cache: bool = False, runs: int | None = None, output: Path | None = None
) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring, with the options that many scripts have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if cache:
        made.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="folder of the demo's packages")
    if runs:
        made.add_argument("--runs", type=int, default=runs, help="of each contender (default: %(default)s)")
    if output:
        made.add_argument("--output", type=Path, default=output, help="default: %(default)s")
    return made


def read(path: Path) -> Any:
    """What a file of JSON holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def kept(path: Path) -> dict[str, Any]:
    """What a results file holds, nothing where there is none yet."""
    return read(path) if path.is_file() else {}


def keep(path: Path, content: Any) -> None:
    """Write results, as JSON unless they are text or bytes already, and say where."""
    is_made = isinstance(content, str | bytes)
    write_atomically(path, content if is_made else json.dumps(content, indent=1) + "\n")
    print(f"written: {path}", flush=True)


def machine(**more: Any) -> dict[str, Any]:
    """What the results of this machine depend on."""
    versions = {"torch": version("torch"), "python": platform.python_version()}
    return {"cores": os.cpu_count(), "processor": platform.machine(), **versions, **more}


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    names = list(head)
    first, *others = (f"| {' | '.join(map(str, row))} |".replace("|  |", "| |") for row in (names, *rows))
    return [first, "|---" * len(names) + "|", *others]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "values": list(values)}


def percent(value: dict[str, Any]) -> str:
    """A mean over seeds with its deviation."""
    return f"{100 * value['mean']:.1f}" + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")


def difference(ours: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Of two (seeds, queries): mean, deviation over seeds, and the middle 95 % over resampled seeds and queries."""
    each = ours - reference
    rng = np.random.default_rng(0)
    rows = rng.integers(len(each), size=(DRAWS, len(each)))
    columns = rng.integers(each.shape[1], size=(DRAWS, each.shape[1]))
    means = np.array([each[row][:, column].mean() for row, column in zip(rows, columns, strict=True)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": each.mean(), "std": each.mean(1).std(ddof=1), "low": low, "high": high}


def compared(found: dict[str, float]) -> str:
    """A difference in percent with its interval, bold where that leaves out 0."""
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    text = f"{mean:+.1f} ({low:+.1f}, {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def in_process(*command: str) -> Any:
    """What a script prints last, as JSON; it runs in a process of its own, so that its memory is its own too."""
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def megabytes_of(*command: str) -> int:
    """Megabytes of the bytes that a script prints last."""
    return round(in_process(*command) / 2**20)


def resident() -> int:
    """Bytes this process holds in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def peak_mb() -> float:
    """The most megabytes this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


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
