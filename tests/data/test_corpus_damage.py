"""No byte of a corpus can change unnoticed: damage is found, named, and made good by the next run."""

import json
import logging
import os
import shutil
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import util

from unime_st.data import encode_corpus, load_corpus
from unime_st.data.corpus.encoded import MANIFEST


class Letters:
    """An embedding of a text by its letters; counts what it is given."""

    def __init__(self):
        self.seen = []

    def encode(self, items, **_):
        self.seen += items
        return np.array([[len(item), *(item.count(letter) for letter in "abcdefg0123456789")] for item in items], float)


class Killed(Letters):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def encode(self, items, **options):
        if len(self.seen) >= self.count:
            os.kill(os.getpid(), 9)
        return super().encode(items, **options)


TEXTS = [f"a text, number {number}" for number in range(23)]
PAIRS = [(f"id {number}", text) for number, text in enumerate(TEXTS)]


def encoded(folder, inputs=PAIRS, model=None, **options):
    options = {"window_size": 5, "model_name": "letters", "with_ids": True, **options}
    return encode_corpus(model or Letters(), inputs, folder, **options)


def everything(corpus):
    return np.asarray(corpus).tolist(), list(corpus.ids())


def outcome(folder):
    """What a corpus holds, and what is said if it is refused."""
    try:
        return everything(load_corpus(folder)), ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_a_flipped_byte_is_never_served(output_format, dtype, tmp_path):
    encoded(tmp_path / "whole", output_format=output_format, dtype=dtype)
    want = everything(load_corpus(tmp_path / "whole"))
    files = [path for path in sorted((tmp_path / "whole").rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) >= 6
    refused = flips = 0
    for file in files:
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 25)):
            changed = bytearray(content)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(bytes(changed))
            flips += 1
            found, said = outcome(tmp_path / "whole")
            refused += found is None
            assert found in (None, want), f"{file.name}, byte {place}"
            assert found or file.name in said or "part-" in said
        file.write_bytes(content)
    assert flips > 100
    assert refused > flips / 2  # the rest is of what says nothing, such as parquet's padding


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_a_damaged_part_is_encoded_anew(output_format, damage, tmp_path, caplog):
    want = everything(encoded(tmp_path / "whole", output_format=output_format))
    bytes_of = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("part-*")}
    name = sorted(bytes_of)[2]
    content = bytes_of[name]
    path = tmp_path / "whole" / name
    path.write_bytes({"flipped": b"", "cut": content[: len(content) // 2], "empty": b""}[damage])
    for place in range(len(content) // 3, len(content)) if damage == "flipped" else ():
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        if outcome(tmp_path / "whole")[0] is None:
            break
    with pytest.raises(ValueError, match=f"(?s){name} is damaged.*encoded anew"):
        everything(load_corpus(tmp_path / "whole"))
    model = Letters()
    with caplog.at_level(logging.WARNING):
        corpus = encoded(tmp_path / "whole", model=model, output_format=output_format)
    assert f"{name} is damaged, so it is encoded anew" in caplog.text
    assert model.seen == TEXTS[10:15]
    assert everything(corpus) == want
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("part-*")} == bytes_of


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"format_version": 2}', '{"format_version": "2"}', "null", "x"])
def test_a_damaged_manifest_is_named(content, tmp_path):
    encoded(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_text(content)
    for call in (lambda: load_corpus(tmp_path / "c"), lambda: encoded(tmp_path / "c")):
        with pytest.raises(ValueError, match=r"\.manifest\.json is damaged.*[Rr]estore it"):
            call()


@pytest.mark.parametrize("key", ["rows", "window_size", "model", "dtype"])
def test_a_manifest_that_was_changed_is_refused(key, tmp_path):
    encoded(tmp_path / "c")
    path = tmp_path / "c" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, key: "float16" if key == "dtype" else 3}))
    with pytest.raises(ValueError, match=r"\.manifest\.json is damaged"):
        load_corpus(tmp_path / "c")


