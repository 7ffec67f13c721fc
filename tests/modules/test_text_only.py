"""Without the vision tower in memory, texts encode and train as with it, and what is exported is complete."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.modules import default_lora_config
from unime_st.modules.text_only import VISION_PARTS, absent_parts

FAMILIES = ("llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "smolvlm", "idefics3", "gemma3", "phi3_v")
TEXTS = ["a red bus", "the small bird", "a green train near the tree", "one dog"]


def pair(folder):
    """The same encoder with fresh adapters, whole and without its vision parts."""
    made = []
    for text_only in (False, True):
        torch.manual_seed(3)
        made.append(build_encoder(folder, device="cpu", text_only=text_only, peft_config=default_lora_config(rank=2)))
    with torch.no_grad():  # fresh LoRA adds nothing
        for name, weight in made[0].named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
                dict(made[1].named_parameters())[name].copy_(weight)
    return made


def step(model):
    loss = MultipleNegativesRankingLoss(model)
    value = loss([model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])], None)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def move(model):
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.mark.parametrize(
    "family", [family if family == "qwen2_vl" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_texts_train_as_with_the_whole_model_and_the_export_is_complete(backbone, family, tmp_path):
    whole, lean = pair(backbone(family))
    torch.testing.assert_close(lean.encode(TEXTS), whole.encode(TEXTS), rtol=0, atol=0)
    expected, found = step(whole), step(lean)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1].keys() == expected[1].keys()
    assert sum(gradient.abs().max() > 1e-6 for gradient in expected[1].values()) >= 8
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0)

    held = {name for name, _ in lean.named_parameters()}
    missing = {name: p for name, p in whole.named_parameters() if name not in held}
    parts = [whole[0].model.get_submodule(name) for name in absent_parts(lean[0].model)]
    vision = sum(p.numel() for part in parts for p in part.parameters())
    assert sum(p.numel() for p in missing.values()) == vision > 1000
    assert sum(p.numel() for p in lean.parameters()) == sum(p.numel() for p in whole.parameters()) - vision
    assert not [name for name in held if set(name.split(".")) & set(VISION_PARTS)]
    assert all(p.device.type == "cpu" for p in lean.parameters())  # nothing is left on the meta device

    with pytest.raises(ValueError, match=r"Row 1 has an image.*`text_only=False`"):
        lean.encode(["a text", {"image": picture(), "text": "what?"}], batch_size=2)

    for model, name in ((whole, "whole"), (lean, "lean")):
        move(model)
        export_encoder(model, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "lean"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert absent_parts(lean[0].model)  # the vision parts are gone again
    items = ["a red bus", picture("green")]
    torch.testing.assert_close(
        load_encoder(tmp_path / "lean", device="cpu").encode(items),
        load_encoder(tmp_path / "whole", device="cpu").encode(items),
        rtol=0,
        atol=0,
    )


def trained(start, folder, steps, resume=None):
    torch.manual_seed(0)
    model = load_encoder(start, device="cpu", text_only=True)
    model.add_adapter(default_lora_config(rank=2))
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss).train(resume_from_checkpoint=resume)
    return model


def test_the_trainer_saves_adapters_alone_and_resumes(backbone, tmp_path):
    start = export_encoder(build_encoder(backbone("qwen2_vl"), device="cpu"), tmp_path / "start")
    through = trained(start, tmp_path / "through", 3)
    checkpoint = tmp_path / "through" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = trained(start, tmp_path / "resumed", 3, resume=str(checkpoint))
    assert not (tmp_path / "resumed" / "checkpoint-2").exists()  # it went on
    assert absent_parts(resumed[0].model)
    fresh = trained(start, tmp_path / "short", 1).state_dict()
    for name, value in through.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert any(not torch.equal(fresh[name], value) for name, value in through.state_dict().items())
    stock = SentenceTransformer(str(checkpoint.with_name("checkpoint-3")), device="cpu")  # whole, with its tower
    torch.testing.assert_close(stock.encode(TEXTS), through.encode(TEXTS), rtol=0, atol=1e-5)
    stock.encode([picture()])


def test_an_export_without_the_backbone_s_files_says_so(backbone, tmp_path):
    folder = shutil.copytree(backbone("qwen2_vl"), tmp_path / "backbone")
    model = build_encoder(folder, device="cpu", text_only=True)
    again = copy.deepcopy(model)  # as a spawned process gets it
    assert absent_parts(again[0].model)
    shutil.rmtree(folder)
    with pytest.raises(OSError, match=r"whose files are needed again.*merge_adapters=False"):
        export_encoder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
