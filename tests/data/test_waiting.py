"""What a process says while it waits for the files of others."""

import logging
import re
from pathlib import Path

import numpy as np

from unime_st.data import teacher_embeddings
from unime_st.embedding import waiting
from unime_st.embedding.waiting import Waiting


def test_it_says_for_whom_since_when_and_how_long(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "_SAY_EVERY", 0.05)
    wait = Waiting("Mining", Path("cache"), patience=0.3)
    with caplog.at_level(logging.INFO):
        while wait.goes_on([3, 1], "5 inputs"):
            pass
        wait.give_up([3, 1], "5 inputs")
    first, *later, last = caplog.records
    told = (
        r"Mining: this process is done and waits for 5 inputs from rank 1, 3 in cache, since \d\d:\d\d:\d\d \(0 s\)\. "
        r"If nothing comes for another 0 s, it does that part itself\."
    )
    assert re.fullmatch(told, first.getMessage())
    assert first.levelno == logging.INFO
    assert len(later) >= 2
    assert {record.levelno for record in later} == {logging.WARNING}  # seen without any setting
    assert "rank 1, 3 owes 5 inputs" in last.getMessage()
    assert "`patience` sets how long" in last.getMessage()


def test_a_file_gives_them_their_time_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + max(seconds, 0.01)))
    wait = Waiting("Mining", Path("cache"), patience=10)
    for ended in (10, 20, 30):
        while wait.goes_on([0], "1 input"):
            pass
        assert ended <= now[0] < ended + 0.1
        wait.news()


def test_a_dead_process_is_waited_for_as_long_as_asked_and_its_part_is_done(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")

    class Ones:
        def encode(self, texts, **options):
            return np.ones((len(texts), 2))

    texts = [f"t{number}" for number in range(20)]
    with caplog.at_level(logging.INFO):
        found = teacher_embeddings(Ones(), texts, tmp_path, teacher_name="ones", patience=0.2)
    assert found.shape == (20, 2)
    assert "inputs from rank 0, 2 in" in caplog.text
    assert "rank 0, 2 owes" in caplog.text
