import os
import subprocess
import sys

import numpy as np
import pytest

from unime_st.files import create_exclusively, remove_leftovers, write_atomically

CLEAN = "import sys, pathlib, unime_st.files; unime_st.files.remove_leftovers(pathlib.Path(sys.argv[1]))"

KILLED = """
import os, signal, sys
from pathlib import Path
import unime_st.files

os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
unime_st.files.write_atomically(Path(sys.argv[1]) / "a.txt", "half")
"""


def test_leftovers_of_killed_writers_go_and_living_writers_stay(tmp_path):
    write_atomically(tmp_path / "a.txt", "whole")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (leftover,) = tmp_path.glob(".*.partial")
    assert (tmp_path / "a.txt").read_text() == "whole"
    (tmp_path / ".of-another-kind").write_text("stays")
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".of-another-kind", "a.txt"]


@pytest.mark.parametrize("content", ["text", b"bytes", np.arange(5)])
def test_a_cleaner_leaves_a_writer_alone(content, tmp_path, monkeypatch):
    """Also in the very moment of writing, in this process and in another, whatever number that has."""
    real, seen = os.fsync, []

    def fsync(file):
        real(file)
        seen.extend(tmp_path.glob(".*.partial"))
        remove_leftovers(tmp_path)
        subprocess.run([sys.executable, "-c", CLEAN, str(tmp_path)], check=True)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "x", content)
    assert len(seen) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_writer_whose_file_is_taken_away_writes_again(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(file):
        real(file)
        calls.append(1)
        if len(calls) < 3:
            for partial in tmp_path.glob(".*.partial"):  # as a cleaner that sees no locks
                partial.unlink()

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "x", "content")
    assert (tmp_path / "x").read_text() == "content"
    assert len(calls) == 3


def test_only_one_creates(tmp_path):
    assert create_exclusively(tmp_path / "deep" / "x", "one")
    assert not create_exclusively(tmp_path / "deep" / "x", "two")
    assert [path.read_text() for path in (tmp_path / "deep").iterdir()] == ["one"]


@pytest.mark.parametrize("content", [np.zeros(100_000), np.zeros((300, 400), np.float16), b"0" * 10**6])
def test_a_disk_that_is_full_is_named(content, tmp_path):
    """A limit on the size of files raises in C what a full disk does: a write that ends early."""
    code = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from unime_st import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
files.FULL = (*files.FULL, 27)  # EFBIG: what the limit is called
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.write_atomically(Path(sys.argv[1]) / "x", {content})
except OSError as error:
    print(error.errno, error)
"""
    text = (
        f"np.zeros({content.shape}, np.dtype({content.dtype.str!r}))"
        if isinstance(content, np.ndarray)
        else "b'0' * 10**6"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{content}", text), str(tmp_path)], capture_output=True, text=True
    )
    assert f"27 [Errno 27] The disk of {tmp_path} is full, so x was not written" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
