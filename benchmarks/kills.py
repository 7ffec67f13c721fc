"""Kill campaigns: jobs killed at random (SIGKILL), started again until they end, and held against an undisturbed run.

    python benchmarks/kills.py                              # all jobs on four families, 25 kills each: ten minutes
    python benchmarks/kills.py --jobs corpus-npy --families qwen2_vl --kills 5

Each life of a job is a fork of this process, so that imports are paid once and moments spread over the work itself.
Every other kill falls at a random time; the rest before a random change of the job's folder, for these moments are
short and are the ones that matter. A chain of lives on one folder ends when one lives to the end. Then the result must
be the undisturbed run's, to the bit where the package promises bits; nothing half-written stays; and inputs embedded
again are no more than the kills can have cost. Writes `benchmarks/results/kills.json` and `kills.md`.
"""

from __future__ import annotations

from basics import RESULTS, keep, parser
from basics import table as markdown

# isort: split
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import disable_progress_bars
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers.utils import logging as transformers_logging

from tiny import picture, tiny_backbone
from unime_st import build_encoder, data, export_encoder, load_encoder
from unime_st.checkpoints import CheckpointCallback, last_complete_checkpoint
from unime_st.evaluation import ImageTextRetrievalEvaluator, encode_distinct
from unime_st.files import remove_leftovers, write_atomically
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler, SamplerEpochCallback

_CHANGES = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"})
FAMILIES = ("qwen2_5_vl", "llava_onevision", "smolvlm", "fast_vlm")
ROWS, IMAGES, WINDOW = 192, 24, 16
BOUND = 1e-5  # of a number of an embedding, where batches may differ after a kill


@dataclass
class World:
    """What the jobs work on, made once a family."""

    family: str
    root: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.root / "embedded"
        self.paths = [str(self.root / "images" / f"{number}.png") for number in range(IMAGES)]
        self.inputs: list[Any] = [
            {"image": self.paths[row * 5 % IMAGES], "text": f"question {row}"} if row % 7 else f"a text, number {row}"
            for row in range(ROWS)
        ]

    def make(self) -> None:
        """Write the images, the training set and the encoder."""
        images = self.root / "images"
        images.mkdir(parents=True)
        for number in range(IMAGES):
            size = (30 + number % 5 * 7, 28 + number % 3 * 11)
            picture((number * 10, 255 - number * 10, number * 7), size).save(images / f"{number}.png")
        (self.root / "train" / "A").mkdir(parents=True)
        empty = {"qry_image_path": "", "pos_text": ""}
        rows = [{"qry": f"Find picture {row}.", **empty, "pos_image_path": f"{row}.png"} for row in range(IMAGES)]
        pq.write_table(pa.Table.from_pylist(rows), self.root / "train" / "A" / "original-0.parquet")
        backbone = tiny_backbone(self.family, self.root / "backbone")
        export_encoder(build_encoder(backbone, device="cpu"), self.root / "encoder")

    def encoder(self, *, counted: bool = True) -> Any:
        """A fresh encoder that writes down how many inputs it is given."""
        model = load_encoder(self.root / "encoder", device="cpu")
        if not counted:
            return model
        encode = model.encode

        def counting(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{1 if isinstance(inputs, str) else len(inputs)}\n".encode())
            os.close(log)
            return encode(inputs, *args, **kwargs)

        model.encode = counting
        return model

    def embedded(self) -> int:
        return sum(map(int, self.log.read_text().split())) if self.log.exists() else 0


def corpus(output_format: str) -> Callable[[World, Path], None]:
    def job(world: World, folder: Path) -> None:
        options = {"window_size": WINDOW, "batch_size": 8, "model_name": world.family, "with_ids": True}
        pairs = [(f"id {row}", item) for row, item in enumerate(world.inputs)]
        data.encode_corpus(world.encoder(), pairs, folder / "corpus", output_format=output_format, **options)

    return job


def corpus_result(_world: World, folder: Path) -> dict[str, Any]:
    parts = sorted(path for path in (folder / "corpus").rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in parts}
    return {"bytes": files, "numbers": np.concatenate(list(data.load_corpus(folder / "corpus").parts()))}


def teacher(world: World, folder: Path) -> None:
    texts = [f"sentence number {row} of the teacher" for row in range(ROWS)]
    embeddings = data.teacher_embeddings(
        world.encoder(), texts, folder / "teacher", teacher_name="t", shard_size=WINDOW, batch_size=8
    )
    write_atomically(folder / "result.npy", embeddings)


def mining(world: World, folder: Path) -> None:
    rows = data.load_mmeb_train(world.root / "train", image_root=world.root / "images")
    options = {"num_negatives": 3, "margin": None, "shard_size": 8, "batch_size": 4, "rows_per_file": 6}
    data.mine_hard_negatives(rows, world.encoder(), folder / "mined", **options)


def mining_result(_world: World, folder: Path) -> dict[str, Any]:
    rows = data.load_mined_negatives(folder / "mined", image_root=_world.root / "images", open_images=False)
    return {"bytes": sha256(json.dumps(list(rows), default=str, sort_keys=True).encode())}


def evaluation(world: World, folder: Path) -> None:
    captions = [[f"caption {number}", f"another caption of {number}"] for number in range(IMAGES)]
    images = [{"image": path} for path in world.paths]
    arguments = {"cache_dir": folder / "cache", "batch_size": 1, "show_progress_bar": False}
    model = world.encoder()
    scores = ImageTextRetrievalEvaluator(images, captions, **arguments)(model)
    texts = [text for own in captions for text in own]
    write_atomically(folder / "result.npy", encode_distinct(model, [*images, *texts], cache=folder / "cache"))
    write_atomically(folder / "scores.json", json.dumps({name: float(score) for name, score in scores.items()}))


def evaluation_result(_world: World, folder: Path) -> dict[str, Any]:
    return {"bytes": (folder / "scores.json").read_text(), "numbers": np.load(folder / "result.npy")}


def training(world: World, folder: Path) -> None:
    torch.manual_seed(0)
    model = build_encoder(world.root / "backbone", device="cpu", peft_config=True)
    rows = data.load_mmeb_train(world.root / "train", image_root=world.root / "images")
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "run"), per_device_train_batch_size=8, max_steps=12, save_steps=2, logging_steps=2, seed=3,
        learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True, batch_sampler=FalseNegativeAwareBatchSampler,
        dataloader_pin_memory=False,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model, mini_batch_size=4, num_hard_negatives=None)
    callbacks = [CheckpointCallback(), SamplerEpochCallback()]
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss, callbacks=callbacks)
    last = last_complete_checkpoint(folder / "run")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    weights = torch.cat([value.detach().float().flatten() for _, value in sorted(model.state_dict().items())])
    write_atomically(folder / "result.npy", weights.numpy())


