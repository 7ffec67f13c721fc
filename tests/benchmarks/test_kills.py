"""The kill campaigns see what they are for: work that is lost, half-written or other than undisturbed."""

import hashlib
import importlib
import time
from pathlib import Path

import pytest

from unime_st.files import write_atomically

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kills(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kills")


def careful(_world, folder):
    for number in range(5):
        time.sleep(0.01)
        write_atomically(folder / "state" / f"{number}.txt", f"number {number}")
    for left in (folder / "state").glob(".*"):
        left.unlink()


def careless(_world, folder):
    (folder / "state").mkdir(exist_ok=True)
    for number in range(5):
        with (folder / "state" / f"{number}.txt").open("a") as file:
            time.sleep(0.01)
            file.write(f"number {number}")


def leaves_scratch(_world, folder):
    (folder / "state").mkdir(exist_ok=True)
    scratch = folder / "state" / f".scratch-{time.monotonic_ns()}"
    scratch.write_text("half")
    time.sleep(0.05)
    scratch.unlink()


def result(_world, folder):
    files = sorted((folder / "state").glob("[!.]*"))
    return {"bytes": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()}


@pytest.mark.parametrize(
    ("run", "fault"), [(careful, None), (careless, "other bytes"), (leaves_scratch, "half-written")]
)
def test_a_campaign_finds_faults_and_only_those(run, fault, kills, monkeypatch, tmp_path):
    monkeypatch.setitem(kills.JOBS, "job", kills.Job(run, result))
    world = kills.World("qwen2_vl", tmp_path)
    row = kills.campaign("job", world, kills=12, seed=0)
    assert row["kills"] == 12
    assert row["changes"] > 1
    assert bool(row["faults"]) == bool(fault), row["faults"]
    assert all(fault in text for text in row["faults"])
    assert ("none" in kills.table([row])) == (fault is None)


def test_what_must_be_readable_at_every_moment_is_asked_for_after_each_kill(kills, monkeypatch, tmp_path):
    def replaced(_world, folder):
        (folder / "state" / "0.txt").unlink()
        time.sleep(0.05)
        write_atomically(folder / "state" / "0.txt", "new")

    def seed(_world, folder):
        write_atomically(folder / "state" / "0.txt", "old")

    monkeypatch.setitem(kills.JOBS, "job", kills.Job(replaced, result, seed=seed, always_readable=True))
    row = kills.campaign("job", kills.World("qwen2_vl", tmp_path), kills=12, seed=0)
    assert any("other bytes" in text for text in row["faults"])
