"""Building, loading and exporting: every weight from the file, nothing half-written, nothing changed in memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from tiny import FAMILIES, picture, tiny_backbone
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.modules import default_lora_config
from unime_st.modules.multimodal_encoder import SETTINGS_FILE

ROWS = [["a red bus", "a longer text"], [picture("green")]]
ATOL = 1e-5


def embed(model):
    return np.concatenate([model.encode(rows) for rows in ROWS])


@pytest.fixture
def adapted(backbone):
    """An encoder whose adapters do something."""
    model = build_encoder(backbone("fast_vlm"), device="cpu", peft_config=default_lora_config(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def own_backbone(tmp_path):
    return tiny_backbone("fast_vlm", tmp_path / "backbone")


def test_export_merges_and_leaves_the_model_as_it_was(adapted, backbone, tmp_path):
    expected = embed(adapted)
    state = {name: value.clone() for name, value in adapted.state_dict().items()}
    folder = export_encoder(adapted, tmp_path / "deep" / "merged")
    assert not (folder / "adapter_config.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    assert adapted.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in adapted.state_dict().items())
    assert adapted.active_adapters() == ["default"]
    np.testing.assert_array_equal(embed(adapted), expected)
    assert np.abs(expected - embed(build_encoder(backbone("fast_vlm"), device="cpu"))).max() > 1e-3
    for model in (SentenceTransformer(str(folder), device="cpu"), load_encoder(folder, device="cpu")):
        np.testing.assert_allclose(embed(model), expected, atol=ATOL)


def test_export_of_adapters_alone(adapted, tmp_path):
    folder = export_encoder(adapted, tmp_path / "adapters", merge_adapters=False)
    assert (folder / "adapter_config.json").is_file()
    assert not (folder / "model.safetensors").exists()
    for model in (SentenceTransformer(str(folder), device="cpu"), load_encoder(folder, device="cpu")):
        np.testing.assert_allclose(embed(model), embed(adapted), atol=ATOL)


def test_a_loaded_export_can_be_adapted_again(adapted, tmp_path):
    """Stage 2 starts from stage 1 merged."""
    folder = export_encoder(adapted, tmp_path / "stage1")
    model = load_encoder(folder, device="cpu")
    model.add_adapter(default_lora_config(rank=2))
    assert {p.shape[0] for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n} == {2}
    np.testing.assert_allclose(embed(model), embed(adapted), atol=ATOL)


def test_export_replaces_encoders_only_and_leaves_no_half(adapted, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"notes exists and holds something other"):
        export_encoder(adapted, tmp_path / "notes")
    folder = export_encoder(adapted, tmp_path / "encoder")
    export_encoder(adapted, folder)
    before = embed(adapted)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(adapted, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        export_encoder(adapted, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "notes"]
    np.testing.assert_array_equal(embed(adapted), before)  # the adapters are back


def test_an_export_killed_while_it_deletes_the_old_one_is_whole(adapted, backbone, tmp_path, monkeypatch):
    folder = export_encoder(build_encoder(backbone("fast_vlm"), device="cpu"), tmp_path / "encoder")

    def killed(path, **_):
        for file in Path(path).rglob("*.safetensors"):
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unime_st.folders.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            export_encoder(adapted, folder)
    np.testing.assert_allclose(embed(load_encoder(folder, device="cpu")), embed(adapted), atol=ATOL)


def test_missing_weights_are_refused(own_backbone):
    file = own_backbone / "model.safetensors"
    state = load_file(file)
    del state[next(name for name in state if "layers.1.mlp.up_proj" in name)]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(language_model.layers.1.mlp.up_proj.weight\)"):
        build_encoder(own_backbone, device="cpu")


def test_weights_left_over_are_refused(own_backbone):
    file = own_backbone / "model.safetensors"
    state = load_file(file)
    save_file({**state, "model.language_model.layers.7.extra": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 left over \(.*layers.7.extra\)"):
        build_encoder(own_backbone, device="cpu")


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
    folder = export_encoder(adapted, tmp_path / "adapters", merge_adapters=False)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name.replace("q_proj", "z_proj"): value for name, value in state.items()}, file)
    with pytest.raises(ValueError, match=r"does not fit FastVlmModel: 6 tensors have no place.*z_proj"):
        load_encoder(folder, device="cpu")
    save_file({name: value for name, value in state.items() if "layers.1.self_attn.q_proj" not in name}, file)
    with pytest.raises(ValueError, match=r"does not fit FastVlmModel: 1 tensors.*layers.1.self_attn.q_proj"):
        load_encoder(folder, device="cpu")


def test_a_folder_that_is_no_encoder(own_backbone):
    with pytest.raises(FileNotFoundError, match=r"no modules.json.*build_encoder"):
        load_encoder(own_backbone)


def test_classes_from_elsewhere_are_refused(adapted, tmp_path):
    folder = export_encoder(adapted, tmp_path / "encoder")
    listing = json.loads((folder / "modules.json").read_text())
    listing[1]["type"] = "somewhere.Else"
    (folder / "modules.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"somewhere.Else, which is not part of sentence-transformers"):
        load_encoder(folder)


def test_a_peft_config_that_adapts_the_wrong_thing(backbone):
    with pytest.raises(ValueError, match="target"):
        build_encoder(backbone("fast_vlm"), device="cpu", peft_config=default_lora_config(layers=[9]))


def test_the_trainer_loads_a_checkpoint_as_load_encoder_does(adapted, tmp_path):
    adapted.save_pretrained(str(tmp_path / "saved"))
    ours = load_encoder(tmp_path / "saved", device="cpu")
    found = type(adapted)._load_with_module_classes(str(tmp_path / "saved"), {}, trust_remote_code=False)
    assert [type(module) for module in found] == [type(module) for module in ours] == [type(m) for m in adapted]
    assert found.device.type == "cpu"
    np.testing.assert_array_equal(embed(found), embed(ours))
    for load in (load_encoder, type(adapted)._load_with_module_classes):
        with pytest.raises(FileNotFoundError, match=r"has no modules\.json, so it is no saved encoder.*`published`"):
            load(str(tmp_path))


def test_settings_travel(backbone, tmp_path):
    model = build_encoder(
        backbone("fast_vlm"),
        device="cpu",
        prompt_template="chatml_open",
        max_seq_length=200,
        prompts={"caption": "Find its caption: "},
        vision_cache_bytes=1000,
    )
    model.encode(["a text", picture()])
    model.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / SETTINGS_FILE).read_text())["vision_cache_bytes"] == 1000
    again = load_encoder(tmp_path / "saved", device="cpu")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again[0].vision_cache.max_bytes == 1000
    assert again.prompts["caption"] == "Find its caption: "
    for other in (again, stock):
        assert other.max_seq_length == 200
        for options in ({}, {"prompt_name": "caption"}):
            expected = model.encode(["a text"], **options)
            np.testing.assert_allclose(other.encode(["a text"], **options), expected, atol=ATOL)
    tokenizer = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert tokenizer["truncation"] is None
    assert tokenizer["padding"] is None


def test_a_template_of_ones_own(backbone):
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}"
    )
    model = build_encoder(backbone("fast_vlm"), device="cpu", prompt_template=template + "{% endfor %}!")
    assert model[0].tokenizer.decode(model.preprocess(["a cat"])["input_ids"][0]) == "a cat!"


@pytest.mark.parametrize("family", FAMILIES)
def test_max_pixels(family, backbone):
    image = picture(size=(200, 200))
    if "qwen" not in family:
        with pytest.raises(ValueError, match=r"takes no `max_pixels`.*processor_kwargs"):
            build_encoder(backbone(family), device="cpu", max_pixels=28 * 28)
        return
    wide = build_encoder(backbone(family), device="cpu")
    narrow = build_encoder(backbone(family), device="cpu", max_pixels=28 * 28)
    assert narrow.preprocess([image])["input_ids"].shape[1] == wide.preprocess([image])["input_ids"].shape[1] - 3


def test_max_pixels_travels(backbone, tmp_path):
    image = picture(size=(200, 200))
    narrow = build_encoder(backbone("qwen2_vl"), device="cpu", max_pixels=28 * 28)
    narrow.save_pretrained(str(tmp_path / "saved"))
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(stock.encode([image]), narrow.encode([image]), atol=ATOL)


@pytest.mark.parametrize("option", ["max_pixels", "max_seq_length", "truncate_dim"])
@pytest.mark.parametrize("size", [0, -1, True, 2.5])
def test_sizes_that_are_none_are_refused_by_name(option, size, backbone):
    with pytest.raises(ValueError, match=rf"`{option}={size!r}`.*at least 1"):
        build_encoder(backbone("qwen2_vl"), device="cpu", **{option: size})


def test_embeddings_are_truncated_when_asked_for(backbone, tmp_path):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    whole = model.encode(["a", "b"])
    export_encoder(model, tmp_path / "e")
    short = load_encoder(tmp_path / "e", device="cpu", truncate_dim=8)
    np.testing.assert_allclose(short.encode(["a", "b"]), whole[:, :8], atol=1e-6)
    assert build_encoder(backbone("qwen2_vl"), device="cpu", truncate_dim=4).encode(["a"]).shape == (1, 4)


def damaged(folder, name, content):
    path = folder / name
    if content is None:
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size // 2)
    else:
        path.write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("modules.json", '[{"path": ""}]', "modules.json is damaged"),
        ("modules.json", "{}", "modules.json is damaged: it holds a dict"),
        ("modules.json", '[{"idx"', "modules.json is damaged"),
        ("config_sentence_transformers.json", "[]", "config_sentence_transformers.json is damaged"),
        ("model.safetensors", None, "encoder.*damaged or cut short"),
        ("modules.json", '[{"type": "sentence_transformers.base.modules.Transformer", "path": "../x"}]', "outside"),
    ],
)
def test_damaged_files_are_named(name, content, words, backbone, tmp_path):
    folder = export_encoder(build_encoder(backbone("llava_next"), device="cpu"), tmp_path / "encoder")
    damaged(folder, name, content)
    with pytest.raises(ValueError, match=words):
        load_encoder(folder, device="cpu")


def test_a_folder_that_is_not_there_is_said_to_be_so(backbone, tmp_path):
    export_encoder(build_encoder(backbone("llava_next"), device="cpu"), tmp_path / "encoder")
    for path in (str(tmp_path / "encodr"), tmp_path / "encodr"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*encodr'. Beside it there is encoder"):
            load_encoder(path)
    with pytest.raises(FileNotFoundError, match=r"no folder '\./nope/x'"):
        load_encoder("./nope/x")


@pytest.mark.parametrize("what", ["config.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("saved", [False, True])
def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(what, saved, backbone, tmp_path):
    """Also after "y" on the terminal: transformers asks there unless it is told not to."""
    folder = tmp_path / "model"
    if saved:
        export_encoder(build_encoder(backbone("qwen2_vl"), device="cpu"), folder)
    else:
        shutil.copytree(backbone("qwen2_vl"), folder)
    mark = tmp_path / "RAN"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nclass C: pass\n")
    settings = json.loads((folder / what).read_text())
    kinds = {"config.json": "AutoConfig", "processor_config.json": "AutoProcessor"}
    name = kinds.get(what, "AutoTokenizer")
    settings["auto_map"] = {name: ["evil.C", "evil.C"] if name == "AutoTokenizer" else "evil.C"}
    if name == "AutoConfig":
        settings["model_type"] = "evil"
    elif name == "AutoProcessor":
        settings["processor_class"] = "Evil"
    else:
        settings["tokenizer_class"] = "Evil"
    (folder / what).write_text(json.dumps(settings))
    load = "load_encoder" if saved else "build_encoder"
    code = f"import unime_st; unime_st.{load}({str(folder)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], input="y\n" * 9, text=True, capture_output=True)
    assert not mark.exists()
    assert "[y/N]" not in done.stdout + done.stderr


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "smolvlm"])
def test_a_model_compiled_as_a_whole_encodes_as_before(family, backbone):
    model = build_encoder(backbone(family), device="cpu")
    inputs = ["a cat", "a dog that is longer", picture("green")]
    want = model.encode(inputs)
    torch.compiler.reset()  # what was compiled of another family would be looked at first
    model[0].model = torch.compile(model[0].model, backend="eager")
    np.testing.assert_allclose(model.encode(inputs), want, atol=1e-5)


OWN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("load", ["built", "ours", "stock"])
def test_a_template_of_ones_own_opens_the_models_turn_when_asked_to(load, backbone, tmp_path, caplog):
    model = build_encoder(
        backbone("llava_onevision"), device="cpu", prompt_template=OWN, add_generation_prompt=True, max_seq_length=64
    )
    assert "add_generation_prompt" not in caplog.text
    if load != "built":
        folder = export_encoder(model, tmp_path / "encoder")
        model = load_encoder(folder, device="cpu") if load == "ours" else SentenceTransformer(str(folder), device="cpu")
    talk = [[{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]]
    for inputs in (["a cat"], talk):
        read = model.tokenizer.decode(model.preprocess(inputs)["input_ids"][0])
        assert read.endswith("a cat<|im_end|><|im_start|>assistant\n")
    if load != "stock":  # which cuts the end off
        long = model.tokenizer.decode(model.preprocess(["words " * 99])["input_ids"][0])
        assert long.endswith("<|im_end|><|im_start|>assistant\n")


@pytest.mark.parametrize(("asked", "told"), [(None, True), (False, False)])
def test_a_turn_that_is_not_opened_is_told(asked, told, backbone, caplog):
    model = build_encoder(backbone("llava_onevision"), device="cpu", prompt_template=OWN, add_generation_prompt=asked)
    assert ("`add_generation_prompt=True` to `build_encoder`" in caplog.text) is told
    assert model.tokenizer.decode(model.preprocess(["a cat"])["input_ids"][0]).endswith("a cat<|im_end|>")
