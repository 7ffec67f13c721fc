"""Which checkpoints are whole, what the callback marks and deletes, and what a full disk says."""

import errno
import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tiny_data import COLOURS, tiny_teacher
from unime_st.checkpoints import (
    MARKER,
    CheckpointCallback,
    checkpoints,
    explained_write_errors,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A model of a few words, which trains in no time."""
    return tiny_teacher(tmp_path_factory.mktemp("words") / "model")


def trainer(words, folder, callbacks=(), **changes):
    model = SentenceTransformer(str(words), device="cpu")
    rows = [f"{'a ' * times}{colour}" for times in range(3) for colour in COLOURS]
    options = {"max_steps": 8, "save_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=4, disable_tqdm=True, **(options | changes)
    )
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"a": rows, "b": rows[::-1]}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[CheckpointCallback(), *callbacks],
    )


def checkpoint(folder, step, *, whole=True):
    made = folder / f"checkpoint-{step}"
    (made / "1_Pooling").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "1_Pooling" / "config.json").write_text("{}")
    if whole:
        mark_complete(made, step)
    return made


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / MARKER).unlink(),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "model.safetensors").write_bytes(b"weig"),
        lambda path: shutil.rmtree(path / "1_Pooling"),
        lambda path: shutil.rmtree(path),
    ],
    ids=["unmarked", "a file lacks", "a file is cut", "a folder lacks", "gone"],
)
def test_a_harmed_checkpoint_is_passed_over(harm, tmp_path):
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)  # by number: "10" sorts before "9"
    assert last_complete_checkpoint(tmp_path) == ten
    harm(ten)
    assert last_complete_checkpoint(tmp_path) == nine
    harm(nine)
    assert last_complete_checkpoint(tmp_path) is None


def test_no_folder_and_other_folders_are_no_checkpoints(tmp_path):
    assert last_complete_checkpoint(tmp_path / "none") is None
    mark_complete(checkpoint(tmp_path / "best-checkpoint-3", 1).parent, 1)
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints(tmp_path) == []


def test_the_trainer_s_checkpoints_are_marked_and_rotated(words, tmp_path):
    run = trainer(words, tmp_path, save_total_limit=2)
    run.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
    assert all(is_complete(path) for path in checkpoints(tmp_path))
    assert run.args.save_total_limit == 2
    assert (tmp_path / "checkpoint-8" / "optimizer.pt").stat().st_size > 0


class Witness(TrainerCallback):
    """Says at each save, before and after the marker, what a killed run would find."""

    def __init__(self, folder, monkeypatch):
        self.found = []

        def looking(path, step):
            self.found.append((step, last_complete_checkpoint(folder)))
            mark_complete(path, step)
            self.found.append((step, last_complete_checkpoint(folder)))

        monkeypatch.setattr("unime_st.checkpoints.mark_complete", looking)


def test_at_every_moment_there_is_a_whole_checkpoint(words, tmp_path, monkeypatch):
    witness = Witness(tmp_path, monkeypatch)
    trainer(words, tmp_path, save_total_limit=1).train()
    names = [(step, path and path.name) for step, path in witness.found]
    expected = [(2, None), (2, "checkpoint-2")]
    for step in (4, 6, 8):
        expected += [(step, f"checkpoint-{step - 2}"), (step, f"checkpoint-{step}")]
    assert names == expected
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8"]


def test_a_checkpoint_about_to_be_written_over_is_unmarked(words, tmp_path):
    trainer(words, tmp_path).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(words, tmp_path, [Stops(4, "on_step_end")]).train()  # from the start, over the first run's
    whole = [path.name for path in checkpoints(tmp_path) if is_complete(path)]
    assert whole == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


class Stops(TrainerCallback):
    def __init__(self, step, event):
        def stop(args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

        setattr(self, event, stop)


def test_the_best_checkpoint_stays(tmp_path):
    best, *_, newest, later = [checkpoint(tmp_path, step, whole=step != 4) for step in (2, 4, 6, 8, 10)]
    callback = CheckpointCallback()
    callback._limit = 1
    callback._rotate(newest, str(best))
    assert checkpoints(tmp_path) == [best, newest, later]


def test_means_that_resuming_would_cut_are_warned_of(words, tmp_path, caplog):
    trainer(words, tmp_path, max_steps=1, save_steps=3, logging_steps=2).train()
    assert "`save_steps=3` is no multiple of `logging_steps=2`" in caplog.text
    caplog.clear()
    trainer(words, tmp_path, max_steps=1, save_steps=4, logging_steps=2).train()
    assert "multiple" not in caplog.text


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json", "rng_state.pth", "README.md"])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(file, words, tmp_path):
    """The kernel's own error: what is written to /dev/full finds no space."""
    (tmp_path / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "checkpoint-4" / file).symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"checkpoint-2 is whole, and the same command goes on.*checkpoint-4 is half") as e,
        explained_write_errors(tmp_path),
    ):
        trainer(words, tmp_path, save_total_limit=1).train()
    assert e.value.errno == errno.ENOSPC
    assert "lower `save_total_limit`" in str(e.value)
    last = last_complete_checkpoint(tmp_path)
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")  # what stock code would go on from
    (tmp_path / "checkpoint-4" / file).unlink()
    run = trainer(words, tmp_path, save_total_limit=1)
    run.train(resume_from_checkpoint=str(last))
    whole = trainer(words, tmp_path / "through")
    whole.train()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=0, atol=0)
    assert run.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8"]


