"""Every kind of input, what identifies it, and what is said of a bad one."""

import base64
import io
import re

import numpy as np
import pytest
import torch

from tiny import picture
from unime_st import build_encoder
from unime_st.fingerprint import content_id
from unime_st.modules import inputs
from unime_st.prompts import INSTRUCTIONS

ATOL = 1e-5


@pytest.fixture(scope="module")
def encoder(backbone):
    return build_encoder(backbone("fast_vlm"), device="cpu", prompts={"caption": "Find its caption: "})


@pytest.fixture
def file(tmp_path):
    picture("green").save(tmp_path / "green.png")
    return tmp_path / "green.png"


def prompt_of(encoder, item, **kwargs):
    return encoder[0].tokenizer.decode(encoder.preprocess([item], **kwargs)["input_ids"][0])


def test_all_forms_of_an_image_are_one_image(encoder, file):
    array = np.asarray(picture("green"))
    forms = [
        picture("green"),
        file,
        str(file),
        file.read_bytes(),
        {"bytes": file.read_bytes(), "path": None},
        "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode(),
        array,
        array.transpose(2, 0, 1).astype(np.float32) / 255,
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        {"image": picture("green")},
        {"image": str(file), "text": None},
        {"image": [file]},
        {"role": "user", "content": [{"type": "image", "image": picture("green")}]},
        [{"role": "user", "content": [{"type": "image", "path": str(file)}]}],
    ]
    embeddings = encoder.encode(forms)  # one batch of all of them
    np.testing.assert_allclose(embeddings, np.repeat(embeddings[:1], len(forms), axis=0), atol=ATOL)
    assert np.abs(embeddings[0] - encoder.encode(picture("white"))).max() > 10 * ATOL


def test_all_forms_of_a_text_are_one_text(encoder):
    forms = [
        "a cat",
        {"text": "a cat"},
        {"image": None, "text": "a cat"},
        {"image": [], "text": "a cat"},
        {"role": "user", "content": "a cat"},
        [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}],
        {"role": "user", "content": ["a cat"]},
    ]
    embeddings = encoder.encode(forms)
    np.testing.assert_allclose(embeddings, np.repeat(embeddings[:1], len(forms), axis=0), atol=ATOL)


def test_the_instruction_follows_the_modality_and_gives_way(encoder):
    image = picture()
    both = {"image": image, "text": "what?"}
    assert INSTRUCTIONS["text"] in prompt_of(encoder, "a cat")
    assert INSTRUCTIONS["image"] in prompt_of(encoder, image)
    assert INSTRUCTIONS["image_text"] in prompt_of(encoder, both)
    own = [{"role": "system", "content": "Name it: "}, {"role": "user", "content": [{"type": "image", "image": image}]}]
    for rendered in (prompt_of(encoder, own), prompt_of(encoder, image, prompt="Name it: ")):
        assert "\nName it: <|im_end|>" in rendered
        assert "Summary" not in rendered
    assert "\nName it: <|im_end|>" in prompt_of(encoder, own, prompt="Say it: ")  # the row's own goes before
    named, spelled = (encoder.encode([both], **{k: v}) for k, v in
                      (("prompt_name", "caption"), ("prompt", "Find its caption: ")))  # fmt: skip
    np.testing.assert_allclose(named, spelled, atol=ATOL)
    assert np.abs(named - encoder.encode([both])).max() > 10 * ATOL


def test_content_ids_leave_the_instruction_out(encoder, file):
    rows = ["a cat", {"text": "a cat"}, file, str(file), file.read_bytes(), {"image": file, "text": "a cat"}]
    ids = encoder.preprocess(rows, prompt="Name it: ")["content_id"]
    assert ids.dtype == torch.long
    assert ids.shape == (len(rows),)
    assert torch.equal(ids, encoder.preprocess(rows)["content_id"])
    assert ids[0] == ids[1] == content_id("a cat")
    assert ids[2] == ids[3] == ids[4]
    assert len(set(ids.tolist())) == 3


def test_the_forward_pass_keeps_them(encoder):
    features = encoder.preprocess(["a cat", picture()])
    ids = features["content_id"].clone()
    assert torch.equal(encoder(features)["content_id"], ids)


def test_exif_rotation_and_palette(encoder, tmp_path):
    turned = picture("green", (40, 20)).rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    picture("green", (40, 20)).save(tmp_path / "plain.png")
    picture("green", (40, 20)).convert("P").save(tmp_path / "palette.png")
    first, second, third = encoder.encode([tmp_path / f"{name}.png" for name in ("turned", "plain", "palette")])
    np.testing.assert_allclose(first, second, atol=ATOL)
    np.testing.assert_allclose(third, second, atol=1e-2)


