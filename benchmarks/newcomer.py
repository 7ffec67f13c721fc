"""A newcomer's way, timed: 40 emoji and a table of two columns, and three commands to a page that finds them.

    python benchmarks/newcomer.py demo_output/checkpoints/start    # after `make demo`, or the same of `make demo-short`

The backbone is the demo's miniature before any training of it: real pretrained parts, small enough for a CPU. The
drawings are a vendor's whose drawings its projector was not fitted to, of concepts that it was not fitted to. Writes
`benchmarks/results/newcomer.json`, from which `benchmarks/readme.py` makes the transcript in `docs/own_data.md`.
"""

from __future__ import annotations

from basics import RESULTS, keep, machine, parser

# isort: split
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import HELD_OUT_VENDOR

ROWS = 40
TRAIN = ("--batch-size", "12", "--epochs", "20", "--learning-rate", "1e-3")
COMMANDS = (
    ("train", "emoji.csv", "--backbone", "miniature", "--output", "emoji_run", *TRAIN),
    ("encode", "emoji.csv", "emoji_run/encoder", "--output", "emoji_corpus"),
    ("serve", "emoji_corpus", "--model", "emoji_run/encoder", "--inputs", "emoji.csv"),
)


def newcomers_folder(benchmark: EmojiBenchmark, backbone: Path, folder: Path) -> list[dict[str, str]]:
    """Lay out the drawings, the table and the backbone; returns the table's rows."""
    images, captions = benchmark.retrieval("test", HELD_OUT_VENDOR)
    (folder / "emoji").mkdir(parents=True)
    rows = []
    for image, (caption, *_) in zip(images[:ROWS], captions[:ROWS], strict=True):
        name = f"emoji/{caption.replace(' ', '_').replace('/', '_')}.png"
        shutil.copy(image, folder / name)
        rows.append({"image": name, "caption": caption})
    with (folder / "emoji.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["image", "caption"])
        table.writeheader()
        table.writerows(rows)
    (folder / "miniature").symlink_to(backbone.resolve(), target_is_directory=True)
    return rows


def run(command: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run a command to its end: what it said, without progress bars, and its time."""
    began, cpu = time.monotonic(), children()
    unime = [sys.executable, "-m", "unime_st.cli", *command]
    done = subprocess.run(unime, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"unime {command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    seconds = {"seconds": round(time.monotonic() - began), "cpu_seconds": round(children() - cpu)}
    said = [line for line in done.stdout.splitlines() if not line.startswith(("{", "["))]  # without the Trainer's steps
    return {"command": shown(command), **seconds, "said": said}


def serve(command: tuple[str, ...], folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Open the page, ask it for every caption, and close it."""
    began = time.monotonic()
    unime = [sys.executable, "-m", "unime_st.cli", *command, "--port", "0"]
    given = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(unime, cwd=folder, stdout=subprocess.PIPE, text=True, env=given) as served:
        try:
            said = served.stdout.readline().strip()  # type: ignore[union-attr]
            seconds = round(time.monotonic() - began)
            address = said.split()[3]
            places = [place(address, row) for row in rows]
        finally:
            served.terminate()
    port = address.rpartition(":")[2]
    return {
        "command": shown(command),
        "seconds": seconds,
        "said": [said.replace(f":{port}", ":8000")],
        "first": places.count(0),
        "among_five": sum(0 <= found < 5 for found in places),
    }


def place(address: str, row: dict[str, str]) -> int:
    """At which place the page shows a caption's drawing."""
    asked = json.dumps({"text": row["caption"], "k": ROWS}).encode()
    request = urllib.request.Request(f"{address}/search", asked, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [hit["id"] for hit in json.loads(answer.read())["results"]].index(row["image"])


def shown(command: tuple[str, ...]) -> str:
    return " ".join(("unime", *command))


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    given = parser(__doc__, cache=True)
    given.add_argument("backbone", type=Path, help="the demo's checkpoints/start")
    arguments = given.parse_args()
    benchmark = EmojiBenchmark(arguments.cache / "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        rows = newcomers_folder(benchmark, arguments.backbone, Path(folder))
        train, encode, page = COMMANDS
        steps = [run(train, Path(folder)), run(encode, Path(folder)), serve(page, Path(folder), rows)]
    keep(RESULTS / "newcomer.json", {"rows": len(rows), "steps": steps, "machine": machine()})


if __name__ == "__main__":
    main()
