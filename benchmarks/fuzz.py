"""Damaged images and bad arguments: each must be refused by name or put up with, never crash, hang or pass unseen.

    python benchmarks/fuzz.py                                  # 20,000 images, 200 arguments and more: ten minutes
    python benchmarks/fuzz.py --images 2000 --part images

Images go (a) through the opener, as a file or as bytes, (b) as rows of a data set through `with_images` with bad images
put up with, and (c), some of them, through `encode` of a tiny model. Pieces of work are forks of this process, so that
a crash or a hang is one fault among the others. Results: `benchmarks/results/fuzz.json`, and `fuzz.md` beside it.
"""

from __future__ import annotations

from basics import RESULTS, keep, parser, table

# isort: split
import json
import logging
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image
from tqdm import tqdm

from fuzz_arguments import cases
from fuzz_cases import Things, judged
from fuzz_images import DAMAGES, formats, seeds
from tiny import tiny_encoder
from unime_st.data import with_images
from unime_st.images import UnreadableImageError, open_image

OUTCOMES = ("opened", "refused by name", "other error", "silent")
PIECE, ENCODED, SECONDS = 250, 10, 300  # images of a fork; those of it that are encoded; until it counts as hanging

Found = list[tuple[str, str, str, str]]  # through what, kind of damage, outcome, what to say of a fault


def damaged(start: int, count: int, seed: int, good: dict[str, bytes]) -> Iterator[tuple[str, str, str, bytes]]:
    """Name, format, kind of damage and content of images, the same for a number however they are shared out."""
    names, kinds = sorted(good), sorted(DAMAGES)
    suffixes = sorted({form.split("/")[0].lower() for form in names})
    for number in range(start, start + count):
        generator = np.random.default_rng([seed, number])
        form, kind = names[int(generator.integers(len(names)))], kinds[number % len(kinds)]
        suffix = suffixes[int(generator.integers(len(suffixes)))] if number % 3 == 0 else form.split("/")[0].lower()
        yield f"image-{number}.{suffix}", form, kind, DAMAGES[kind](good[form], generator)


def outcome(name: str, work: Callable[[], bool]) -> tuple[str, str]:
    """What came of one image; `work` tells whether its result is one."""
    try:
        good = work()
    except Exception as error:  # noqa: BLE001 (which it is, is what is measured)
        refused = isinstance(error, UnreadableImageError | FileNotFoundError | ValueError) and name in str(error)
        return ("refused by name", "") if refused else ("other error", f"{type(error).__name__}: {error}")
    return ("opened", "") if good else ("silent", "the result is no image")


