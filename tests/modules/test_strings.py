"""Bare strings: which of them are images, exactly as stock code decides, and which are refused."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tiny import FAMILIES, picture
from unime_st import build_encoder
from unime_st.modules.inputs import as_messages, names_an_image

ADDRESSES = {
    "https://example.org/bus.jpg": True,
    "https://example.org/bus.JPG?width=200#top": True,
    "https://example.org/bus.html": False,
    "https://example.org/a bus.jpg": False,
    "https://[x/bus.jpg": False,
    "see https://example.org/bus.jpg": False,
}


@pytest.mark.parametrize(("text", "expected"), ADDRESSES.items())
def test_addresses(text, expected):
    assert names_an_image(text, 0) == expected


def test_a_file_with_a_space_in_its_name_is_an_image_here_and_in_stock(backbone, tmp_path):
    file = str(tmp_path / "red bus.png")
    picture("green").save(file)
    model = build_encoder(backbone("fast_vlm"), device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found, as_image, as_text = model.encode([file, picture("green"), {"text": file}])
    np.testing.assert_allclose(found, as_image, atol=1e-5)
    np.testing.assert_allclose(stock.encode([file])[0], found, atol=1e-5)
    assert np.abs(found - as_text).max() > 1e-3


def test_strings_that_only_end_like_a_file_are_text():
    for words in ("the picture is called bus.png", "x" * 5000 + ".png"):
        assert as_messages(words, 0)[0]["content"] == [{"type": "text", "text": words}]
    with pytest.raises(FileNotFoundError, match=r"Row 3: .* looks like an image file, but there is none"):
        as_messages("x" * 300 + ".png", 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_spells_a_media_token_is_refused_by_row(family, backbone):
    """Stock code fails too, but says neither which row nor what to do."""
    model = build_encoder(backbone(family), device="cpu")
    config = model[0].model.config
    spelled = model[0].tokenizer.convert_ids_to_tokens(config.image_token_id)
    for token in {spelled, model[0].processor.image_token}:
        for item in (f"what is {token} here", {"image": picture(), "text": token}):
            with pytest.raises(ValueError, match=r"\(row 1\) holds '<.*>'.*Reword"):
                model.preprocess(["a cat", item])
    assert model.encode(["<|image_1|> and <img>"]).shape == (1, 32)
