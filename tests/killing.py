"""Killing a job at random points, starting it again, and noting each time what it had written."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

LOG = "log"
KILL = "KILL_AFTER_NOTES"
"""Variable of a job's process: how many notes there are when it is killed, and into which share of the next piece of
work, taken to last as long as the one before."""
_calls = []
_due = []


def note(folder, lines):
    """Called by a job before each piece of work: what it is about to do."""
    if _due:
        os.kill(os.getpid(), signal.SIGKILL)  # the piece was shorter than the one before
    with (Path(folder) / LOG).open("a") as log:
        log.write("".join(f"{line}\n" for line in lines))
    if KILL in os.environ:
        enough, share = json.loads(os.environ[KILL])
        _calls.append(time.monotonic())
        if len(notes(folder)) >= enough:
            del os.environ[KILL]
            _due.append(True)
            delay = share * (_calls[-1] - _calls[-2]) if len(_calls) > 1 else 0
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def notes(folder):
    log = Path(folder) / LOG
    return log.read_text().splitlines() if log.exists() else []


def run_with_kills(job, written, folder, *, kills, seed, most):
    """Run `job(folder)` in processes of their own, killed after up to `most` further notes each time, then to its end.

    Returns a pair for each kill: how many notes there were, and what `written(folder)` told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [job.__module__, job.__name__, written.__name__, str(folder), str(kills), str(seed), str(most)]
    paths = [str(Path(__file__).parent), *sys.path]
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
        enough = len(notes(folder)) + generator.randint(1, int(most))
        ended = live(job, folder, [enough, generator.random()])
        assert ended == signal.SIGKILL, f"it ended ({ended}) before it was killed: lower `most`"
        print(json.dumps([len(notes(folder)), written(folder)]), flush=True)
    assert live(job, folder) == 0


def live(job, folder, kill=None):
    """A life of the job, to its end or until it kills itself; returns what it ended with."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if kill:
            os.environ[KILL] = json.dumps(kill)
        job(Path(folder))
        if kill and KILL not in os.environ:
            signal.pause()  # the kill is on its way
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
