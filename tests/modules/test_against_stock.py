"""Why the module exists: for each thing it adds, stock code on the same checkpoint fails or does otherwise."""

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from tiny import picture
from unime_st import build_encoder, load_encoder
from unime_st.modules.speed.vision_cache import vision_tower
from unime_st.prompts import TURN_FORMATS

LONG = "words and more words " * 20
ENDING = "Summary above image and sentence in one word: "


@pytest.fixture(scope="module")
def pair(backbone, tmp_path_factory):
    """Both ways to run one checkpoint: ours, stock."""

    def get(family, **options):
        folder = tmp_path_factory.mktemp(family) / "encoder"
        build_encoder(backbone(family), device="cpu", **options).save_pretrained(str(folder))
        return load_encoder(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")

    return get


def cached_step(model, rows):
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=1)
    value = loss([model.preprocess([f"text {index}" for index in range(len(rows))]), model.preprocess(rows)], None)
    value.backward()
    return value.item()


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3", "smolvlm"])
def test_mini_batches_whose_rows_have_no_image(pair, family):
    ours, stock = pair(family)
    rows = ["no image here", picture()]
    assert np.isfinite(cached_step(ours, rows))
    if family == "smolvlm" and version.parse(transformers.__version__) < version.parse("5.20"):
        return  # there stock's SmolVLM does without an image, too
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
        cached_step(stock, rows)


@pytest.mark.parametrize("family", ["fast_vlm", "qwen2_vl", "smolvlm"])
def test_an_image_with_a_long_text_keeps_its_instruction(pair, family):
    ours, stock = pair(family, max_seq_length=150)
    rows = [{"image": picture(), "text": LONG}]
    read = ours[0].tokenizer.decode(ours.preprocess(rows)["input_ids"][0])
    assert read.endswith(ENDING + TURN_FORMATS[family].end)
    try:
        features = stock.preprocess(rows)
    except ValueError:  # media tokens were cut: also no embedding
        return
    assert ENDING not in stock[0].tokenizer.decode(features["input_ids"][0])


def test_a_weight_that_is_missing(backbone, tmp_path):
    folder = tmp_path / "encoder"
    build_encoder(backbone("fast_vlm"), device="cpu").save_pretrained(str(folder))
    file = next(folder.rglob("model.safetensors"))
    state = load_file(file)
    state.pop(next(name for name in state if "up_proj" in name))
    save_file(state, file, metadata={"format": "pt"})
    SentenceTransformer(str(folder), device="cpu")  # random weights, and no word of it
    with pytest.raises(ValueError, match=r"1 missing \(.*up_proj"):
        load_encoder(folder, device="cpu")


def test_each_distinct_image_passes_the_tower_once(pair):
    counts = []
    for model in pair("llava_next"):
        tower = vision_tower(model[0].model)
        seen = []
        first = next(module for module in tower.modules() if isinstance(module, torch.nn.Conv2d))
        handle = first.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        model.encode([picture("green")] * 4, batch_size=4)
        handle.remove()
        counts.append(sum(seen))
    assert counts[1] > 0
    assert counts[0] * 4 <= counts[1]


def test_a_frozen_tower_keeps_its_statistics(pair):
    changed = []
    for model in pair("fast_vlm"):
        tower = vision_tower(model[0].model)
        tower.requires_grad_(False)
        before = {name: value.clone() for name, value in tower.state_dict().items()}
        model.train()
        model(model.preprocess([picture("green"), picture("white")]))
        changed.append(any(not torch.equal(value, before[name]) for name, value in tower.state_dict().items()))
    assert changed == [False, True]


def test_images_as_bytes(pair, tmp_path):
    ours, stock = pair("fast_vlm")
    picture("green").save(tmp_path / "green.png")
    content = (tmp_path / "green.png").read_bytes()
    np.testing.assert_allclose(ours.encode([content]), ours.encode([picture("green")]), atol=1e-5)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        stock.encode([content])


def test_an_unreadable_image_is_named(pair, tmp_path):
    ours, stock = pair("fast_vlm")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Cannot read an image from .*broken\.png.*Replace"):
        ours.encode([{"image": str(tmp_path / "broken.png")}])
    with pytest.raises((OSError, RuntimeError, ValueError)) as told:  # of torchvision or of PIL
        stock.encode([{"image": str(tmp_path / "broken.png")}])
    assert "broken.png" not in str(told.value)


def test_content_ids_are_ours(pair):
    ours, stock = pair("fast_vlm")
    assert "content_id" in ours.preprocess(["a cat"])
    assert "content_id" not in stock.preprocess(["a cat"])