def test_other_errors_are_left_alone(tmp_path):
    for error in (OSError(errno.EACCES, "no"), RuntimeError("shapes differ"), SafetensorError("header too large")):
        with pytest.raises(type(error)) as found, explained_write_errors(tmp_path):
            raise error
        assert found.value is error


def test_safetensors_says_it_in_its_own_way(tmp_path):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError, match="no checkpoint is whole yet"), explained_write_errors(tmp_path):
        raise error


def test_a_marker_cut_short_marks_nothing(tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
        mark_complete(tmp_path / f"checkpoint-{step}", step=step)
    marker = tmp_path / "checkpoint-4" / MARKER
    marker.write_bytes(marker.read_bytes()[: marker.stat().st_size // 2])
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json", MARKER])
def test_no_flipped_byte_of_a_checkpoint_is_gone_on_from(name, tmp_path):
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    good = (ten / name).read_bytes()
    passed = 0
    for place in range(len(good)):
        for bit in range(8):
            (ten / name).write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            found = last_complete_checkpoint(tmp_path)
            assert found == nine or (name == MARKER and found == ten)  # its spaces and its step are for nobody
            passed += found == nine
    assert passed > len(good) * (4 if name == MARKER else 7)
    (ten / name).write_bytes(good)
    assert last_complete_checkpoint(tmp_path) == ten


def test_a_damaged_file_is_named_and_rotation_reads_nothing(tmp_path, caplog, monkeypatch):
    two, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    (two / "model.safetensors").write_bytes(b"weighed")
    assert not is_complete(two)
    assert f"{two / 'model.safetensors'} is damaged" in caplog.text
    assert is_complete(two, read_files=False)
    monkeypatch.setattr("unime_st.checkpoints._sha256", None)
    callback = CheckpointCallback()
    callback._limit = 2
    callback._rotate(newest, None)
    assert checkpoints(tmp_path) == [two, newest]


def test_marks_of_before_there_were_checksums_are_told_of(tmp_path, caplog):
    old = checkpoint(tmp_path, 2, whole=False)
    files = {"model.safetensors": 7, "1_Pooling/config.json": 2}
    (old / MARKER).write_text(json.dumps({"step": 2, "files": files}))
    assert last_complete_checkpoint(tmp_path) == old
    assert f"{old} was marked by an earlier version, without checksums" in caplog.text
    (old / "model.safetensors").write_bytes(b"weig")
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("content", ["[]", '{"files": [1]}', '{"files": {"model.safetensors": {}}}', '"x"', "3"])
def test_a_damaged_marker_is_named_and_marks_nothing(tmp_path, caplog, content):
    (checkpoint(tmp_path, 2) / MARKER).write_text(content)
    assert last_complete_checkpoint(tmp_path) is None
    assert f"{MARKER} is damaged" in caplog.text