def _is_rgb(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode == "RGB" and min(image.size) > 0 and bool(image.tobytes())


def piece(start: int, count: int, seed: int, good: dict[str, bytes], model: Any, folder: Path) -> Found:
    """Send some images through all that opens them."""
    found: Found = []
    made = list(damaged(start, count, seed, good))
    for place, (name, form, kind, content) in enumerate(made):
        path = folder / name
        path.write_bytes(content)
        given = (path,) if place % 2 else (content, name)
        came, fault = outcome(name, lambda given=given: _is_rgb(open_image(*given)))
        found.append(("opener", kind, came, fault and f"{name} of {form}: {fault}"))
    names, _, kinds, contents = map(list, zip(*made, strict=True))
    found += _through_rows(names, kinds, contents, folder)
    for name, _, kind, _ in made[: ENCODED if model is not None else 0]:
        item = {"image": str(folder / name)}
        came, fault = outcome(
            name, lambda item=item: bool(np.isfinite(model.encode([item], show_progress_bar=False)).all())
        )
        found.append(("encode", kind, came, fault and f"{name}: {fault}"))
    return found


def _through_rows(names: list[str], kinds: list[str], contents: list[bytes], folder: Path) -> Found:
    """Half of the rows hold paths, half bytes; each batch has a good row that takes the place of bad ones."""
    log = folder / "bad.jsonl"
    Image.new("RGB", (9, 7), "red").save(folder / "good.png")
    given = [content if place % 2 else None for place, content in enumerate(contents)]
    stored = [{"bytes": one, "path": name} for one, name in zip([*given, None], [*names, "good.png"], strict=True)]
    rows = Dataset.from_dict({"text": [*names, "good"], "image": [{"image": one} for one in stored]})
    opened = with_images(rows, image_root=folder, name="fuzz", max_bad_images=len(names), bad_images_log=log)
    found, way = [], "rows of a data set"
    try:
        batch = opened[:]
    except Exception as error:  # noqa: BLE001 (see above)
        return [(way, kind, "other error", f"{type(error).__name__}: {error}") for kind in kinds]
    told = {entry["row"]: entry for entry in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    same = {stored[row]["bytes"] for row in told if stored[row]["bytes"] is not None}  # equal bytes are told once
    for row, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        kept = batch["text"][row] == name
        reported = row in told or stored[row]["bytes"] in same
        if kept and not reported and _is_rgb(batch["image"][row]["image"]):
            found.append((way, kind, "opened", ""))
        elif not kept and reported:
            found.append((way, kind, "refused by name", ""))
        else:
            found.append((way, kind, "silent", f"{name}: kept {kept}, reported {reported}"))
    return found


def in_a_fork(work: Callable[[], Any], folder: Path) -> Any:
    """What `work` gives, or how its process ended."""
    answer = folder / "answer.json"
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries in C say of damaged files
        try:
            answer.write_text(json.dumps(work()))
        except BaseException as error:  # noqa: BLE001 (told below)
            answer.write_text(json.dumps(f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        if os.waitpid(child, os.WNOHANG)[0]:
            return json.loads(answer.read_text()) if answer.exists() else "crashed"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"did not end in {SECONDS} s"


def fuzz_images(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Images through all ways, counted by way, kind and outcome."""
    good = seeds(np.random.default_rng(seed))
    model = tiny_encoder("qwen2_vl", root / "model")
    table: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    faults: list[str] = []
    for start in range(0, count, PIECE):
        folder = root / str(start)
        folder.mkdir()
        of_piece = min(PIECE, count - start)
        found = in_a_fork(lambda s=start, n=of_piece, f=folder: piece(s, n, seed, good, model, f), folder)
        if isinstance(found, str):
            faults.append(f"images {start} to {start + of_piece}: {found}")
            found = []
        for through, kind, came, fault in found:
            table[through][kind][came] += 1
            faults += [f"{through}: {fault}"] if fault else []
        shutil.rmtree(folder)
    return {"images": count, "seed files": len(good), "formats": sorted({name.split("/")[0] for name in good}),
            "pillow": formats(), "table": table, "faults": faults}  # fmt: skip


def fuzz_arguments(root: Path) -> dict[str, Any]:
    """Bad arguments, each in a process of its own when it ends badly."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    faults = []
    things = Things(root)
    for case in cases(things):
        folder = Path(tempfile.mkdtemp(dir=root))
        came = in_a_fork(lambda case=case: judged(case), folder)
        kind, why = came if isinstance(came, list) else ("other error", came)
        table[case.of][kind] += 1
        faults += [f"{case.of}({case.shown}): {kind}: {why}"] if kind not in ("refused by name", "tolerated") else []
    return {"arguments": sum(sum(row.values()) for row in table.values()), "table": table, "faults": faults}


def as_table(found: dict[str, Any], first: str, outcomes: tuple[str, ...]) -> list[str]:
    total = {one: sum(row.get(one, 0) for row in found.values()) for one in outcomes}
    rows = ([name, *(f"{row.get(one, 0):,}" for one in outcomes)] for name, row in {**found, "all": total}.items())
    return [*table([first, *outcomes], rows), ""]


def report(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines: list[str] = ["# Damaged images and bad arguments", ""]
    if images := found.get("images"):
        made = f"{images['images']:,} images, made of {images['seed files']} good ones in"
        lines += [f"{made} {len(images['formats'])} formats: {', '.join(images['formats'])}.", ""]
        for through, found_of in images["table"].items():
            lines += [f"## Images through the {through}", "", *as_table(found_of, "damage", OUTCOMES)]
    if arguments := found.get("arguments"):
        outcomes = ("refused by name", "tolerated", "refused without a name", "other error", "silent")
        lines += [f"## {arguments['arguments']} bad arguments", "", *as_table(arguments["table"], "of", outcomes)]
    faults = [fault for part in found.values() if isinstance(part, dict) for fault in part["faults"]]
    lines += [f"Faults: {len(faults) or 'none'}.", "", *(f"* {fault[:300]}" for fault in faults[:50])]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    options = parser(__doc__, output=RESULTS)
    options.add_argument("--part", choices=["images", "arguments"], help="only this one")
    options.add_argument("--images", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread may hold a lock at the moment of a fork, for ever in the child
    disable_progress_bars()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {"command": f"python benchmarks/fuzz.py --images {given.images} --seed {given.seed}"}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for part in ("images", "arguments"):
            if given.part not in (None, part):
                continue
            started = time.monotonic()
            root = Path(scratch) / part
            root.mkdir()
            found[part] = fuzz_images(given.images, given.seed, root) if part == "images" else fuzz_arguments(root)
            found[part]["seconds"] = round(time.monotonic() - started)
    keep(given.output / "fuzz.json", found)
    keep(given.output / "fuzz.md", report(found))
    print(report(found))


if __name__ == "__main__":
    main()
