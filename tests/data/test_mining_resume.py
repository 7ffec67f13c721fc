"""Mining when it is killed, and when several processes share it."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_hard_negatives import Hashing, training_set

from killing import note, notes, run_with_kills
from two_processes import run_two
from unime_st.data import load_mined_negatives, mine_hard_negatives
from unime_st.data.mining import mine as hard_negatives
from unime_st.fingerprint import fingerprint

SET = training_set(rows=600, seed=5)
TEXTS = {text for name in ("anchor", "positive", "negative_1") for text in SET[name][:]}
FILE_ROWS, SHARD = 24, 8


class Noting(Hashing):
    """A model that notes what it is about to embed."""

    folder = None

    def encode(self, texts, **options):
        note(self.folder, texts)
        return super().encode(texts, **options)


def mine(folder, log=None):
    torch.set_num_threads(1)
    model = Noting()
    model.folder = log or folder
    options = {"num_negatives": 4, "sampling_strategy": "random", "shard_size": SHARD, "rows_per_file": FILE_ROWS}
    return mine_hard_negatives(SET, model, folder / "mined", **options)


def mine_noting_files(folder):
    """Files are noted too, each as often as a shard of texts, so that kills fall on both."""
    real = hard_negatives.write_table

    def noting(path, table):
        note(folder, [f"/{path.name}"] * SHARD)
        real(path, table)

    hard_negatives.write_table = noting
    mine(folder)


def written(folder):
    """Texts whose embeddings are on disk, and the finished files with what they hold."""
    stored = b"".join(np.load(path)["keys"].tobytes() for path in Path(folder).glob("mined/embeddings/*/shard-*.npy"))
    files = {
        path.name: [path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in Path(folder).glob("mined/part-*.parquet")
    }
    return [sorted(text for text in TEXTS if bytes.fromhex(fingerprint(text)) in stored), files]


def rows_of(folder):
    return load_mined_negatives(folder)[:]


@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    expected = rows_of(mine(whole))
    assert sorted(notes(whole)) == sorted(TEXTS)
    total = len(TEXTS) + SHARD * -(-len(SET) // FILE_ROWS)
    seen = run_with_kills(mine_noting_files, written, folder, kills=7, seed=0, most=total // 7)
    log = notes(folder)
    assert any(stored and not files for _, (stored, files) in seen)  # killed while it embedded
    assert any(files for _, (_, files) in seen)  # and while it mined
    last = written(folder)[1]
    for noted, (stored, files) in seen:
        assert not set(stored) & set(log[noted:]), "what was on disk was embedded again"
        assert not {f"/{name}" for name in files} & set(log[noted:]), "a file that was there was mined again"
        assert files.items() <= last.items()
    assert len(log) <= total + 7 * SHARD
    assert rows_of(folder / "mined") == expected
    assert not list(folder.rglob("*.partial"))


def test_files_that_are_there_are_not_mined_again(tmp_path, monkeypatch):
    """Stopped between files, at several of them; what is written stays as it is, and the rest comes out the same."""
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    folder.mkdir()
    expected = rows_of(mine(whole))
    real, left = pq.write_table, [0]

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr("unime_st.data.mining.mine.pq.write_table", failing)
    before = {}
    for files in (3, 1, 7):
        left[0] = files
        with pytest.raises(KeyboardInterrupt):
            mine(folder)
        with pytest.raises(FileNotFoundError, match="has not ended"):
            load_mined_negatives(folder / "mined")
        now = written(folder)[1]
        assert len(now) == len(before) + files
        assert before.items() <= now.items()
        before = now
    left[0] = 99
    mine(folder)
    assert before.items() <= written(folder)[1].items()
    assert rows_of(folder / "mined") == expected
    assert sorted(notes(folder)) == sorted(TEXTS)


def share(rank, folder):
    log = folder / f"rank{rank}"
    log.mkdir(parents=True)
    mine(folder, log)
    return {"rows": torch.tensor(len(load_mined_negatives(folder / "mined")))}


@pytest.mark.slow
def test_two_processes_share_the_work_and_equal_one(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    whole.mkdir()
    expected = rows_of(mine(whole))
    first, second = run_two(share, tmp_path, shared)
    assert first["rows"] == second["rows"] == len(expected["anchor"])
    assert rows_of(shared / "mined") == expected
    halves = [notes(shared / f"rank{rank}") for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(TEXTS)
    assert min(len(half) for half in halves) > len(TEXTS) * 0.3


def test_a_dead_process_is_waited_for_as_long_as_asked_and_its_files_are_mined(tmp_path, monkeypatch, caplog):
    (tmp_path / "alone").mkdir()
    expected = rows_of(mine(tmp_path / "alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    options = {"num_negatives": 4, "sampling_strategy": "random", "rows_per_file": FILE_ROWS, "patience": 3.0}
    with caplog.at_level("INFO"):
        folder = mine_hard_negatives(SET, Hashing(), tmp_path / "mined", **options)
    assert rows_of(folder) == expected
    for told in ("inputs from rank 0 in", "13 files of rows from rank 0 in", "rank 0 owes 13 files of rows"):
        assert told in caplog.text


@pytest.mark.parametrize("at", [0, 2])
def test_a_full_disk_names_the_folder_and_is_gone_on_from(tmp_path, monkeypatch, at):
    real, left = hard_negatives.write_atomically, [at]

    def full(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    options = {"num_negatives": 4, "rows_per_file": FILE_ROWS}
    monkeypatch.setattr(hard_negatives, "write_atomically", full)
    with pytest.raises(OSError, match=rf"The disk of {tmp_path} is full .*call again with the same arguments"):
        mine_hard_negatives(SET, Hashing(), tmp_path, **options)
    monkeypatch.undo()
    model = Hashing()
    assert len(load_mined_negatives(mine_hard_negatives(SET, model, tmp_path, **options)))
    assert model.asked == []