def export(world: World, folder: Path) -> None:
    model = world.encoder(counted=False)
    with torch.no_grad():
        next(iter(model[0].model.parameters())).add_(1.0)
    for _ in range(3):
        export_encoder(model, folder / "exported")


def export_seed(world: World, folder: Path) -> None:
    """What the export writes over."""
    shutil.copytree(world.root / "encoder", folder / "exported")


def export_result(_world: World, folder: Path) -> dict[str, Any]:
    """What a reader finds at the path: asked after each kill too."""
    state = load_encoder(folder / "exported", device="cpu").state_dict()
    weights = torch.cat([value.float().flatten() for _, value in sorted(state.items())])
    return {"bytes": sha256(weights.numpy().tobytes())}


def array_result(_world: World, folder: Path) -> dict[str, Any]:
    found = np.load(folder / "result.npy")
    return {"bytes": sha256(found.tobytes()), "numbers": found}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Job:
    """A job, how its result is read, and what is promised of it: the same bytes, or numbers within `BOUND`."""

    run: Callable[[World, Path], None]
    result: Callable[[World, Path], dict[str, Any]]
    promise: str = "bytes"
    seed: Callable[[World, Path], None] | None = None
    always_readable: bool = False


JOBS = {
    "corpus-parquet": Job(corpus("parquet"), corpus_result), "corpus-npy": Job(corpus("npy"), corpus_result),
    "teacher": Job(teacher, array_result, promise="numbers"), "mining": Job(mining, mining_result),
    "evaluation": Job(evaluation, evaluation_result, promise="numbers"), "training": Job(training, array_result),
    "export": Job(export, export_result, seed=export_seed, always_readable=True),
}  # fmt: skip


def live(
    job: Job, world: World, folder: Path, *, seconds: float | None = None, changes: int | None = None
) -> tuple[int, float]:
    """One life in a fork, killed after so many seconds or before so many changes; its exit status and seconds."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the child ends)
            count_changes(folder, changes)
            remove_leftovers(folder)  # of what the job writes itself
            job.run(world, folder)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    killer = None
    if seconds is not None:
        killer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        killer.start()
    _, status = os.waitpid(child, 0)
    if killer is not None:
        killer.cancel()
        killer.join()
    return status, time.monotonic() - started


def count_changes(folder: Path, last: int | None) -> None:
    """From here on count what this process changes below a folder; before change number `last`, it is killed."""
    seen = 0
    counter = os.open(f"{folder}.changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def heard(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        reads = event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event not in _CHANGES or reads or not str(given[0]).startswith(str(folder)):
            return
        seen += 1
        os.pwrite(counter, str(seen).encode(), 0)
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)


def asked(work: Callable[[], Any]) -> Any:
    """What some work returns, done in a fork: this process starts no threads, whose locks a fork would inherit."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = work()
        except Exception as error:  # noqa: BLE001 (it is raised again in this process's place)
            answer = error
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pickle.load(pipe)
    os.waitpid(child, 0)
    if isinstance(answer, Exception):
        raise answer
    return answer


