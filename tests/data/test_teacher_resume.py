"""The teacher's cache when it is killed, and when several processes fill it."""

import errno
import gc
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from killing import note, notes, run_with_kills
from tiny_data import COLOURS, tiny_teacher
from two_processes import run_two
from unime_st.data import teacher_embeddings
from unime_st.embedding import store as embedding_store
from unime_st.embedding.full_disk import explained_full_disk
from unime_st.embedding.missing import embed_missing
from unime_st.embedding.store import EmbeddingStore, key_array
from unime_st.fingerprint import fingerprint

TEXTS = [" ".join(COLOURS[(number >> shift) % 8] for shift in (0, 3, 6)[: 1 + number % 3]) for number in range(700)]
PROMPT = "a thing "


class Noting(SentenceTransformer):
    """A teacher that notes what it is about to embed."""

    folder = None

    def encode(self, texts, **options):
        assert options["prompt"] == PROMPT
        note(self.folder, texts)
        return super().encode(texts, **options)


def fill(folder, log=None):
    torch.set_num_threads(1)
    teacher = Noting(str(folder.parent / "teacher"), device="cpu", prompts={"own": PROMPT})
    teacher.folder = log or folder
    return teacher_embeddings(teacher, TEXTS, folder / "cache", prompt_name="own", batch_size=4, shard_size=16)


def written(folder):
    """Texts whose embeddings are on disk, read without the code under test."""
    stored = b"".join(np.load(path)["keys"].tobytes() for path in sorted(Path(folder).glob("cache/*/shard-*.npy")))
    return sorted(text for text in set(TEXTS) if bytes.fromhex(fingerprint(text)) in stored)


@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_and_embeds_nothing_twice(tmp_path):
    tiny_teacher(tmp_path / "teacher")
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = fill(whole)
    assert sorted(notes(whole)) == sorted(set(TEXTS))
    folder = tmp_path / "killed"
    seen = run_with_kills(fill, written, folder, kills=6, seed=0, most=60)
    log = notes(folder)
    assert any(stored for _, stored in seen)
    for noted, stored in seen:
        assert not set(stored) & set(log[noted:]), "what was on disk was embedded again"
    assert len(log) <= len(set(TEXTS)) + 6 * 16  # a kill costs the file in hand, at most
    before = len(log)
    assert np.array_equal(fill(folder), expected)  # to the last bit
    assert len(notes(folder)) == before
    assert not list(folder.rglob("*.partial"))


def share(rank, folder):
    log = folder / f"rank{rank}"
    log.mkdir(parents=True)
    return {"found": torch.from_numpy(fill(folder, log))}


