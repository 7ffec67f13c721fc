"""The fuzz benchmark sees what it looks for, and its images are refused by name or opened."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from unime_st.images import UnreadableImageError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz
import fuzz_cases
from fuzz_images import DAMAGES, seeds


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (raising(ValueError("`k=0`, but 1 is needed")), "refused by name"),
        (raising(TypeError("Item 3 is no text")), "refused by name"),
        (raising(ValueError("math domain error")), "refused without a name"),
        (raising(KeyError("k")), "refused without a name"),
        (raising(AttributeError("no `k`")), "other error"),
        (lambda: 1, "silent"),
    ],
    ids=["named", "row", "unnamed", "key", "attribute", "silent"],
)
def test_calls_are_judged_by_what_they_say(work, kind):
    assert fuzz_cases.judged(fuzz_cases.Case("f", "k=0", work, ("k=",)))[0] == kind


def test_images_are_judged_by_what_comes_of_them():
    assert fuzz.outcome("a.png", raising(UnreadableImageError("Cannot read a.png")))[0] == "refused by name"
    assert fuzz.outcome("a.png", raising(ValueError("bad")))[0] == "other error"
    assert fuzz.outcome("a.png", raising(MemoryError()))[0] == "other error"
    assert fuzz.outcome("a.png", lambda: False)[0] == "silent"
    assert fuzz.outcome("a.png", lambda: True)[0] == "opened"


def test_what_ends_its_process_is_one_fault(tmp_path, monkeypatch):
    import os
    import signal
    import time

    assert fuzz.in_a_fork(lambda: [1], tmp_path) == [1]
    (tmp_path / "answer.json").unlink()
    assert fuzz.in_a_fork(lambda: os.kill(os.getpid(), signal.SIGSEGV), tmp_path) == "crashed"
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    assert "did not end" in fuzz.in_a_fork(lambda: time.sleep(60), tmp_path)


def test_some_images_of_every_damage(tmp_path):
    good = seeds(np.random.default_rng(0))
    assert {"PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"} <= {name.split("/")[0] for name in good}
    found = fuzz.piece(0, 100, 0, good, None, tmp_path)
    assert [fault for *_, fault in found if fault] == []
    counts = Counter((through, outcome) for through, _, outcome, _ in found)
    assert {kind for _, kind, _, _ in found} == set(DAMAGES)
    for through in ("opener", "rows of a data set"):
        assert counts[through, "opened"] + counts[through, "refused by name"] == 100
        assert min(counts[through, "opened"], counts[through, "refused by name"]) > 10
    assert counts["opener", "opened"] == counts["rows of a data set", "opened"]
