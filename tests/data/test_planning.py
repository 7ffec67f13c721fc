"""What a run asks of a machine, told before weights are loaded."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tiny import FAMILIES
from unime_st.cli import main
from unime_st.modules import build_encoder, export_encoder, saved
from unime_st.training import plan_training, without_weights
from unime_st.training.planning import memory, parameters_by_part

SIZES = {"batch_size": 8, "steps": 10, "mini_batch_num_tokens": 512}


def pairs_of(images):
    return Dataset.from_dict({"anchor": ["a red bus", "bus"] * 3, "positive": images})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planned_model_is_the_real_one_without_weights(family, backbone):
    real = build_encoder(backbone(family), peft_config=True, device="cpu")
    with without_weights():
        planned = build_encoder(backbone(family), peft_config=True, device="meta")
    assert {weight.device.type for weight in planned.parameters()} == {"meta"}
    assert parameters_by_part(planned[0].model) == parameters_by_part(real[0].model)
    assert memory(planned[0].model, 100) == memory(real[0].model, 100)
    parts = parameters_by_part(planned[0].model)
    assert parts["vision"][1] > 0
    assert parts["LoRA"][0] == sum(w.numel() for w in real.parameters() if w.requires_grad)
    texts = pairs_of(["blue car", "car"] * 3)
    images = pairs_of([Image.new("RGB", (64, 64), (number * 40, 0, 0)) for number in range(6)])
    without, shown = (plan_training(planned, rows, **SIZES) for rows in (texts, images))
    assert without.patches == 0 < shown.patches
    assert without.flops < shown.flops
    masks = [
        real.preprocess([{"text": text}])["attention_mask"].sum() for text in ("a red bus", "bus", "blue car", "car")
    ]
    assert without.tokens == pytest.approx(sum(map(int, masks)) / 2)


def test_the_arithmetic_is_that_of_matrix_products(backbone):
    """Counted by torch on the language model alone, whose attention is a small part at a few tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build_encoder(backbone("qwen2_vl"), peft_config=True, device="cpu")
    rows = pairs_of(["blue car", "car"] * 3)
    plan = plan_training(model, rows, **SIZES)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        for row in rows:
            for side in ("anchor", "positive"):
                model[0].model(
                    **{key: model.preprocess([{"text": row[side]}])[key] for key in ("input_ids", "attention_mask")}
                )
    one_pass = counted.get_total_flops() / len(rows)
    assert plan.flops / (3 * SIZES["batch_size"]) == pytest.approx(one_pass, rel=0.35)


def test_nothing_readable_is_an_error(backbone):
    model = build_encoder(backbone("qwen2_vl"), peft_config=True, device="cpu")
    rows = pairs_of(["x"] * 6).with_transform(lambda batch: (_ for _ in ()).throw(ValueError("bad")))
    with pytest.raises(ValueError, match="None of the rows looked at"):
        plan_training(model, rows, **SIZES)


def test_without_weights_is_put_back():
    from transformers import PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises(RuntimeError), without_weights():
        raise RuntimeError
    assert PreTrainedModel.__dict__["from_pretrained"] is before


def test_the_command_tells_memory_and_time(backbone, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "b.png")
    table = tmp_path / "p.csv"
    table.write_text("image,caption\na.png,one\nb.png,two\n")
    assert main(["check", str(table), "--backbone", str(backbone("qwen2_vl")), "--batch-size", "2"]) == 0
    told = capsys.readouterr().out
    assert "parameters: " in told
    assert "memory of a GPU, roughly: " in told
    assert "TFLOP a step" in told
    positive = next(line for line in told.splitlines() if "tokens of positive" in line)
    assert "p50 0," not in positive


def test_bad_rows_and_empty_cells_are_told_and_the_others_planned(backbone, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "19.png")
    lines = ["image,caption", *(f"{number}.png,number {number}" for number in range(1, 40)), "19.png,"]
    table = tmp_path / "p.csv"
    table.write_text("\n".join(lines) + "\n")
    command = ["check", str(table), "--backbone", str(backbone("qwen2_vl")), "--batch-size", "2", "--json"]
    assert main(command) == 1
    told = json.loads(capsys.readouterr().out)
    assert len(told["bad_rows"]) == 39
    assert len(told["empty_cells"]) == 1
    assert told["resources"]["patches"] > 0


def test_sizes_are_checked_as_in_training(backbone, tmp_path, capsys):
    table = tmp_path / "p.csv"
    table.write_text("query,target\na,b\nc,d\n")
    command = ["check", str(table), "--backbone", str(backbone("qwen2_vl"))]
    assert main([*command, "--mini-batch-num-tokens", "-5"]) == 1
    assert "`mini_batch_num_tokens=-5`" in capsys.readouterr().err
    assert main([*command, "--batch-size", "1"]) == 1
    assert "`per_device_train_batch_size=1`" in capsys.readouterr().err


def test_adapters_are_to_be_merged_first(backbone, tmp_path, capsys):
    adapted = build_encoder(backbone("qwen2_vl"), peft_config=True, device="cpu")
    folder = export_encoder(adapted, tmp_path / "adapters", merge_adapters=False)
    table = tmp_path / "p.csv"
    table.write_text("query,target\na,b\nc,d\n")
    for command in (["check"], ["train", "--output", str(tmp_path / "run"), "--device", "cpu", "--batch-size", "2"]):
        assert main([*command, str(table), "--backbone", str(folder)]) == 1
        assert f"Merge them first: unime export {folder} --output merged" in capsys.readouterr().err


def test_weights_on_the_hub_are_not_downloaded(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    asked = []
    monkeypatch.setattr(saved, "snapshot_download", lambda name, **options: asked.append(options) or str(tmp_path))
    with without_weights():
        saved.folder_of("me/photos")
    saved.folder_of("me/photos")
    left_out, whole = asked
    files = {"model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "2_Dense/model.safetensors"}
    skipped = {name for name in files if any(fnmatch(name, pattern) for pattern in left_out["ignore_patterns"])}
    assert skipped == files - {"2_Dense/model.safetensors"}
    assert not whole