def older(folder, output_format):
    """The corpus as versions before wrote it, without checksums."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "format_version": 1}))
    for part in sorted(folder.glob("part-*")):
        if output_format == "parquet":
            pq.write_table(pq.read_table(part).replace_schema_metadata(None), part)
        else:
            keys = folder / "fingerprints" / part.name
            np.save(keys, np.load(keys)[:-1])


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_corpora_of_before_are_read_and_named(output_format, tmp_path, caplog):
    want = everything(encoded(tmp_path / "c", output_format=output_format))
    older(tmp_path / "c", output_format)
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(tmp_path / "c")
    assert "encoded by an earlier version" in caplog.text
    assert everything(corpus) == want
    with pytest.raises(ValueError, match=r"begun by an earlier version of unime_st.*another `output_dir`"):
        encoded(tmp_path / "c", output_format=output_format)


def test_a_folder_in_use_is_refused_before_anything_is_encoded(tmp_path):
    begun, go_on, errors = threading.Event(), threading.Event(), []

    class Slow(Letters):
        def encode(self, items, **options):
            begun.set()
            assert go_on.wait(30)
            return super().encode(items, **options)

    def first():
        try:
            encoded(tmp_path / "c", model=Slow())
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(30)
    other = Letters()
    with pytest.raises(ValueError, match="`model` was 'letters' and is 'other' now"):
        encoded(tmp_path / "c", model=other, model_name="other")
    with pytest.raises(ValueError, match="`dtype` was 'float32' and is 'float16' now"):
        encoded(tmp_path / "c", model=other, dtype="float16")
    go_on.set()
    thread.join()
    assert (other.seen, errors) == ([], [])
    assert load_corpus(tmp_path / "c").manifest["model"] == "letters"


@pytest.mark.parametrize("before", [12, 15, 1])
@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_rows_can_be_appended(output_format, before, tmp_path):
    want = everything(encoded(tmp_path / "whole", output_format=output_format))
    encoded(tmp_path / "grown", PAIRS[:before], output_format=output_format)
    model = Letters()
    corpus = encoded(tmp_path / "grown", model=model, output_format=output_format)
    assert everything(corpus) == everything(load_corpus(tmp_path / "grown")) == want
    assert model.seen == TEXTS[before // 5 * 5 :]
    for path in (tmp_path / "whole").glob("part-*"):
        assert path.read_bytes() == (tmp_path / "grown" / path.name).read_bytes()
    with pytest.raises(ValueError, match=r"Row 12 is missing|inputs end after 12 rows"):
        encoded(tmp_path / "grown", PAIRS[:12], output_format=output_format)


def test_a_kill_while_rows_are_appended_loses_none(tmp_path):
    want = everything(encoded(tmp_path / "whole"))
    for stop in range(1, 4):
        folder = tmp_path / f"grown-{stop}"
        encoded(folder, PAIRS[:12])
        child = os.fork()
        if not child:
            encoded(folder, model=Killed(5 * (stop - 1)))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 9
        assert everything(encoded(folder)) == want


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_a_corpus_is_a_sequence_of_rows(output_format, tmp_path):
    encoded(tmp_path / "c", output_format=output_format)
    corpus = load_corpus(tmp_path / "c")
    whole = np.concatenate(list(corpus.parts()))
    assert (len(corpus), corpus.shape, corpus.ndim, corpus.dtype) == (23, whole.shape, 2, whole.dtype)
    np.testing.assert_array_equal(np.asarray(corpus), whole)
    np.testing.assert_array_equal(np.stack(list(corpus)), whole)
    mask = np.arange(23) % 3 == 0
    for place in (
        0,
        -1,
        22,
        slice(4, 13),
        slice(None, None, -2),
        slice(30, 40),
        [3, -1, 3],
        np.array([7, 0]),
        mask,
        [],
    ):
        np.testing.assert_array_equal(corpus[place], whole[place])
    assert np.asarray(corpus, dtype=np.float64).dtype == np.float64
    for place in (23, -24, [0, 23], "a", 1.0, True, (1, 2), [True, False]):
        with pytest.raises(IndexError):
            corpus[place]
    for numbers in ([0.5], [True], ["1"], [[1]], [-1], [23]):
        with pytest.raises(IndexError):
            corpus.rows(numbers)
    hits = util.semantic_search(np.asarray(corpus[:3]), np.asarray(corpus), top_k=1)
    assert [hit[0]["corpus_id"] for hit in hits] == [0, 1, 2]


@pytest.mark.parametrize("ids", [(True, False), (np.True_, np.False_), (1, True)])
def test_truths_are_no_ids(ids, tmp_path):
    with pytest.raises(TypeError, match=r"Row [01] .*True|Row 0 has the id"):
        encoded(tmp_path / "c", list(zip(ids, ["a", "b"], strict=True)))


def test_a_full_disk_is_named_with_the_folder(tmp_path, monkeypatch):
    """numpy writes into real files in C, and its own error of a full disk has no number."""
    import errno

    from unime_st import files

    calls = []

    def full(_fd):
        calls.append(1)
        if len(calls) > 1:  # the manifest had room
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for output_format in ("parquet", "npy"):
        with pytest.raises(OSError, match="full at row 0; the parts before are whole") as caught:
            encoded(tmp_path / "c" / output_format, output_format=output_format)
        assert caught.value.errno == errno.ENOSPC
        calls.clear()
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
    calls.append(1)
    with pytest.raises(OSError, match=r"disk of .*deep is full, so a\.npy was not written"):
        files.write_atomically(tmp_path / "deep" / "a.npy", np.zeros(3))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_two_processes_append_in_whatever_order(output_format, order, tmp_path, monkeypatch):
    want = everything(encoded(tmp_path / "whole", PAIRS[:19], output_format=output_format))
    for before in (7, 12):  # the short part is the second process's, then the first's
        folder = tmp_path / f"grown-{before}"
        encoded(folder, PAIRS[:before], output_format=output_format)
        monkeypatch.setenv("WORLD_SIZE", "2")
        for place, rank in enumerate(order):
            monkeypatch.setenv("RANK", str(rank))
            encoded(folder, PAIRS[:19], output_format=output_format)
            if not place:
                with pytest.raises(ValueError, match="is not complete"):
                    load_corpus(folder)
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
        assert everything(load_corpus(folder)) == want
