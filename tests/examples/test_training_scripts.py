"""Both stages run for real on a tiny model: trained, resumed, exported, on one process and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers.trainer_utils import get_last_checkpoint

from unime_st.modules import MultimodalEncoder

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
TINY = ["training.per_device_train_batch_size=4", "training.save_steps=2", "training.disable_tqdm=true", "lora.rank=4"]
TINY += ["training.learning_rate=1e-2"]


def stage1(world, teacher, start, output, steps):
    return [
        "--recipe", str(RECIPES / "miniature_stage1.yaml"), *TINY, f"backbone={start}", f"output={output}",
        f"data.source={world / 'texts.txt'}", f"teacher.model={teacher}", f"teacher.cache_dir={output}/teacher",
        f"training.max_steps={steps}",
    ]  # fmt: skip


def stage2(world, start, output, steps):
    return [
        "--recipe", str(RECIPES / "miniature_stage2.yaml"), *TINY, f"backbone={start}", f"output={output}",
        f"data.root={world / 'train'}", f"data.image_root={world / 'images'}", "loss.num_hard_negatives=2",
        "loss.mini_batch_size=2", f"training.max_steps={steps}",
    ]  # fmt: skip


def log_of(output):
    state = Path(get_last_checkpoint(str(output / "checkpoints"))) / "trainer_state.json"
    return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


class Arguments:
    """Of two processes."""

    per_device_train_batch_size, world_size, gradient_accumulation_steps, process_index = 4, 2, 8, 0
    seed, device, n_gpu = 0, "cpu", 1


def test_both_stages_one_after_the_other(script, world, teacher, backbone, tmp_path, capsys):
    start = backbone("qwen2_vl")
    first = script("train_stage1").main(stage1(world, teacher, start, tmp_path / "one", 2))
    assert first == tmp_path / "one" / "encoder"
    printed = capsys.readouterr().out
    assert "each query is compared with 3 others: 4 rows x 1 process(es) x 1" in printed
    assert f"wrote {first}" in printed
    assert {"nearest_neighbor_agreement", "loss"} <= set(log_of(tmp_path / "one")[-1])
    assert list((tmp_path / "one" / "teacher").rglob("*identity.json"))

    second = script("train_stage2").main(stage2(world, first, tmp_path / "two", 2))
    assert "each query is compared with 3 others" in capsys.readouterr().out
    logs = log_of(tmp_path / "two")
    assert {"false_negatives_filtered", "hard_negative_similarity"} <= set(logs[-1])
    assert all(np.isfinite(entry["loss"]) for entry in logs)

    items = ["a red picture", {"image": str(world / "images" / "red.png")}]
    found = [SentenceTransformer(str(path), device="cpu").encode(items) for path in (first, second)]
    assert np.abs(found[0] - found[1]).max() > 1e-3  # stage 2 moved the weights, and the export holds them
    np.testing.assert_allclose(np.linalg.norm(found[1], axis=1), 1, atol=1e-5)


def test_the_recipes_for_gpus_run(script, world, teacher, backbone, tmp_path):
    """As they are but for sizes and devices: texts alone, then batches of one data set with a damaged image."""
    small = ["training.per_device_train_batch_size=2", "training.use_cpu=true", "training.bf16=false", "lora.rank=4"]
    small += ["training.disable_tqdm=true", "training.dataloader_num_workers=0", "training.max_steps=2"]
    small += ["training.save_steps=2", "training.logging_steps=1"]
    one, two = (f"output={tmp_path / name}" for name in ("one", "two"))
    (tmp_path / "texts.csv").write_text("anchor,positive\n" + "".join(f"a{n},b{n}\n" for n in range(8)))
    first = script("train_stage1").main(
        ["--recipe", str(RECIPES / "stage1_qwen2_vl.yaml"), *small, one, f"backbone={backbone('qwen2_vl')}",
         f"data.source={tmp_path / 'texts.csv'}", "data.name=null", f"teacher.model={teacher}",
         f"teacher.cache_dir={tmp_path / 'teacher'}", "encoder.max_pixels=3136"]
    )  # fmt: skip
    shutil.copytree(world / "images", tmp_path / "images")
    for image in list((tmp_path / "images").iterdir())[:4]:
        image.write_bytes(b"no image")
    log = tmp_path / "bad.jsonl"
    second = script("train_stage2").main(
        ["--recipe", str(RECIPES / "stage2_qwen2_vl.yaml"), *small, two, f"backbone={first}",
         f"data.root={world / 'train'}", f"data.image_root={tmp_path / 'images'}", f"data.bad_images_log={log}",
         "data.image_size=28", "loss.mini_batch_num_tokens=256", "loss.num_hard_negatives=1"]
    )  # fmt: skip
    for output in (first, second):
        entries = log_of(output.parent)
        assert len(entries) == 2
        assert all(np.isfinite(entry["loss"]) for entry in entries)
    assert log.read_text()
    items = ["a red picture", {"image": str(world / "images" / "red.png")}]  # with the tower that stage 1 left out
    found = [SentenceTransformer(str(path), device="cpu").encode(items) for path in (first, second)]
    assert all(np.isfinite(part).all() for part in found)
    assert np.abs(found[0] - found[1]).max() > 0


def test_a_stopped_run_goes_on_and_ends_where_it_would_have(script, world, encoder, tmp_path, capsys):
    main = script("train_stage2").main
    steady = ["training.lr_scheduler_type=constant", "training.warmup_steps=0"]  # or a shorter run decays faster
    through = main([*stage2(world, encoder, tmp_path / "through", 4), *steady])
    main([*stage2(world, encoder, tmp_path / "again", 2), *steady])
    capsys.readouterr()
    resumed = main([*stage2(world, encoder, tmp_path / "again", 4), *steady])
    assert f"going on from {tmp_path / 'again' / 'checkpoints' / 'checkpoint-2'}" in capsys.readouterr().out
    texts = ["a red picture", "a green picture"]
    expected, found, before = (
        SentenceTransformer(str(path), device="cpu").encode(texts) for path in (through, resumed, encoder)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - before).max() > 1e-3


def test_what_is_not_worth_much_is_said(script, encoder, capsys):
    stage = script("stage")
    loss = script("train_stage2").HardNegativeInfoNCELoss(None, num_hard_negatives=8)

    assert stage.count_negatives(loss, Arguments, candidates_a_row=2) == 7
    printed = capsys.readouterr().out
    for advice in (
        "gather_across_devices=True",
        "`mini_batch_size` (GradCache)",
        "`num_hard_negatives=8` is more than the 7 there are",
    ):
        assert advice in printed
    loss.gather_across_devices = True
    assert stage.count_negatives(loss, Arguments, candidates_a_row=2) == 15


def test_a_saved_encoder_keeps_its_settings(script, encoder):
    recipe = script("recipe").Stage2Recipe(
        backbone=str(encoder), output="o", data={}, loss={}, training={}, encoder={"max_pixels": 3136}
    )
    with pytest.raises(ValueError, match=r"keeps its \['max_pixels'\]: leave them out"):
        script("stage").load_start(recipe, Arguments)
    model = script("stage").load_start(script("recipe").Stage2Recipe(**(vars(recipe) | {"encoder": {}})), Arguments)
    assert isinstance(model[0], MultimodalEncoder)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora" in name and "visual" not in name for name in trained)


def test_a_teacher_s_embeddings_from_a_file(script, tmp_path):
    stage = script("stage")
    rows = Dataset.from_dict({"a": ["x0", "x1", "x2"], "b": ["y0", "y1", "y2"]})
    embeddings = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    np.save(tmp_path / "teacher.npy", embeddings)
    labelled = stage.teacher_labels(rows, model=str(tmp_path / "teacher.npy"), cache_dir=str(tmp_path))
    np.testing.assert_allclose(np.asarray(labelled[1]["label"]), embeddings[1])


def test_a_teacher_embeds_with_its_own_prompt_of_a_name(script, teacher, tmp_path):
    model = SentenceTransformer(str(teacher), device="cpu")
    model.prompts = {"red": "red "}
    model.save_pretrained(str(tmp_path / "teacher"))
    rows = Dataset.from_dict({"text": ["a green picture", "a thing"]})
    found = {
        name: np.asarray(
            script("stage").teacher_labels(
                rows, model=str(tmp_path / "teacher"), cache_dir=str(tmp_path / "cache"), prompt_name=name
            )[:]["label"]
        )
        for name in ("red", None)
    }
    np.testing.assert_allclose(found["red"], model.encode(rows["text"][:], prompt="red "), atol=1e-6)
    assert np.abs(found["red"] - found[None]).max() > 1e-2


@pytest.mark.slow
def test_two_processes_by_the_ddp_configuration(world, encoder, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(EXAMPLES / "accelerate/ddp.yaml"),
    ]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    run = [*stage2(world, encoder, tmp_path / "ddp", 2), "loss.gather_across_devices=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(EXAMPLES / "train_stage2.py"), *run, "training.per_device_train_batch_size=2"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("each query is compared with 3 others: 2 rows x 2 process(es) x 1") == 1
    assert done.stdout.count("wrote ") == 1
    SentenceTransformer(str(tmp_path / "ddp" / "encoder"), device="cpu")
