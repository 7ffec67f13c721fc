"""Killing a job at random points, starting it again, and noting each time what it had written."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

LOG = "log"


def note(folder, lines):
    """Called by a job before each piece of work: what it is about to do."""
    with (Path(folder) / LOG).open("a") as log:
        log.write("".join(f"{line}\n" for line in lines))


def notes(folder):
    log = Path(folder) / LOG
    return log.read_text().splitlines() if log.exists() else []


def run_with_kills(job, written, folder, *, kills, seed, most):
    """Run `job(folder)` in processes of their own, killed after up to `most` further notes each time, then to its end.

    Returns a pair for each kill: how many notes there were, and what `written(folder)` told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [job.__module__, job.__name__, written.__name__, str(folder), str(kills), str(seed), str(most)]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run([sys.executable, __file__, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(seen) == kills, done.stderr
    return seen


def main(module, job, written, folder, kills, seed, most):
    """The imports are paid once: each life of the job is a fork of this process, which itself computes nothing."""
    job, written = (getattr(importlib.import_module(module), name) for name in (job, written))
    generator = random.Random(int(seed))
    for _ in range(int(kills)):
        child = start(job, folder)
        enough = len(notes(folder)) + generator.randint(1, int(most))
        while len(notes(folder)) < enough:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed: lower `most`"
            time.sleep(0.0005)
        time.sleep(generator.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        print(json.dumps([len(notes(folder)), written(folder)]), flush=True)
    assert os.waitpid(start(job, folder), 0)[1] == 0


def start(job, folder):
    child = os.fork()
    if not child:
        try:
            job(Path(folder))
            os._exit(0)
        finally:
            os._exit(1)
    return child


if __name__ == "__main__":
    main(*sys.argv[1:])