@pytest.mark.slow
def test_two_processes_share_the_work_and_equal_one(tmp_path):
    tiny_teacher(tmp_path / "teacher")
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    whole.mkdir()
    expected = fill(whole)
    first, second = run_two(share, tmp_path, shared)
    np.testing.assert_allclose(first["found"], expected, atol=1e-6)
    assert torch.equal(first["found"], second["found"])
    halves = [notes(shared / f"rank{rank}") for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(set(TEXTS))  # each once over both
    assert min(len(half) for half in halves) > len(set(TEXTS)) * 0.35


def test_without_a_process_group_torchrun_says_who_does_what(tmp_path, monkeypatch, caplog):
    """The other process is not there: its part is awaited, then done here, with a warning."""
    keys = key_array(bytes([number]) + bytes(15) for number in range(10))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    asked = []

    def embed(places):
        asked.append(places.tolist())
        return keys.view(np.uint8).reshape(10, 16)[places, :1].astype(np.float32)

    store = EmbeddingStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        embed_missing(
            store, keys, np.ones(10), embed, shard_size=3, description="Test", patience=0.1,
        )  # fmt: skip
    assert asked == [[1, 3, 5], [7, 9], [0, 2, 4], [6, 8]]
    assert "owes 5 inputs" in caplog.text
    assert store.rows(store.find(keys))[:, 0].tolist() == list(range(10))


def test_prompts_by_name_and_by_text_are_one_cache(tmp_path):
    tiny_teacher(tmp_path / "teacher")
    teacher = SentenceTransformer(str(tmp_path / "teacher"), device="cpu", prompts={"own": PROMPT, "q": "red "})
    texts = ["a picture", "a green thing"]
    named = teacher_embeddings(teacher, texts, tmp_path / "cache", prompt_name="own")
    np.testing.assert_allclose(named, teacher.encode(texts, prompt=PROMPT), atol=1e-6)
    folders = list((tmp_path / "cache").iterdir())
    assert len(folders) == 1
    assert np.array_equal(teacher_embeddings(teacher, texts, tmp_path / "cache", prompt=PROMPT), named)
    assert list((tmp_path / "cache").iterdir()) == folders
    other = teacher_embeddings(teacher, texts, tmp_path / "cache", prompt_name="q")
    plain = teacher_embeddings(teacher, texts, tmp_path / "cache")
    assert abs(other - named).max() > 0.01
    assert abs(other - plain).max() > 0.01
    with pytest.raises(ValueError, match=r"no prompt named 'p'; it has .*own.* Give its text as `prompt`"):
        teacher_embeddings(teacher, texts, tmp_path / "cache", prompt_name="p")
    with pytest.raises(ValueError, match="not both"):
        teacher_embeddings(teacher, texts, tmp_path / "cache", prompt="a", prompt_name="own")


def test_a_default_prompt_may_be_left_out(tmp_path):
    tiny_teacher(tmp_path / "teacher")
    teacher = SentenceTransformer(
        str(tmp_path / "teacher"), device="cpu", prompts={"own": PROMPT}, default_prompt_name="own"
    )
    default = teacher_embeddings(teacher, ["red"], tmp_path / "cache", teacher_name="t")
    without = teacher_embeddings(teacher, ["red"], tmp_path / "cache", prompt="", teacher_name="t")
    np.testing.assert_allclose(default, teacher.encode([PROMPT + "red"], prompt=""), atol=1e-6)
    np.testing.assert_allclose(without, teacher.encode(["red"], prompt=""), atol=1e-6)
    assert abs(default - without).max() > 0.01


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("3 requested and 1 written")]
)
def test_a_full_disk_names_the_folder_and_is_gone_on_from(tmp_path, monkeypatch, error):
    real, written = embedding_store.write_atomically, []

    def full(path, content):
        if len(written) == 2:
            raise error
        real(path, content)
        written.append(path)

    class Ones:
        asked = 0

        def encode(self, texts, **options):
            self.asked += len(texts)
            return np.ones((len(texts), 2))

    texts = [f"t{number}" for number in range(10)]
    monkeypatch.setattr(embedding_store, "write_atomically", full)
    with pytest.raises(OSError, match=rf"The disk of {tmp_path}.* is full .*free some space and call again") as found:
        teacher_embeddings(Ones(), texts, tmp_path, teacher_name="ones", shard_size=3)
    assert found.value.errno == errno.ENOSPC
    monkeypatch.undo()
    teacher = Ones()
    assert teacher_embeddings(teacher, texts, tmp_path, teacher_name="ones").shape == (10, 2)
    assert teacher.asked == 4


def test_other_errors_of_the_disk_are_left_alone(tmp_path):
    error = OSError(errno.EACCES, "no")
    with pytest.raises(OSError) as found, explained_full_disk(tmp_path):
        raise error
    assert found.value is error


def test_threads_do_not_parse_headers_at_once(tmp_path):
    """CPython 3.11 counts the depth of what it parses for all threads together, and fails when they take turns."""
    cache = EmbeddingStore(tmp_path)
    for number in range(100):
        cache.add(key_array([number.to_bytes(16, "big")]), np.ones((1, 3), dtype=np.float32))
    switch = sys.getswitchinterval()
    threshold = gc.get_threshold()

    def take_turns(phase, info):
        time.sleep(0)

    gc.callbacks.append(take_turns)
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(1)
        for _ in range(5):
            assert len(EmbeddingStore(tmp_path)) == 100
    finally:
        gc.callbacks.remove(take_turns)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(switch)
