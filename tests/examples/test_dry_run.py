"""The plan of a run: its parameters are the real model's, its tokens the real encoder's, and no weights are read."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unime_st import build_encoder, export_encoder, load_encoder

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
PARTS = {  # modules of the model without a head: vision, of which the projector is a part or not
    "qwen2_vl": (["visual"], ["visual.merger"]),
    "qwen3_vl": (["visual"], ["visual.merger", "visual.deepstack_merger_list"]),
    "llava_next": (["vision_tower"], ["multi_modal_projector"]),
    "llava_onevision": (["vision_tower"], ["multi_modal_projector"]),
    "phi3_v": (["vision_embed_tokens.img_processor"], ["vision_embed_tokens.img_projection"]),
}


def count(weights, trained=None):
    return sum(weight.numel() for weight in weights if trained is None or weight.requires_grad == trained)


def recipe_of(script, backbone, **encoder):
    return script("recipe").Stage2Recipe(
        backbone=str(backbone), output="out", data={}, loss={}, training={}, encoder=encoder, lora={"rank": 4}
    )


def without_weights(folder, target):
    """A copy without any weights, which cannot be loaded."""
    shutil.copytree(folder, target)
    files = list(target.rglob("*.safetensors"))
    assert files
    for file in files:
        file.unlink()
    with pytest.raises(OSError, match=r"no file named|safetensors"):
        (load_encoder if (target / "modules.json").exists() else build_encoder)(target, device="cpu")
    return target


@pytest.mark.parametrize("family", PARTS)
def test_parameters_are_those_of_the_real_model(family, script, backbone, tmp_path):
    module = script("dry_run")
    arguments = SimpleNamespace(seed=0, device="cpu")
    real = script("stage").load_start(recipe_of(script, backbone(family)), arguments)[0].model
    planned, _ = module.planned_model(recipe_of(script, without_weights(backbone(family), tmp_path / "bare")))
    assert {weight.device.type for weight in planned.parameters()} == {"meta"}
    shapes = [{name: (w.shape, w.dtype, w.requires_grad) for name, w in m.named_parameters()} for m in (real, planned)]
    assert shapes[0] == shapes[1]

    found = module.parameters_by_part(planned)
    tower, projector = (sum(count(real.get_submodule(n).parameters()) for n in names) for names in PARTS[family])
    single = [w for name, w in real.named_parameters() if name.endswith(("image_newline", "glb_GN", "sub_GN"))]
    if family.startswith("qwen"):
        tower -= projector
    lora = count([w for name, w in real.named_parameters() if "lora_" in name])
    assert found["LoRA"] == (lora, 0)
    assert found["vision"] == (0, tower)
    assert found["projector"] == (0, projector + count(single))
    assert found["language model"] == (0, count(real.parameters(), False) - tower - projector - count(single))
    assert min(lora, tower, projector) > 0
    assert lora == count(real.parameters(), True)


@pytest.mark.parametrize("family", ["qwen2_vl", "phi3_v"])
def test_texts_alone_have_no_tower(family, script, backbone):
    found = script("dry_run").parameters_by_part(
        script("dry_run").planned_model(recipe_of(script, backbone(family), text_only=True))[0]
    )
    assert found["vision"] == found["projector"] == (0, 0)
    assert found["language model"][1] > 0


def test_a_config_alone_is_enough_for_parameters(script, backbone, tmp_path):
    module = script("dry_run")
    (tmp_path / "config.json").write_text((backbone("qwen2_vl") / "config.json").read_text())
    for options in ({}, {"text_only": True}):
        whole, encoder = module.planned_model(recipe_of(script, backbone("qwen2_vl"), **options))
        bare, none = module.planned_model(recipe_of(script, tmp_path, **options))
        assert encoder is not None
        assert none is None
        assert module.parameters_by_part(bare) == module.parameters_by_part(whole)


def test_stage_2_is_planned_without_weights(script, world, encoder, tmp_path, capsys):
    start = without_weights(encoder, tmp_path / "start")
    output = tmp_path / "out"
    given = [
        "--recipe", str(RECIPES / "stage2_qwen2_vl.yaml"), "--dry-run", "--processes", "2", f"backbone={start}",
        f"output={output}", f"data.root={world / 'train'}", f"data.image_root={world / 'images'}",
        f"data.bad_images_log={output}/bad.jsonl", "training.per_device_train_batch_size=2", "training.max_steps=6",
    ]  # fmt: skip
    capsys.readouterr()
    assert script("train_stage2").main(given) is None
    lines = capsys.readouterr().out.splitlines()
    assert not output.exists()
    assert not [line for line in lines if "MISSING" in line]
    for line in (
        "global batch: 4 rows = 2 x 2 process(es) x 1",
        "each query is compared with 3 others: 2 rows x 2 process(es) x 1",
        "rows of Colours: 8",
        "rows: 8",
        "steps: 6 (max_steps), an epoch has at most 2",
        "epochs: 3.00",
    ):
        assert line in lines

    real = load_encoder(encoder, device="cpu")
    rows = script("recipe").load_mmeb_train(world / "train", image_root=world / "images", image_size=336)
    tokens = {name: real[0].preprocess(rows[:][name])["attention_mask"].sum(1) for name in ("anchor", "positive")}
    for name, counts in tokens.items():
        assert any(f"'{name}': '{counts.float().mean():.0f} (at most {counts.max()})'" in line for line in lines)
    total = sum(float(counts.float().mean()) for counts in tokens.values()) * 4
    assert f"tokens a step: about {total:,.0f}, {total / 2:,.0f} a process" in lines
    assert any(line.startswith("memory a GPU, roughly: ") and "(8,192 tokens a pass)" in line for line in lines)


def test_stage_1_is_planned_without_weights_or_teacher(script, world, backbone, tmp_path, capsys):
    given = [
        "--recipe", str(RECIPES / "miniature_stage1.yaml"), "--dry-run", f"output={tmp_path / 'out'}",
        f"backbone={without_weights(backbone('qwen2_vl'), tmp_path / 'start')}", f"data.source={world / 'texts.txt'}",
        "training.per_device_train_batch_size=4", "training.max_steps=-1", "training.num_train_epochs=3",
        "encoder.text_only=true", "teacher.model=nowhere/teacher",
    ]  # fmt: skip
    assert script("train_stage1").main(given) is None
    printed = capsys.readouterr().out
    assert "steps: 12, an epoch has at most 4" in printed
    assert "parameters, vision: 0 trainable, 0 frozen" in printed
    assert "MISSING" not in printed
    assert not (tmp_path / "out").exists()


def test_what_is_not_at_hand_is_named_and_the_rest_printed(script, tmp_path, capsys):
    given = ["--recipe", str(RECIPES / "stage2_llava_next.yaml"), "--dry-run", "--processes", "8"]
    given += [f"data.root={tmp_path / 'nowhere'}", f"backbone={tmp_path / 'none'}"]
    script("train_stage2").main(given)
    printed = capsys.readouterr().out
    assert f"MISSING rows: '{tmp_path / 'nowhere'}' is no folder" in printed
    assert "MISSING model: " in printed
    assert "`backbone=<Hub name>`" in printed
    assert "MISSING tokens: they need the rows and the backbone's processor" in printed
    assert "global batch: 1024 rows = 128 x 8 process(es) x 1" in printed
    assert "each query is compared with 1023 others" in printed
    assert "steps: 1000 (max_steps)" in printed


def test_steps_of_an_epoch(script):
    steps = script("dry_run").steps_an_epoch
    sets = Counter({"A": 10, "B": 7, "C": 3})
    assert steps(sets, 4, homogeneous=False, drop_last=True) == 5
    assert steps(sets, 4, homogeneous=True, drop_last=True) == 3
    assert steps(sets, 4, homogeneous=True, drop_last=False) == 4
    assert steps(sets, 6, homogeneous=False, drop_last=False) == 4
    assert steps(Counter({"A": 8}), 4, homogeneous=True, drop_last=False) == 2


def test_memory_is_near_what_the_backward_pass_keeps(script, backbone, tmp_path):
    """Weights, gradients and AdamW's states exactly; activations against the tensors that autograd keeps."""
    module = script("dry_run")
    model = build_encoder(backbone("llava_next"), device="cpu", peft_config=script("recipe").default_lora_config(2))
    backbone_model = model[0].model
    ids = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0))
    weights = {weight.untyped_storage().data_ptr() for weight in backbone_model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = backbone_model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    found = module.memory(backbone_model, ids.numel())
    true = sum(size for size, _ in kept.values())
    assert true > 0
    assert 0.6 < found["activations"] / true < 1.6
    states.sum().backward()
    assert found["gradients"] == sum(w.grad.nbytes for w in backbone_model.parameters() if w.grad is not None)
    assert found["weights"] == sum(w.nbytes for w in backbone_model.parameters())
    trained = [w for w in backbone_model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert found["AdamW"] == held > 0
    less = module.memory(backbone_model, ids.numel(), checkpointing=True)
    assert 0 < less["activations"] < found["activations"]


def test_a_saved_adapterless_start_keeps_its_settings(script, backbone, tmp_path):
    folder = export_encoder(build_encoder(backbone("qwen2_vl"), device="cpu", max_pixels=3136), tmp_path / "saved")
    start = without_weights(folder, tmp_path / "bare")
    _, encoder = script("dry_run").planned_model(recipe_of(script, start))
    assert encoder[0].processor.image_processor.size["longest_edge"] == 3136
