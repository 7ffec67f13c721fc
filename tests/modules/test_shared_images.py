"""An image that several rows show is opened and processed once, and nothing else changes."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder
from unime_st.features import select_rows
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import inputs, multimodal_encoder, processing
from unime_st.modules.speed.shared_images import Shown
from unime_st.modules.speed.vision_cache import vision_tower
from unime_st.placement import IMAGES, NUMBERS, with_every_image

BY_ROW = ("idefics3", "smolvlm")  # they pad the images of each row: all are processed


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{color}.png" for color in ("red", "green", "yellow")]
    for path, size in zip(paths, ((60, 60), (30, 60), (80, 30)), strict=True):
        picture(path.stem, size).save(path)
    return paths


def rows(files):
    red, green, yellow = (str(path) for path in files)
    return [
        {"image": red, "text": "a"},
        {"image": green, "text": "b"},
        "no image",
        {"image": red, "text": "another question"},
        {"image": files[0]},
        [{"role": "user", "content": [{"type": "image", "path": green}, {"type": "text", "text": "chat"}]}],
        {"image": {"bytes": None, "path": yellow}, "text": "a cell"},
    ]


def without_sharing(monkeypatch):
    """Images are opened and processed for each row, and stand in the features for each."""
    as_messages = multimodal_encoder.as_messages
    monkeypatch.setattr(processing, "each_image_once", lambda _: nullcontext(Shown()))
    monkeypatch.setattr(multimodal_encoder, "as_messages", lambda *args, opened, **kw: as_messages(*args, **kw))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_features_are_those_of_processing_every_row(family, several, backbone, files, monkeypatch):
    model = build_encoder(backbone(family), device="cpu")
    items = [*rows(files), {"image": [str(files[1]), files[0]], "text": "two"}] if several else rows(files)
    processor = model[0].processor.image_processor
    seen, opened = [], []
    plain, decoded = type(processor).preprocess, inputs.images.open_image

    def counted(self, images, *args, **kwargs):
        seen.append(sum(len(row) if isinstance(row, list) else 1 for row in images))
        return plain(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor), "preprocess", counted)
    monkeypatch.setattr(inputs.images, "open_image", lambda *args: opened.append(args) or decoded(*args))
    features = model.preprocess(items)
    total = 8 if several else 6
    each_by_itself = family in BY_ROW or (several and family == "llava_onevision")  # in a row of several: no tiles
    assert len(opened) == 3
    assert seen[-1] == (total if each_by_itself else 3)
    assert "preprocess" not in vars(processor)
    assert (IMAGES in features) is not each_by_itself
    assert (NUMBERS in features) is not each_by_itself
    without_sharing(monkeypatch)
    expected = model.preprocess(items)
    assert seen[-1] == total
    assert len(opened) == 3 + total
    features = with_every_image(features)
    assert features.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == features[key].dtype, key
            torch.testing.assert_close(features[key], value, atol=0, rtol=0, msg=key)
        else:
            assert features[key] == value, key


def test_images_that_differ_stay_apart(backbone, files):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    red, green, _ = (str(path) for path in files)
    features = model.preprocess([{"image": red, "text": "a"}, {"image": green, "text": "a"}, {"image": red}])
    pixels, grids = (features[IMAGES][name] for name in ("pixel_values", "image_grid_thw"))
    assert len(grids) == 2
    assert len(pixels) == int(grids.prod(dim=1).sum())
    features = with_every_image(features)
    grids = features["image_grid_thw"]
    assert torch.equal(grids[0], grids[2])
    first = int(grids[0].prod())
    assert torch.equal(features["pixel_values"][:first], features["pixel_values"][-first:])
    assert not torch.equal(features["pixel_values"][:4], features["pixel_values"][first : first + 4])


def nbytes(features):
    """Of all tensors, those in mappings too."""
    return sum(
        value.nbytes if isinstance(value, Tensor) else nbytes(value) if isinstance(value, dict) else 0
        for value in features.values()
    )


def questions(count=6):
    """Rows that show one image, two that show another, one that shows both, one without."""
    red, green = picture("red"), picture("green", (30, 60))
    items = [{"image": red, "text": f"question {number}"} for number in range(count)]
    return [*items, {"image": green, "text": "x"}, "a text", {"image": green, "text": "y"}]


@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_pixels_are_there_once_and_embeddings_are_the_same(family, backbone, monkeypatch):
    model = build_encoder(backbone(family), device="cpu")
    items = [*questions(), *([] if family == "llava_onevision" else [{"image": [picture("red"), picture("teal")]}])]
    once = nbytes(model.preprocess(items))
    moved = []
    hook = model[0].register_forward_pre_hook(lambda _, args: moved.append(nbytes(args[0])))
    given = pixels_of_tower(model, monkeypatch)
    found = model.encode(items)
    travelled, seen = sum(moved), sum(given)
    hook.remove()
    model[0].vision_cache.clear()
    without_sharing(monkeypatch)
    everything = nbytes(model.preprocess(items))
    np.testing.assert_allclose(model.encode(items), found, atol=2e-6)
    assert seen == sum(given) - seen  # the tower has each image once, whatever the features hold
    if family in BY_ROW:  # the images of a row are padded together there
        assert once == everything
    else:
        pixels = nbytes({"all": model.preprocess(items)["pixel_values"]})
        assert everything - once > pixels / 3
        assert travelled < everything
    distances = np.abs(found[:, None] - found[None]).max(axis=-1) + np.eye(len(items))
    assert distances.min() > 1e-5


@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_the_backbone_alone_sees_them_all(family, backbone):
    """Whoever calls it with our features, as users do who take the states of all tokens."""
    model = build_encoder(backbone(family), device="cpu")
    red = picture("red")
    items = [{"image": red, "text": "a"}, {"image": red, "text": "what is it?"}, picture("green")]
    expected = model.encode(items)
    features = model.preprocess(items)
    assert (IMAGES in features) is (family not in BY_ROW)
    for bare in (model[0].model, copy.deepcopy(model[0]).model):
        with torch.no_grad():
            states = bare(**features).last_hidden_state[:, -1]
        np.testing.assert_allclose(torch.nn.functional.normalize(states, dim=1), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_a_compiled_backbone_sees_them_all(family, backbone):
    model = build_encoder(backbone(family), device="cpu")
    items = questions(2)
    expected = model.encode(items)
    model[0].vision_cache.clear()
    model[0].model = torch.compile(model[0].model, backend="eager")
    torch.compiler.reset()
    np.testing.assert_allclose(model.encode(items), expected, atol=1e-5)


def test_a_batch_that_is_cut_by_device_is_refused(backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel cuts.*accelerate launch"):
        replica(model.preprocess(questions(2)))


def pixels_of_tower(model, monkeypatch):
    """Numbers that the vision tower is given, call by call."""
    tower, given = vision_tower(model[0].model), []
    tower.register_forward_pre_hook(
        lambda _module, args, kwargs: given.append((args[0] if args else kwargs["pixel_values"]).numel()),
        with_kwargs=True,
    )
    return given


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_steps_are_the_same(family, frozen, options, backbone, monkeypatch):
    model = build_encoder(backbone(family), device="cpu").double().train()
    tower = set(map(id, vision_tower(model[0].model).parameters()))
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or id(parameter) not in tower)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # else its statistics differ with what is beside
    columns = [questions(4), [f"answer {number}" for number in range(7)]]
    loss = HardNegativeInfoNCELoss(model, temperature=1.0, **options).train()

    def step():
        model.zero_grad(set_to_none=True)
        model[0].vision_cache.clear()
        value = loss([model.preprocess(column) for column in columns])
        value.backward()
        return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    shared = step()
    without_sharing(monkeypatch)
    plain = step()
    torch.testing.assert_close(shared[0], plain[0], atol=1e-6, rtol=0)
    assert shared[1].keys() == plain[1].keys()
    assert sum(gradient.abs().max() > 1e-5 for gradient in plain[1].values()) >= 10
    for name, gradient in plain[1].items():
        torch.testing.assert_close(shared[1][name], gradient, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_rows_that_are_taken_have_their_images_alone(family, backbone, monkeypatch):
    model = build_encoder(backbone(family), device="cpu")
    items = [*questions(), {"image": [picture("green", (30, 60)), picture("blue")], "text": "both"}]
    features = model.preprocess(items)
    without_sharing(monkeypatch)
    expected = model.preprocess(items)
    for rows in ([0, 1], [7], [8, 6, 0], [9, 7], list(range(10))):
        some = select_rows(features, rows)
        assert (IMAGES in some) is (rows != [7])
        wanted = select_rows(expected, rows)
        found = with_every_image(some)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(found[key], value, atol=0, rtol=0, msg=f"{rows} {key}")
    two = select_rows(features, [0, 1])
    assert two[NUMBERS].tolist() == [[0], [0]] if features[NUMBERS].shape[1] == 1 else [[0, -1], [0, -1]]
    assert nbytes(two[IMAGES]) < 0.6 * nbytes(features[IMAGES])


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "gemma3"])
def test_stock_losses_take_rows_of_them(family, backbone, monkeypatch):
    """Their mini-batches are cut by stock code, which knows nothing of images that are there once."""
    model = build_encoder(backbone(family), device="cpu").double().train()
    columns = [questions(5), [f"answer {number}" for number in range(8)]]
    loss = CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=3)
    values = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        features = [model.preprocess(column) for column in columns]
        value = loss(features, None)
        value.backward()
        values.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        values.append(value.detach())
        if len(values) == 2:
            assert IMAGES in features[0]
            without_sharing(monkeypatch)
    torch.testing.assert_close(values[1], values[3], atol=1e-9, rtol=0)
    torch.testing.assert_close(values[0], values[2], atol=1e-9, rtol=0)


def test_equal_rows_are_told_with_images_once(backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu", peft_config=True)
    items = [*questions(3), questions(3)[0]]
    loss = DistillKLLoss(model, temperature=0.5, mini_batch_size=2)
    loss([model.preprocess(items)], torch.randn(len(items), 4))
    assert loss.last_plan.distinct == len(items) - 1