def started(job: Job, world: World, folder: Path) -> Path:
    folder.mkdir(parents=True)
    if job.seed is not None:
        job.seed(world, folder)
    world.log.unlink(missing_ok=True)
    return folder


def campaign(name: str, world: World, kills: int, seed: int) -> dict[str, Any]:
    """Kill a job `kills` times; what came of it."""
    job, moments = JOBS[name], random.Random(f"{name} {world.family} {seed}")
    scratch = world.root / "jobs" / name
    folder = started(job, world, scratch / "undisturbed")
    status, seconds = live(job, world, folder)
    if status:
        raise RuntimeError(f"{name} on {world.family} fails undisturbed (status {status}).")
    wanted, alone = asked(partial(job.result, world, folder)), world.embedded()
    changes = int(Path(f"{folder}.changes").read_text() or 0)
    usual, before = hidden(folder), None
    if job.always_readable:
        before = asked(partial(job.result, world, started(job, world, scratch / "before")))
    row: dict[str, Any] = {"job": name, "family": world.family, "seconds": round(seconds, 2), "changes": changes}
    row |= {"embedded": alone, "kills": 0, "chains": 0, "again": 0, "largest_difference": 0.0, "faults": []}
    while row["kills"] < kills:
        row["chains"] += 1
        folder = started(job, world, scratch / str(row["chains"]))
        while True:
            kill: dict[str, Any] = {"seconds": moments.uniform(0, seconds)}
            if moments.random() < 0.5:
                kill = {"changes": moments.randint(1, changes)}
            status, _ = live(job, world, folder, **(kill if row["kills"] < kills else {}))
            if status == 0:
                break
            if status != signal.SIGKILL:
                row["faults"].append(f"chain {row['chains']}: a life ended with status {status}")
                break
            row["kills"] += 1
            if before is not None:
                _check(row, partial(job.result, world, folder), [before, wanted], "bytes")
        _check(row, partial(job.result, world, folder), [wanted], job.promise)
        row["again"] += world.embedded() - alone
        if left := hidden(folder) - usual:
            row["faults"].append(f"chain {row['chains']}: {len(left)} half-written stay, as {min(left)}")
        shutil.rmtree(folder)
    return row


def hidden(folder: Path) -> set[str]:
    """Names of what is kept out of sight below a folder, as half-written files and folders are."""
    return {path.name for path in folder.rglob(".*")}


def _check(
    row: dict[str, Any], read: Callable[[], dict[str, Any]], allowed: list[dict[str, Any]], promise: str
) -> None:
    try:
        found = asked(read)
    except Exception as error:  # noqa: BLE001 (whatever it is goes into the table)
        row["faults"].append(f"chain {row['chains']}: not readable: {type(error).__name__}: {error}")
        return
    if promise == "numbers":
        difference = float(np.abs(found["numbers"] - allowed[0]["numbers"]).max())
        row["largest_difference"] = max(row["largest_difference"], difference)
        if not difference <= BOUND:
            row["faults"].append(f"chain {row['chains']}: differs by {difference:.1e}")
    elif found["bytes"] not in [one["bytes"] for one in allowed]:
        row["faults"].append(f"chain {row['chains']}: other bytes")


def table(rows: list[dict[str, Any]]) -> str:
    """The campaigns as Markdown."""
    head = ("job", "family", "kills", "runs to the end", "result", "inputs embedded again, per kill", "faults")
    lines = []
    for row in rows:
        exact = JOBS[row["job"]].promise == "bytes"
        same = "same bytes" if exact else f"within {BOUND:g} (largest difference {row['largest_difference']:.1e})"
        again = f"{row['again'] / max(1, row['kills']):.1f} of {row['embedded']}" if row["embedded"] else "–"
        told = (f"{len(row['faults'])}: {row['faults'][0]}", "see faults") if row["faults"] else ("none", same)
        lines.append([row["job"], row["family"], row["kills"], row["chains"], told[1], again, told[0]])
    return "\n".join(markdown(head, lines)) + "\n"


def main() -> None:
    options = parser(__doc__, output=RESULTS)
    options.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    options.add_argument("--families", nargs="+", default=list(FAMILIES))
    options.add_argument("--kills", type=int, default=25)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    rows = []
    for family in given.families:
        with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
            world = World(family, Path(scratch))
            asked(world.make)
            for name in given.jobs:
                rows.append(campaign(name, world, given.kills, given.seed))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    command = f"python benchmarks/kills.py --kills {given.kills} --seed {given.seed}"
    keep(given.output / "kills.json", {"command": command, "rows": rows})
    keep(given.output / "kills.md", table(rows))
    if any(row["faults"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
