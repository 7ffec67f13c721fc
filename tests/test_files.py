import os
import subprocess
import sys

from unime_st.files import remove_leftovers, write_atomically

KILLED = """
import os, signal, sys
from pathlib import Path
import unime_st.files

os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
unime_st.files.write_atomically(Path(sys.argv[1]) / "a.txt", "half")
"""


def test_leftovers_of_killed_processes_of_this_machine_go(tmp_path):
    write_atomically(tmp_path / "a.txt", "whole")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (leftover,) = tmp_path.glob(".*.partial")
    assert (tmp_path / "a.txt").read_text() == "whole"
    head, owner, _ = leftover.name.rsplit(".", 2)
    machine, process = owner.split("-")
    elsewhere = tmp_path / f"{head}.{'0' * 8 if machine != '0' * 8 else '1' * 8}-{process}.partial"
    alive = tmp_path / f"{head}.{machine}-{os.getpid()}.partial"
    for path in (elsewhere, alive, tmp_path / ".of-another-kind.partial"):
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert len(list(tmp_path.glob(".*.partial"))) == 3
