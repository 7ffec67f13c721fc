"""Of runs into one folder at once, one goes on; the others are told, and no row of theirs is mixed in."""

import errno
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from unime_st import files
from unime_st.data import encode_corpus, load_corpus
from unime_st.data.corpus.encoded import MANIFEST

TEXTS = [f"a text, number {number}" for number in range(12)]
FORMATS = pytest.mark.parametrize("output_format", ["parquet", "npy"])


class Letters:
    """An embedding of a text by its letters; does something beside when it is first asked."""

    def __init__(self, meanwhile=lambda: None):
        self.seen = []
        self.meanwhile = meanwhile

    def encode(self, items, **_):
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        self.seen += items
        return np.array([[len(item), *(item.count(letter) for letter in "abcdefg0123456789")] for item in items], float)


def encoded(folder, inputs=TEXTS, model=None, **options):
    return encode_corpus(model or Letters(), inputs, folder, **{"window_size": 5, "model_name": "letters", **options})


def in_processes(count, job):
    """Exit codes of forks that begin a job at the same moment."""
    ready, go = os.pipe()
    children = []
    for number in range(count):
        if not (child := os.fork()):
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes
            code = 99
            try:
                code = job(number)
            finally:
                os._exit(code)
        children.append(child)
    os.close(ready)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("dead", [False, True], ids=["empty", "with the claim of a dead run"])
def test_one_of_many_claims_a_folder(dead, tmp_path):
    def job(folder, number):
        try:
            encoded(folder, model_name=f"model {number}")
        except ValueError as error:
            return 1 if "`model`" in str(error) else 2
        return 0

    def die(folder, _):
        encoded(folder, model=Letters(partial(os.kill, os.getpid(), 9)), model_name="dead")

    for turn in range(8):
        folder = tmp_path / str(turn)
        if dead:
            assert in_processes(1, partial(die, folder)) == [-9]
            assert (folder / MANIFEST).exists()
        codes = in_processes(5, partial(job, folder))
        assert sorted(codes) == [0, 1, 1, 1, 1]
        assert load_corpus(folder).manifest["model"] == f"model {codes.index(0)}"


@FORMATS
@pytest.mark.parametrize("changed", [2, 7, 11])
def test_other_inputs_at_once_are_refused_by_row(output_format, changed, tmp_path):
    others = [*TEXTS[:changed], "another one", *TEXTS[changed + 1 :]]
    meanwhile = Letters(lambda: encoded(tmp_path, others, output_format=output_format))
    with pytest.raises(ValueError, match=f"Row {changed} is 'a text, number {changed}'"):
        encoded(tmp_path, TEXTS, meanwhile, output_format=output_format)
    undisturbed = encoded(tmp_path / "undisturbed", others, output_format=output_format)
    assert np.array_equal(np.asarray(load_corpus(tmp_path)), np.asarray(undisturbed))


@FORMATS
def test_the_same_inputs_at_once_end_alike(output_format, tmp_path):
    second = Letters()
    first = Letters(lambda: encoded(tmp_path / "a", model=second, output_format=output_format))
    corpus = encoded(tmp_path / "a", model=first, output_format=output_format)
    assert np.array_equal(np.asarray(corpus), np.asarray(encoded(tmp_path / "b", output_format=output_format)))
    assert len(second.seen) == len(TEXTS)
    assert len(first.seen) == 5  # what it was at work on


@FORMATS
def test_kills_while_rows_are_appended_lose_none(output_format, tmp_path):
    want = np.asarray(encoded(tmp_path / "undisturbed", output_format=output_format))
    synchronise = os.fsync

    def killed_at(step, folder, _):
        calls = []

        def fsync(descriptor):
            synchronise(descriptor)
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), 9)

        os.fsync = fsync
        encoded(folder, output_format=output_format)
        return 0

    outcomes = []
    for step in range(1, 12):
        folder = tmp_path / str(step)
        encoded(folder, TEXTS[:7], output_format=output_format)
        outcomes += in_processes(1, partial(killed_at, step, folder))
        assert np.array_equal(np.asarray(encoded(folder, output_format=output_format)), want)
        assert not list(folder.rglob("*.partial"))
    assert set(outcomes) == {-9, 0}


@pytest.mark.parametrize("kind", ["fingerprints", "ids"])
def test_a_companion_that_is_missing_is_made_anew(kind, tmp_path):
    pairs = list(enumerate(TEXTS))
    want = encoded(tmp_path, pairs, output_format="npy", with_ids=True)
    want = np.asarray(want), list(want.ids())
    (tmp_path / kind / "part-000001.npy").unlink()
    model = Letters()
    corpus = encoded(tmp_path, pairs, model, output_format="npy", with_ids=True)
    assert np.array_equal(np.asarray(corpus), want[0])
    assert list(corpus.ids()) == want[1]
    assert model.seen == TEXTS[5:10]


def test_numbers_of_numpy_are_numbers(tmp_path):
    encoded(tmp_path, window_size=np.int64(5), truncate_dim=np.int32(4))
    model = Letters()
    encoded(tmp_path, window_size=5, truncate_dim=4, model=model)
    assert not model.seen
    with pytest.raises(TypeError, match="with_ids=1"):
        encoded(tmp_path / "other", with_ids=1)


def test_parts_of_other_tools_are_left_alone(tmp_path):
    (tmp_path / "part-00000-c000.snappy.parquet").write_bytes(b"of another tool")
    with pytest.raises(ValueError, match="of something else"):
        encoded(tmp_path)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@FORMATS
def test_a_finished_corpus_on_a_read_only_disk_is_found(output_format, code, tmp_path, monkeypatch):
    want = np.asarray(encoded(tmp_path, output_format=output_format))
    (tmp_path / ".lock").unlink()
    real, real_open = os.open, Path.open

    def refuse(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *args, **kwargs)

    def refuse_writing(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse_writing)
    model = Letters()
    assert np.array_equal(np.asarray(encoded(tmp_path, model=model, output_format=output_format)), want)
    assert not model.seen
    with pytest.raises(OSError, match=os.strerror(code)):
        encoded(tmp_path, [*TEXTS, "one more"], output_format=output_format)


def test_a_cleaner_leaves_a_claim_alone(tmp_path, monkeypatch):
    """The draft is another process's to see from its first byte to its name."""
    link = os.link

    def linked(*args, **kwargs):
        files.remove_leftovers(tmp_path)
        return link(*args, **kwargs)

    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(files, "_ATTEMPTS", 0)
    assert files.create_exclusively(tmp_path / "x", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_hard_links_a_claim_is_kept(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refused)
    assert files.create_exclusively(tmp_path / "x", "one")
    assert not files.create_exclusively(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 1
