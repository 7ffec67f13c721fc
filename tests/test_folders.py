"""A folder is old or new and whole at every moment, and what killed writers left is removed."""

import os
import signal
import sys
import tempfile
import time

import pytest

from unime_st import folders
from unime_st.folders import new_folder, recover

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "ctypes.call_function"}


def write(target, text):
    with new_folder(target) as folder:
        for name in "abc":
            (folder / name).write_text(text)


def killed_before_change(target, text, number):
    """Run `write` in a fork that is killed before its change of that number; False if it ended before."""
    child = os.fork()
    if not child:
        seen = 0

        def heard(event, _given):
            nonlocal seen
            if event not in CHANGES:
                return
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(heard)
        write(target, text)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def contents(target):
    return {path.name: path.read_text() for path in target.iterdir()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    target, seen = tmp_path / "made", set()
    old, new = (dict.fromkeys("abc", text) for text in ("old", "new"))
    for number in range(1, 100):
        write(target, "old")
        if not killed_before_change(target, "new", number):
            break
        if exchanges:
            assert target.is_dir()
        recover(target)
        assert contents(target) in (old, new)
        seen.add(contents(target)["a"])
    assert number > 10
    assert seen == {"old", "new"}
    write(target, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_living_writer_is_left_alone(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("one")
        child = os.fork()
        if not child:
            write(tmp_path / "made", "two")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (folder / "a").read_text() == "one"
    assert contents(tmp_path / "made") == {"a": "one"}


def test_no_other_cleans_up_before_a_folder_is_locked(tmp_path, monkeypatch):
    children = []
    make = tempfile.mkdtemp

    def made(**options):
        folder = make(**options)
        if not children:  # another export into the same place begins in this instant
            children.append(os.fork())
            if not children[0]:
                with new_folder(tmp_path / "place") as other:
                    (other / "b").write_text("other")
                os._exit(0)
            time.sleep(0.5)
        return folder

    monkeypatch.setattr(folders.tempfile, "mkdtemp", made)
    with new_folder(tmp_path / "place") as folder:
        (folder / "a").write_text("own")
    assert os.waitpid(children[0], 0)[1] == 0
    assert {path.name for path in (tmp_path / "place").iterdir()} in ({"a"}, {"b"})
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_stays_a_link(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real", tmp_path / "link"
    real.mkdir()
    (real / "a").write_text("old")
    link.symlink_to(real)
    with new_folder(link) as folder:
        (folder / "a").write_text("new")
    assert link.is_symlink()
    assert (real / "a").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link"]
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_what_a_link_led_to_is_put_back(tmp_path):
    (tmp_path / "far").mkdir()
    aside = tmp_path / "far" / ".real-unfinished-x-replaced"
    aside.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    recover(tmp_path / "link")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real"]


def test_an_error_leaves_the_old_folder(tmp_path):
    write(tmp_path / "made", "old")

    def fail():
        with new_folder(tmp_path / "made") as folder:
            (folder / "a").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert contents(tmp_path / "made")["a"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_names_with_signs_of_patterns_are_names(tmp_path):
    write(tmp_path / "[a]*", "old")
    (tmp_path / ".a-unfinished-x").mkdir()
    write(tmp_path / "[a]*", "new")
    assert (tmp_path / ".a-unfinished-x").is_dir()