def test_remote_images_only_when_asked_for(encoder, file, monkeypatch, backbone):
    address = "https://example.org/green.png"
    for item in (address, {"image": address, "text": "what?"}):
        with pytest.raises(ValueError, match=r"Row 1 names a remote image.*allow_remote_images=True"):
            encoder.preprocess(["a cat", item])
    monkeypatch.setattr(inputs, "urlopen", lambda url, timeout: io.BytesIO(file.read_bytes()))
    willing = build_encoder(backbone("fast_vlm"), device="cpu", allow_remote_images=True)
    np.testing.assert_allclose(willing.encode([address]), encoder.encode([file]), atol=ATOL)


def test_bad_inputs_name_the_row_and_what_is_wrong(encoder, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    half = tmp_path / "half.png"
    buffer = io.BytesIO()
    picture(size=(200, 200)).save(buffer, "png")
    half.write_bytes(buffer.getvalue()[:150])
    cases = [
        (tmp_path / "none.png", FileNotFoundError, "Row 1.*none.png"),
        (str(tmp_path / "none.png"), FileNotFoundError, "Row 1.*none.png.*text"),
        ({"image": "none.png", "text": "a"}, FileNotFoundError, "Row 1.*none.png"),
        (broken, ValueError, f"Cannot read an image from {re.escape(str(broken))}"),
        (half, ValueError, f"Cannot read an image from {re.escape(str(half))}"),
        (b"no image", ValueError, "the bytes of row 1"),
        ("data:image/png;base64,!!", ValueError, "row 1 is not valid base64"),
        ("", ValueError, "Row 1 holds neither text nor an image"),
        ("  \n", ValueError, "Row 1 holds neither"),
        ({"image": None, "text": ""}, ValueError, "Row 1 holds neither"),
        ({}, ValueError, "Row 1 holds neither"),
        (None, ValueError, "Row 1 is None"),
        ({"picture": picture()}, ValueError, "Row 1 has the unknown.*picture"),
        ([picture(), picture()], TypeError, "Row 1 is a list"),
        (np.zeros((2, 3, 4, 5)), ValueError, r"Row 1: an array of shape \(2, 3, 4, 5\)"),
        (np.zeros((0, 8, 3)), ValueError, r"Row 1: an array of shape \(0, 8, 3\)"),
        (np.full((8, 8, 3), 7.0), ValueError, r"Row 1.*\[0, 1\].*7.0"),
        (np.full((8, 8, 3), np.nan), ValueError, r"Row 1.*floats.*\[0, 1\].*nan"),
        (np.full((8, 8, 3), 300), ValueError, r"Row 1.*integers.*\[0, 255\].*300"),
        (torch.full((3, 8, 8), -1), ValueError, r"Row 1.*\[0, 255\].*-1"),
        ({"image": picture(), "txt": "a cat"}, ValueError, "Row 1 has the unknown.*txt"),  # defect 8: a text lost
        ({"role": "user", "content": [3]}, TypeError, "Row 1: a part of a message is a int"),
        (object(), TypeError, "Row 1: a object is not an image"),
    ]
    for item, error, words in cases:
        with pytest.raises(error, match=words):
            encoder.preprocess(["a cat", item])


def test_a_text_longer_than_the_model_keeps_media_and_instruction(backbone):
    for family in ("fast_vlm", "qwen2_vl", "smolvlm"):
        model = build_encoder(backbone(family), device="cpu", max_seq_length=160)
        long = "words and words " * 50
        end = model[0].tokenizer.decode(model.preprocess(["a"])["input_ids"][0])[-40:]
        whole = model.preprocess([{"image": picture(), "text": "w"}])
        rows = [long, {"image": picture(), "text": long}, "short"]
        features = model.preprocess(rows)
        assert features["attention_mask"].sum(1).max() <= 160
        assert features["attention_mask"].sum(1)[:2].min() >= 158
        for row in features["input_ids"]:
            assert model[0].tokenizer.decode(row).endswith(end)
        token = model[0].model.config.image_token_id
        assert (features["input_ids"] == token).sum() == (whole["input_ids"] == token).sum() > 0
        other = model.preprocess([{"image": picture(), "text": long + "another end"}])
        assert features["content_id"][1] != other["content_id"][0]  # the identity is of the whole text
        np.testing.assert_allclose(model.encode(rows)[2], model.encode(rows[2]), atol=ATOL)


def test_media_that_do_not_fit_are_an_error(backbone):
    model = build_encoder(backbone("fast_vlm"), device="cpu", max_seq_length=60)
    with pytest.raises(ValueError, match=r"Row 0 needs \d+ tokens.*limit is 60.*max_seq_length"):
        model.encode([{"image": [picture()] * 20, "text": "a"}])


def test_texts_are_not_packed_under_flash_attention(encoder, monkeypatch):
    monkeypatch.setattr(encoder[0], "can_flatten_inputs", True)
    assert encoder.preprocess(["a cat", "a longer text"])["attention_mask"].shape[0] == 2
