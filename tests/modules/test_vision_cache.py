"""What the cache of a vision tower serves, and when it must not."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.modules.speed.vision_cache import vision_tower

IMAGES = [picture("red"), picture("green"), picture("red"), picture("red")]
TEXTS = ["red", "green", "crimson", "scarlet"]
SERVED = ["fast_vlm", "llava_next", "smolvlm", "gemma3"]


def loss_and_gradients(model):
    model.train()
    model.zero_grad(set_to_none=True)
    value = CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=2)(
        [model.preprocess(TEXTS), model.preprocess(IMAGES)], None
    )
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", SERVED)
def test_encoding_with_a_trainable_tower_computes_each_image_once(family, backbone, tmp_path):
    model = load_encoder(export_encoder(build_encoder(backbone(family), device="cpu"), tmp_path / "e"), device="cpu")
    assert any(parameter.requires_grad for parameter in vision_tower(model[0].model).parameters())
    cache = model[0].vision_cache
    questions = [{"image": image, "text": text} for text in ("what", "who") for image in IMAGES]
    found = model.encode(questions)
    assert cache.misses > 0
    assert cache.hits == cache.misses
    cache.max_bytes = 0
    np.testing.assert_allclose(found, model.encode(questions), atol=1e-5)


def test_training_a_tower_never_reads_what_encoding_kept(backbone):
    model = build_encoder(backbone("fast_vlm"), device="cpu")
    expected = loss_and_gradients(build_encoder(backbone("fast_vlm"), device="cpu"))
    model.encode(IMAGES)
    hits = model[0].vision_cache.hits
    value, gradients = loss_and_gradients(model)
    assert model[0].vision_cache.hits == hits
    assert value == pytest.approx(expected[0], abs=1e-6)
    tower = [name for name in gradients if "vision_tower" in name and gradients[name].abs().max() > 0]
    assert tower
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_between_two_encodings_is_seen(backbone):
    model = build_encoder(backbone("llava_next"), device="cpu")
    before = model.encode(IMAGES)
    optimizer = torch.optim.SGD(vision_tower(model[0].model).parameters(), lr=1.0)
    loss_and_gradients(model)
    optimizer.step()
    after = model.encode(IMAGES)
    assert np.abs(after - before).max() > 1e-4
    model[0].vision_cache.max_bytes = 0
    np.testing.assert_allclose(after, model.encode(IMAGES), atol=1e-5)


def test_a_step_behind_autograds_back_is_seen(backbone):
    """Some optimizers write through `.data`, which leaves every version counter as it was."""
    model = build_encoder(backbone("llava_next"), device="cpu")
    before = model.encode(IMAGES)
    loss_and_gradients(model)
    for parameter in vision_tower(model[0].model).parameters():
        parameter.data.add_(0.1)
    after = model.encode(IMAGES)
    assert np.abs(after - before).max() > 1e-4
    model[0].vision_cache.max_bytes = 0
    np.testing.assert_allclose(after, model.encode(IMAGES), atol=1e-5)


def test_features_of_lower_precision_are_not_served_in_higher(backbone):
    model = build_encoder(backbone("llava_next"), device="cpu")
    model[0].vision_cache.max_bytes = 0
    expected = model.encode(IMAGES)
    model[0].vision_cache.max_bytes = 2**28
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model.encode(IMAGES)
    assert np.abs(lower - expected).max() > 1e-4
    np.testing.assert_allclose(model.encode(IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize("family", SERVED)
def test_adapters_train_on_features_kept_while_encoding(family, backbone):
    """An evaluator in the middle of training runs in inference mode; its features must do for a gradient."""
    torch.manual_seed(0)
    model = build_encoder(backbone(family), device="cpu", peft_config=True)
    model[0].vision_cache.max_bytes = 0
    expected = loss_and_gradients(model)
    model[0].vision_cache.max_bytes = 2**28
    with torch.inference_mode():
        model.encode(IMAGES)
    misses = model[0].vision_cache.misses
    value, gradients = loss_and_gradients(model)
    assert model[0].vision_cache.misses == misses > 0
    assert value == pytest.approx(expected[0], abs=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
