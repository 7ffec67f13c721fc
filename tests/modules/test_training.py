"""Training: GradCache on images in every family, the frozen tower, checkpoints that stock code loads, resuming."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from tiny import FAMILIES, picture
from unime_st import build_encoder, load_encoder
from unime_st.modules import MultimodalEncoder, default_lora_config
from unime_st.modules.speed.vision_cache import vision_tower

COLORS = ("red", "green", "white", "yellow", "purple", "black")
TEXTS = [f"a {color} picture" for color in COLORS]
IMAGES = [picture(color) for color in COLORS]
COLUMNS = {
    "image_text": (TEXTS, IMAGES),
    "rows_without_image": (TEXTS, [IMAGES[0], "words", "more words", IMAGES[1], "still words", "other words"]),
    "one_two_none": (
        [*TEXTS[:3], IMAGES[3], {"image": IMAGES[4:6], "text": "two"}, "five"],
        [{"image": image, "text": "what?"} for image in IMAGES[:4]] + TEXTS[4:],
    ),
}


def one_step(model, loss, columns):
    model.zero_grad(set_to_none=True)
    value = loss([model.preprocess(list(column)) for column in columns], None)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_plain(family, kind, backbone):
    model = build_encoder(backbone(family), device="cpu").double()
    plain, expected = one_step(model, MultipleNegativesRankingLoss(model, scale=5.0), COLUMNS[kind])
    loss = CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=1)
    cached, found = one_step(model, loss, COLUMNS[kind])
    assert plain == pytest.approx(cached, abs=1e-6)
    alive = [name for name in expected if expected[name].abs().max() > 1e-4]
    assert len(alive) > 10
    tower = next(name for name, module in model.named_modules() if module is vision_tower(model[0].model))
    assert any(name.startswith(tower) for name in expected)
    for name in alive:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_frozen_tower_stays_in_evaluation_mode(backbone):
    model = build_encoder(backbone("fast_vlm"), device="cpu", peft_config=True)
    tower = vision_tower(model[0].model)
    norms = [module for module in tower.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    before = copy.deepcopy(tower.state_dict())
    model.train()
    assert norms
    assert not any(module.training for module in tower.modules())
    assert model[0].model.language_model.training
    model(model.preprocess(IMAGES))
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter in tower.parameters():
        parameter.requires_grad = True
    model.train()
    assert all(module.training for module in tower.modules())


@pytest.mark.parametrize("family", [family for family in FAMILIES if "qwen" not in family])
def test_features_of_a_frozen_tower_are_computed_once(family, backbone):
    model = build_encoder(backbone(family), device="cpu", peft_config=default_lora_config(rank=4)).double()
    without = build_encoder(backbone(family), device="cpu", peft_config=default_lora_config(rank=4)).double()
    without.load_state_dict(model.state_dict())
    without[0].vision_cache.max_bytes = 0
    columns = (TEXTS[:4], [IMAGES[0], IMAGES[1], IMAGES[0], IMAGES[1]])
    options = {"scale": 5.0, "mini_batch_size": 2}
    value, found = one_step(model, CachedMultipleNegativesRankingLoss(model, **options), columns)
    plain, expected = one_step(without, CachedMultipleNegativesRankingLoss(without, **options), columns)
    cache = model[0].vision_cache
    assert cache.misses > 0
    assert cache.hits == 3 * cache.misses  # two mini-batches show the same two images, and each runs twice
    assert without[0].vision_cache.misses == 0
    assert value == pytest.approx(plain, abs=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-7, msg=name)


def test_kept_features_are_dropped_when_the_weights_change(backbone):
    model = build_encoder(backbone("fast_vlm"), device="cpu", peft_config=True)
    before = model.encode(IMAGES[:1])
    assert np.array_equal(model.encode(IMAGES[:1]), before)
    with torch.no_grad():
        for parameter in vision_tower(model[0].model).parameters():
            parameter.add_(0.1)
    assert np.abs(model.encode(IMAGES[:1]) - before).max() > 1e-4


def test_the_cache_stays_within_its_bytes(backbone):
    model = build_encoder(backbone("fast_vlm"), device="cpu", peft_config=True)
    cache = model[0].vision_cache
    cache.max_bytes = 4 * 4 * 256 * 4  # four images of 4 positions, 256 wide, float32
    expected = model.encode(IMAGES, batch_size=1)
    assert cache._bytes <= cache.max_bytes
    assert 0 < len(cache._rows) < len(IMAGES)
    np.testing.assert_allclose(model.encode(IMAGES), expected, atol=1e-5)


def trainer(model, folder, steps, **arguments):
    data = Dataset.from_dict({"anchor": TEXTS * 2, "positive": [f"drawing of {text}" for text in TEXTS * 2]})
    data = data.with_transform(
        lambda rows: {"anchor": rows["anchor"], "positive": [IMAGES[TEXTS.index(text)] for text in rows["anchor"]]}
    )
    options = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **arguments,
    )
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    return SentenceTransformerTrainer(model=model, args=options, train_dataset=data, loss=loss)


@pytest.mark.parametrize("adapters", [True, None], ids=["lora", "all weights"])
def test_checkpoints_are_stock_and_training_resumes_from_them(adapters, backbone, tmp_path):
    rows = TEXTS[:2], IMAGES[:2]

    def fresh():
        torch.manual_seed(3)  # an adapter starts at random
        return build_encoder(backbone("fast_vlm"), device="cpu", peft_config=adapters)

    through = fresh()
    start = np.concatenate([through.encode(row) for row in rows])
    trainer(through, tmp_path / "through", 4).train()
    expected = np.concatenate([through.encode(row) for row in rows])
    assert np.abs(expected - start).max() > 1e-3

    resumed = fresh()
    again = trainer(resumed, tmp_path / "again", 4)
    again.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    assert again.state.global_step == 4
    np.testing.assert_allclose(np.concatenate([resumed.encode(row) for row in rows]), expected, atol=1e-5)

    checkpoint = tmp_path / "through" / "checkpoint-4"
    types = [entry["type"] for entry in json.loads((checkpoint / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in types)
    assert (checkpoint / "adapter_model.safetensors").exists() == bool(adapters)
    stock = SentenceTransformer(str(checkpoint), device="cpu")
    assert not isinstance(stock[0], MultimodalEncoder)
    ours = load_encoder(checkpoint, device="cpu")
    assert isinstance(ours[0], MultimodalEncoder)
    for model in (stock, ours):
        np.testing.assert_allclose(np.concatenate([model.encode(row) for row in rows]), expected, atol=1e-5)
