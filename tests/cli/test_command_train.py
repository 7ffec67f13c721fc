"""`unime train` end to end: weights change, what is exported is stock's, a killed run goes on to the same weights."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pictures import TRAIN, draw
from PIL import Image
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from unime_st import build_encoder
from unime_st.cli import main
from unime_st.data import load_pairs
from unime_st.files import FolderLock
from unime_st.training import PairsTraining, pairs_evaluator, train_pairs


def losses(output):
    """Loss of each step, from the last checkpoint."""
    last = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def test_a_run_changes_the_language_model_alone(trained, backbone):
    start = build_encoder(backbone("qwen2_vl"), device="cpu")[0].model.state_dict()
    after = load_file(trained / "encoder" / "model.safetensors")
    after = {name.removeprefix("model."): weight for name, weight in after.items()}
    start = {name.removeprefix("model."): weight.numpy() for name, weight in start.items()}
    assert set(start) == set(after)
    changed = {name for name, weight in after.items() if not np.array_equal(weight, start[name])}
    assert changed
    assert all("language_model.layers" in name for name in changed)
    assert len(losses(trained)) == 3
    assert all(loss > 0 for loss in losses(trained).values())


def test_what_is_exported_is_stocks_and_looks_at_images(trained, pairs):
    model = SentenceTransformer(str(trained / "encoder"), device="cpu")
    assert type(model) is SentenceTransformer
    rows = load_pairs(pairs)
    shown = [row["positive"]["image"] for row in rows.select(range(4))]
    seen = model.encode(shown)
    assert all(np.abs(seen[0] - other).max() > 1e-4 for other in seen[1:])  # a model that ignores its image fails
    grey = model.encode([Image.new("RGB", image.size, "grey") for image in shown])
    assert np.abs(seen - grey).max(axis=1).min() > 1e-4


def test_held_out_rows_are_apart_and_evaluated_before_and_after(trained, pairs, backbone):
    results = json.loads((trained / "results.json").read_text())
    assert results["rows"] == {"train": 17, "held_out": 7}
    assert results == json.loads((trained / "encoder" / "training.json").read_text())
    before, after = results["before"], results["after"]
    assert set(before) == set(after)
    assert "held_out_mean_recall@1" in after
    evaluator = pairs_evaluator(load_pairs(pairs).select(range(7)))
    assert len(evaluator.images) == 7
    report = (trained / "report.md").read_text()
    assert "recall before and after" in report
    assert "| text to image R@1 |" in report
    assert "plan:" not in report  # of another number of rows and epochs
    assert "caption asks for image" in report
    assert (trained / "report.html").is_file()


def test_the_same_command_again_changes_nothing(trained, pairs, backbone, capsys):
    weights = (trained / "encoder" / "model.safetensors").read_bytes()
    checkpoints = sorted(path.name for path in (trained / "checkpoints").iterdir())
    arguments = ["train", str(pairs), "--backbone", str(backbone("qwen2_vl")), "--output", str(trained), *TRAIN]
    assert main(arguments) == 0
    assert "before, " in capsys.readouterr().out
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == checkpoints
    assert (trained / "encoder" / "model.safetensors").read_bytes() == weights


def test_another_command_in_the_same_folder_is_refused(trained, pairs, backbone, tmp_path, capsys):
    arguments = ["train", str(pairs), "--backbone", str(backbone("qwen2_vl")), "--output", str(trained), *TRAIN]
    assert main([*arguments, "--temperature", "0.05"]) == 1
    assert "`temperature` was 0.02 and is 0.05. Give them as before to go on" in capsys.readouterr().err
    other = draw(tmp_path / "photos", 23)
    assert main(["train", str(other), *arguments[2:]]) == 1
    assert "`data_checksum` was" in capsys.readouterr().err


def test_a_second_run_in_the_folder_of_one_at_work_is_refused(pairs, backbone, tmp_path, capsys):
    output = tmp_path / "run"
    with FolderLock(output):
        command = ["train", str(pairs), "--backbone", str(backbone("qwen2_vl")), "--output", str(output), *TRAIN]
        assert main(command) == 1
    assert "Another run is at work in" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_a_device_that_is_not_the_trainers_is_refused(pairs, backbone, tmp_path, capsys):
    arguments = [
        "train",
        str(pairs),
        "--backbone",
        str(backbone("qwen2_vl")),
        "--output",
        str(tmp_path / "run"),
        *TRAIN,
    ]
    assert main([*arguments, "--device", "nonsense"]) == 1
    assert "`device='nonsense'`, but training is on '" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_bad_images_are_refused_before_anything_is_loaded_or_dropped(tmp_path, backbone, capsys):
    path = draw(tmp_path / "photos", 40)
    for number in (3, 7, 11):
        (path.parent / f"{number}.png").write_bytes(b"no image")
    arguments = ["train", str(path), "--backbone", str(backbone("qwen2_vl")), "--output", str(tmp_path / "run"), *TRAIN]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "3 images in 3 of 40 rows cannot be read: pairs.csv, line 5, line 9, line 13" in told
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--bad-images", "drop", "--max-steps", "1"]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert sum(rows.values()) == 37


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_pairs_that_are_not_image_and_text(kind, pairs, backbone, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(pairs.parent, folder)
    lines = [f"red {n} bus,{n} answers" if kind == "texts" else f"{n}.png,{23 - n}.png" for n in range(12)]
    (folder / "rows.csv").write_text("query,target\n" + "\n".join(lines) + "\n")
    arguments = ["train", str(folder / "rows.csv"), "--backbone", str(backbone("qwen2_vl"))]
    assert main([*arguments, "--output", str(tmp_path / "run"), *TRAIN, "--max-steps", "1"]) == 0
    after = json.loads((tmp_path / "run" / "results.json").read_text())["after"]
    assert after["held_out_cosine_recall@1"] <= after["held_out_cosine_recall@4"] == 1.0


def test_training_goes_on_from_a_saved_encoder(trained, pairs, tmp_path, capsys):
    arguments = ["train", str(pairs), "--backbone", str(trained / "encoder"), "--output", str(tmp_path / "run"), *TRAIN]
    arguments += ["--max-steps", "2"]
    assert main([*arguments, "--max-pixels", "1000"]) == 1
    assert "is a saved encoder, which keeps its `max_pixels`" in capsys.readouterr().err
    assert main(arguments) == 0  # in the same folder, for nothing was trained there
    before, after = (load_file(path / "encoder" / "model.safetensors") for path in (trained, tmp_path / "run"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    first = json.loads((tmp_path / "run" / "before.json").read_text())
    assert first == pytest.approx(json.loads((trained / "results.json").read_text())["after"])  # where the other ended


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(trained, pairs, backbone, tmp_path):
    output = tmp_path / "run"
    arguments = ["train", str(pairs), "--backbone", str(backbone("qwen2_vl")), "--output", str(output), *TRAIN]
    arguments += ["--save-steps", "1"]
    code = (  # slower steps, so that the kill comes between two of them
        "import sys, time; from sentence_transformers import SentenceTransformerTrainer as Trainer\n"
        "plain = Trainer.training_step\n"
        "Trainer.training_step = lambda *given: (time.sleep(1.5), plain(*given))[1]\n"
        "import torch; torch.set_num_threads(1)\n"
        "from unime_st.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=log, stderr=log)
    marker = output / "checkpoints" / "checkpoint-1" / "complete.json"
    end = time.monotonic() + 120
    while not marker.exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    run.kill()
    assert run.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert marker.exists()
    assert not (output / "checkpoints" / "checkpoint-3").exists()
    assert not (output / "encoder").exists()
    before = (output / "before.json").read_bytes()
    assert main(arguments) == 0
    assert (output / "before.json").read_bytes() == before
    assert losses(output) == losses(trained)
    weights, others = (load_file(path / "encoder" / "model.safetensors") for path in (output, trained))
    assert all(np.array_equal(weights[name], others[name]) for name in others)


def test_a_long_run_is_evaluated_on_the_way(pairs, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("unime_st.training.settings._STEPS_THAT_ALLOW", 4)
    rows = load_pairs(pairs)
    settings = PairsTraining(per_device_train_batch_size=4, max_steps=4, learning_rate=1e-3)
    done = train_pairs(
        rows.select(range(16)), backbone("qwen2_vl"), tmp_path / "run", settings,
        eval_pairs=rows.select(range(16, 24)), device="cpu",
    )  # fmt: skip
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    on_the_way = {entry["step"]: entry for entry in state["log_history"] if "eval_held_out_mean_recall@1" in entry}
    assert sorted(on_the_way) == [1, 2, 3, 4]
    assert on_the_way[4]["eval_held_out_mean_recall@1"] == pytest.approx(done.after["held_out_mean_recall@1"], abs=0.2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rows"] == {"train": 16, "held_out": 8}
    assert "step" in done.report.with_suffix(".md").read_text()
