import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from emoji.miniature import (
    build_miniature,
    init_projector,
    load_vision_state,
    text_teacher,
)
from emoji.packages import Fetched
from emoji.ridge import _pixels

STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]  # of the 16 blocks


@pytest.fixture(scope="session")
def miniature(fetched, tmp_path_factory):
    return build_miniature(fetched, tmp_path_factory.mktemp("mini") / "two", layers=[0, 1])


@pytest.fixture(scope="session")
def loaded(miniature):
    return AutoModelForImageTextToText.from_pretrained(miniature).eval(), AutoProcessor.from_pretrained(miniature)


def reference_features(state, x):
    """EfficientNet-lite0 written out from the package's own names: convolutions padded as TensorFlow pads them."""

    def conv(x, name, stride=1, depthwise=False):
        weight = state[f"{name}.weight"]
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=x.shape[1] if depthwise else 1)

    def norm(x, name):
        stats = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *stats, eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    for index, stride in enumerate(STRIDES):
        name, before = f"_blocks.{index}", x
        if index:
            x = F.relu6(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = F.relu6(norm(conv(x, f"{name}._depthwise_conv", stride, depthwise=True), f"{name}._bn1"))
        x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
        x = x + before if x.shape == before.shape else x
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1"))


@pytest.mark.slow
def test_vision_tower_equals_an_independent_implementation(fetched, loaded):
    model, _ = loaded
    state = torch.load(fetched.vision_state, weights_only=True)
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        features = model.model.vision_tower(pixels).last_hidden_state
        expected = reference_features(state, pixels)
    assert features.shape == (2, 1280, 5, 5)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_forward_counts_tokens_and_sees_the_image(loaded):
    model, processor = loaded
    logits = []
    for colour in ("red", "blue"):
        content = [
            {"type": "image", "image": Image.new("RGB", (64, 48), colour)},
            {"type": "text", "text": "What is it?"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 25
        assert inputs["pixel_values"].shape == (1, 3, 160, 160)
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(*logits)


@pytest.mark.slow
def test_processor_puts_transparency_on_white_and_agrees_with_the_baseline(loaded, tmp_path):
    _, processor = loaded
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[20:40, 20:40] = (200, 30, 60, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        seen = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert seen[:, 0, 0].tolist() == [1.0, 1.0, 1.0]  # (255 - 127) / 128
    assert (seen - _pixels(tmp_path / "a.png", 160)).abs().max() <= 1.01 / 128  # rounding to 8 bits


@pytest.mark.slow
def test_the_checkpoint_is_stock_and_complete(miniature):
    _, report = AutoModelForImageTextToText.from_pretrained(miniature, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(miniature.rglob("*.py")) == []
    config = (miniature / "config.json").read_text()
    assert "auto_map" not in config
    assert "/" not in config  # no path of the machine that made it
    assert AutoProcessor.from_pretrained(miniature).tokenizer.padding_side == "left"


@pytest.mark.slow
def test_a_second_call_builds_nothing_and_foreign_folders_are_kept(fetched, miniature, tmp_path, monkeypatch):
    before = (miniature / "model.safetensors").stat().st_mtime_ns
    build_miniature(Fetched(tmp_path), miniature, layers=[0, 1])  # needs no package: it is there
    assert (miniature / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="Give another `output_dir`"):
        build_miniature(fetched, tmp_path)


@pytest.mark.slow
def test_the_whole_language_model_still_answers(fetched, tmp_path):
    path = build_miniature(fetched, tmp_path / "whole")
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    content = [{"type": "text", "text": "What is the capital of France?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_projector_starts_as_its_seed_says(miniature):
    model = AutoModelForImageTextToText.from_pretrained(miniature)
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    init_projector(model, seed=1)
    assert not torch.equal(before, model.model.multi_modal_projector.linear_1.weight)
    init_projector(model, seed=0)
    assert torch.equal(before, model.model.multi_modal_projector.linear_1.weight)


@pytest.mark.slow
def test_teacher_knows_meaning(fetched):
    car, automobile, banana = text_teacher(fetched).encode(["a car", "an automobile", "a banana"])
    assert car.shape == (384,)
    assert car @ automobile > car @ banana + 0.3


@pytest.mark.slow
def test_vision_state_has_no_classifier(fetched):
    assert not any("fc" in name or "classifier" in name for name in load_vision_state(fetched.vision_state))


@pytest.mark.parametrize("size", [0, 16, 100])
def test_image_size_must_suit_the_stride(tmp_path, size):
    with pytest.raises(ValueError, match="multiple of 32"):
        build_miniature(Fetched(tmp_path), tmp_path / "out", image_size=size)
