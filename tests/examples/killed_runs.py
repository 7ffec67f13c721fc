"""Running an example script in processes of its own, killed (SIGKILL) where a test says, and what the run did.

The processes are forked from a server that has imported everything and computed nothing, which saves seconds a run.
"""

import contextlib
import datetime as dt
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 100
"""Seconds a run may take."""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["killed_runs", "sentence_transformers", "datasets", "peft", "unime_st.modules"])
_WRITES = os.O_WRONLY | os.O_RDWR
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Run:
    """What one run did.

    Attributes:
        exits: exit code of each process; -9 for one that was killed.
        steps: (optimizer steps done before, content of the rows) of each training step on the first process.
        changes: how often a file or folder of a checkpoint was opened for writing, made, renamed or removed.
        printed: by the first process.
    """

    def __init__(self, folder, exits):
        self.exits = exits
        lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        self.steps = [(line["step"], line["rows"]) for line in lines]
        self.changes = len((folder / "changes.txt").read_text().splitlines())
        self.printed = (folder / "printed-0.txt").read_text()


def run(script, arguments, folder, *, world=1, step=None, change=None):
    """Run a script; `step` and `change` kill it before that training step, or that change of a checkpoint's files."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = (script, [*arguments], str(folder), step, change)
    processes = [_SERVER.Process(target=_child, args=(rank, world, port, *job)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):  # one has died: the others would wait for it
            time.sleep(0.2)
            for process in processes:
                process.kill()
        time.sleep(0.02)
    hung = any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, its data loader's workers
    printed = (folder / "printed-0.txt").read_text()
    assert not hung, f"the run has not ended within {LIMIT} seconds:\n{printed[-3000:]}"
    assert (folder / "changes.txt").exists(), f"the run never began:\n{printed[-3000:]}"
    return Run(folder, [process.exitcode for process in processes])


def _child(rank, world, port, script, arguments, folder, step, change):
    os.setsid()
    folder = Path(folder)
    printed = (folder / f"printed-{rank}.txt").open("w")
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    import torch
    from datasets import config

    torch.set_num_threads(1)
    config.HF_DATASETS_CACHE = folder / f"datasets-{rank}"
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    sys.path.insert(0, str(EXAMPLES))
    if rank == 0:
        _watch_steps(folder, step)
        _watch_files(folder, change)
    importlib.import_module(script).main(arguments)
    sys.stdout.flush()
    os._exit(0)  # without the test process's clean-up


def _watch_steps(folder, last):
    from sentence_transformers import SentenceTransformerTrainer as Trainer

    plain, log = Trainer.training_step, (folder / "steps.jsonl").open("w")
    done = 0

    def training_step(self, model, inputs, *args):
        nonlocal done
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        rows = {name: value.tolist() for name, value in inputs.items() if name.endswith("content_id")}
        assert rows
        log.write(json.dumps({"step": self.state.global_step, "rows": rows}) + "\n")
        log.flush()
        return plain(self, model, inputs, *args)

    Trainer.training_step = training_step


def _watch_files(folder, last):
    log = (folder / "changes.txt").open("w")
    done = 0

    def changed(event, arguments):
        nonlocal done
        if not (event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)):
            return
        path = str(arguments[0])
        if "/checkpoint-" not in path:
            return
        if done == last:
            _cut_newest(Path(path))
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        log.write(f"{event} {path}\n")
        log.flush()

    sys.addaudithook(changed)


def _cut_newest(path):
    """Cut the checkpoint's newest file to half, as if the kill had come while it was written."""
    folder = next(parent for parent in (path, *path.parents) if parent.name.startswith("checkpoint-"))
    files = [file for file in folder.rglob("*") if file.is_file()]
    if files:
        newest = max(files, key=lambda file: file.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)
