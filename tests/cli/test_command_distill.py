"""`unime distill` end to end: the student comes closer to the teacher, and a killed run goes on to the same weights."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from tiny_data import COLOURS, tiny_teacher
from unime_st import build_encoder
from unime_st.cli import main
from unime_st.cli.distill import SETTINGS
from unime_st.training import TextDistillation, distill_texts

RUN = ["--device", "cpu", "--batch-size", "8", "--max-steps", "12", "--learning-rate", "1e-2", "--save-steps", "3"]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "static")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("".join(f"a {colour} {kind}\n" for colour in COLOURS for kind in ("picture", "thing")))
    return path


@pytest.fixture(scope="session")
def command(texts, teacher, backbone):
    """The command without its output."""
    return ["distill", str(texts), "--teacher", str(teacher), "--backbone", str(backbone("qwen2_vl")), *RUN]


@pytest.fixture(scope="session")
def distilled(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("distilled") / "run"
    assert main([*command, "--output", str(output)]) == 0
    return output


def similarities(folder, texts):
    found = SentenceTransformer(str(folder), device="cpu").encode(
        texts.read_text().splitlines(), normalize_embeddings=True
    )
    return (found @ found.T)[~np.eye(len(found), dtype=bool)]


def test_the_student_comes_closer_to_the_teacher(distilled, texts, teacher, backbone, tmp_path):
    before = build_encoder(backbone("qwen2_vl"), device="cpu")
    before.save_pretrained(str(tmp_path / "before"))
    told = similarities(teacher, texts)
    first, last = (
        np.corrcoef(told, similarities(folder, texts))[0, 1] for folder in (tmp_path / "before", distilled / "encoder")
    )
    assert last > first + 0.1
    results = json.loads((distilled / "encoder" / "training.json").read_text())
    assert results["last"]["loss"] < results["first"]["loss"]


def test_what_is_exported_has_the_vision_tower_unchanged(distilled, backbone):
    start = build_encoder(backbone("qwen2_vl"), device="cpu")[0].model.state_dict()
    after = load_file(distilled / "encoder" / "model.safetensors")
    start, after = (
        {name.removeprefix("model."): np.asarray(weight) for name, weight in weights.items()}
        for weights in (start, after)
    )
    assert set(start) == set(after)
    changed = {name for name, weight in after.items() if not np.array_equal(weight, start[name])}
    assert changed
    assert all("language_model.layers" in name for name in changed)


def test_the_same_command_again_changes_nothing_and_another_is_refused(command, distilled, capsys):
    weights = (distilled / "encoder" / "model.safetensors").read_bytes()
    again = [*command, "--output", str(distilled)]
    assert main(again) == 0
    told = capsys.readouterr().out
    assert " at first, " in told
    assert told.endswith(f"wrote {distilled / 'encoder'}\n")
    assert (distilled / "encoder" / "model.safetensors").read_bytes() == weights
    assert main([*again, "--temperature", "0.1"]) == 1
    assert "`temperature` was 0.05 and is 0.1. Give them as before to go on" in capsys.readouterr().err
    assert main([*again, "--teacher-prompt", "query: "]) == 1
    assert "`teacher_prompt` was None and is 'query: '" in capsys.readouterr().err
    assert main([*again, "--max-rows", "15"]) == 1
    assert "`data_checksum` was" in capsys.readouterr().err


def test_stage_2_goes_on_from_it(distilled, pairs, tmp_path):
    train = ["train", str(pairs), "--backbone", str(distilled / "encoder"), "--output", str(tmp_path / "run")]
    assert main([*train, "--device", "cpu", "--batch-size", "4", "--max-steps", "1", "--held-out", "0.3"]) == 0
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


def test_captions_of_pairs(pairs, teacher, backbone, tmp_path, capsys):
    command = ["distill", str(pairs), "--teacher", str(teacher), "--backbone", str(backbone("qwen2_vl"))]
    command += ["--output", str(tmp_path / "run"), *RUN, "--max-steps", "1"]
    assert main([*command, "--columns", "title"]) == 1
    assert "has no column title; it has caption, image" in capsys.readouterr().err
    assert main(command) == 0  # the caption, by its name
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rows"] == {"train": 24}


def test_a_teacher_that_is_not_there_is_named(texts, backbone, tmp_path, capsys):
    command = ["distill", str(texts), "--backbone", str(backbone("qwen2_vl")), "--output", str(tmp_path / "run"), *RUN]
    assert main([*command, "--teacher", "no/such"]) == 1
    told = capsys.readouterr().err
    assert "distill: error: The teacher 'no/such' cannot be loaded" in told
    assert main([*command, "--teacher", "no/such", "--quiet", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert "Traceback" not in told


def test_bad_arguments_are_refused(texts, tmp_path):
    with pytest.raises(TypeError, match="`texts` is one text"):
        distill_texts("a cat", "teacher", "backbone", tmp_path / "run")
    with pytest.raises(ValueError, match="sideways"):
        TextDistillation(direction="sideways")
    with pytest.raises(ValueError, match="`temperature=0`, but it must be"):
        TextDistillation(temperature=0)
    assert not (tmp_path / "run").exists()


def test_defaults_are_those_of_the_settings():
    own = {field.name: field.default for field in dataclasses.fields(TextDistillation)}
    told = {name: default for name, _, default, _ in SETTINGS.values()}
    assert told == {name: own[name] for name in told}
    assert len(told) >= 10


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(command, distilled, tmp_path):
    output = tmp_path / "run"
    code = (  # slower steps, so that the kill comes between two of them
        "import sys, time; from sentence_transformers import SentenceTransformerTrainer as Trainer\n"
        "plain = Trainer.training_step\n"
        "Trainer.training_step = lambda *given: (time.sleep(0.5), plain(*given))[1]\n"
        "import torch; torch.set_num_threads(1)\n"
        "from unime_st.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([sys.executable, "-c", code, *command, "--output", str(output)], stdout=log, stderr=log)
    marker = output / "checkpoints" / "checkpoint-3" / "complete.json"
    end = time.monotonic() + 120
    while not marker.exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    run.kill()
    assert run.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert marker.exists()
    assert not (output / "encoder").exists()
    made = {path: path.stat().st_mtime_ns for path in (output / "teacher").rglob("*.npy")}
    assert main([*command, "--output", str(output)]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (output / "teacher").rglob("*.npy")}
    weights, others = (load_file(path / "encoder" / "model.safetensors") for path in (output, distilled))
    assert all(np.array_equal(weights[name], others[name]) for name in others)
    first, second = (json.loads((path / "encoder" / "training.json").read_text()) for path in (output, distilled))
    assert (first["first"]["loss"], first["last"]["loss"]) == (second["first"]["loss"], second["last"]["loss"])


@pytest.mark.slow
def test_two_processes_learn_what_one_does(command, distilled, tmp_path):
    half = ["4" if word == "8" else word for word in command]  # rows a step and process
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, "-m", "unime_st.cli", *half, "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    one, two = (json.loads((path / "encoder" / "training.json").read_text()) for path in (distilled, tmp_path / "run"))
    for place in ("first", "last"):
        assert two[place]["loss"] == pytest.approx(one[place]["loss"], rel=1e-2)
    assert one["first"]["loss"] != pytest.approx(one["last"]["loss"], rel=0.1)


@pytest.mark.parametrize(
    ("lines", "told"),
    [("same\nsame\nsame\n", "All 3 rows hold one text"), ("one\ntwo\n", "compared with one other alone")],
)
def test_texts_that_teach_nothing_are_refused(lines, told, command, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text(lines)
    assert main(["distill", str(texts), *command[2:], "--output", str(tmp_path / "run")]) == 1
    assert told in capsys.readouterr().err
