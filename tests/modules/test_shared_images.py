"""An image that several rows show is opened and processed once, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder
from unime_st.modules import inputs, multimodal_encoder

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
    monkeypatch.setattr(multimodal_encoder, "each_image_once", lambda _: nullcontext())
    as_messages = multimodal_encoder.as_messages
    monkeypatch.setattr(multimodal_encoder, "as_messages", lambda *args, opened, **kw: as_messages(*args, **kw))
    expected = model.preprocess(items)
    assert seen[-1] == total
    assert len(opened) == 3 + total
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
    grids = features["image_grid_thw"]
    assert torch.equal(grids[0], grids[2])
    first = int(grids[0].prod())
    assert torch.equal(features["pixel_values"][:first], features["pixel_values"][-first:])
    assert not torch.equal(features["pixel_values"][:4], features["pixel_values"][first : first + 4])
