"""What the parts share: arguments, results that are kept after each measurement, times, models."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LIBRARIES = ("torch", "transformers", "sentence-transformers", "accelerate", "peft", "numpy")


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="measure only what has this in its name, of parts that can")
    parser.add_argument("--tiny", action="store_true", help="small models and inputs, to see that it runs")
    return parser.parse_args()


def machine(device: str) -> dict[str, Any]:
    """The card and the versions."""
    found: dict[str, Any] = {name: version(name) for name in LIBRARIES}
    found["python"] = platform.python_version()
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(0)
        found |= {"card": about.name, "GiB": round(about.total_memory / 2**30), "cuda": torch.version.cuda}
        with suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.check_output(asked, text=True, timeout=20).strip()
    else:
        found["card"] = "none: CPU"
    return found


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where it can be."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


class Results:
    """What a part has found, written after each measurement."""

    def __init__(self, part: str, given: argparse.Namespace) -> None:
        self.path = given.out / f"{part}.json"
        self.started = time.monotonic()
        self.found: dict[str, Any] = {"part": part, "tiny": given.tiny, "machine": machine(given.device)}
        self.found |= {"measured": {}, "errors": {}}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Keep what ``work`` gives, or its error."""
        begun = time.monotonic()
        try:
            value = self.found["measured"][name] = work()
            shown = json.dumps(value)
        except Exception as error:  # noqa: BLE001 (kept and shown)
            told = "".join(traceback.format_exception(error)).splitlines()
            value, shown = None, f"FAILED: {told[-1]}"
            self.found["errors"][name] = told[:2] + told[-24:]
        self.found["seconds"] = round(time.monotonic() - self.started, 1)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{name} [{time.monotonic() - begun:.1f} s]: {shown[:300]}", flush=True)
        return value

    def made(self, name: str, make: Callable[[Path], Any]) -> Any:
        """What ``make`` gives of a folder that is in memory where it can be, and is gone afterwards."""
        found = []

        def work() -> Any:
            found.append(make(Path(scratch)))
            return getattr(found[0], "about", "yes")

        with scratch_folder() as scratch:
            self.measure(name, work)
        return found[0] if found else None


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str, runs: int = 1) -> tuple[list[float], Any]:
    """Wall seconds of each run, the device waited for."""
    seconds, value = [], None
    for _ in range(runs):
        wait(device)
        begun = time.perf_counter()
        value = work()
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return seconds, value


def seconds_of(work: Callable[[], Any], device: str, runs: int = 1) -> float:
    """Median of the wall seconds."""
    return median(timed(work, device, runs)[0])


def profiled(work: Callable[[], Any]) -> dict[str, Any]:
    """The kernels that take most of the device's time."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
    return {row.key[:70]: {"ms": round(row.self_device_time_total / 1e3, 1), "calls": row.count} for row in rows}


def peak(device: str) -> int:
    """Most memory of the device since the last call, MB."""
    if not device.startswith("cuda"):
        return 0
    found = torch.cuda.max_memory_allocated() / 1e6
    torch.cuda.reset_peak_memory_stats()
    return round(found)


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)
