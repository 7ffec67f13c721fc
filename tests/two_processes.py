"""Running a function in several gloo processes, and getting what each returned."""

import datetime as dt
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
# The server that forks the ranks imports these once, computes nothing, and is started anew for each test process.
mp.set_forkserver_preload(["unime_st.modules", "unime_st.losses", "datasets"])


def run_two(job, folder, *arguments):
    """What `job(rank, *arguments)` returns on each of two ranks."""
    return run_ranks(WORLD, job, folder, *arguments)


def run_ranks(world, job, folder, *arguments):
    """What `job(rank, *arguments)` returns on each rank; none is a fork of this process, where OpenMP may have run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        given = (world, port, str(folder), job, arguments)
        mp.start_processes(_worker, args=given, nprocs=world, start_method="forkserver")
    except mp.ProcessExitedException:
        pytest.fail("\n".join(path.read_text() for path in sorted(folder.glob("*.txt"))))
    # These hold the tests' own dictionaries of tensors, written a moment ago.
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _worker(rank, world, port, folder, job, arguments):
    try:
        torch.set_num_threads(1)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")  # for the Trainer
        dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
        torch.save(job(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 a test process must report and leave, whatever happened
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
