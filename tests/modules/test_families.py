"""Every family: all kinds of input, one answer whatever the batch, and the same answer from stock code."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tiny import FAMILIES, picture
from unime_st import MultimodalEncoder, build_encoder, load_encoder
from unime_st.modules.speed.vision_cache import vision_tower
from unime_st.prompts import TURN_FORMATS

TOLERANCE = 1e-5
TEXTS = ["a red bus", "a longer text about nothing in particular"]
IMAGES = [picture("green"), picture("white", (50, 60))]
BOTH = [{"image": picture("green"), "text": "what colour?"}]
SEVERAL = [{"image": [picture("white"), picture("black", (50, 60))], "text": "which?"}]
BATCHES = {
    "text": TEXTS,
    "image": IMAGES,
    "image_text": BOTH * 2,
    "several_images": SEVERAL,
    "mixed": [TEXTS[0], IMAGES[0], SEVERAL[0], BOTH[0], TEXTS[1]],
    "none_first": [*TEXTS, IMAGES[1]],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(family, backbone):
    return build_encoder(backbone(family), device="cpu")


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_equals_its_rows(encoder, kind):
    rows = BATCHES[kind]
    together = encoder.encode(rows, batch_size=len(rows))
    encoder[0].vision_cache.clear()  # or the rows alone would read the features that the batch has left
    alone = np.concatenate([encoder.encode([row]) for row in rows])
    assert together.shape == (len(rows), encoder.get_embedding_dimension())
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_the_embedding_changes_with_the_image(encoder):
    for make in (lambda image: image, lambda image: {"image": image, "text": "what colour?"}):
        first, second, again = encoder.encode(
            [make(picture("yellow")), make(picture("green")), make(picture("yellow"))]
        )
        assert np.abs(first - second).max() > 10 * TOLERANCE
        np.testing.assert_allclose(first, again, atol=TOLERANCE)


def test_it_is_the_last_token_of_the_language_model(encoder, family):
    features = encoder.preprocess(TEXTS)
    rendered = encoder[0].tokenizer.decode(features["input_ids"][0])
    assert rendered.endswith("a red bus\nSummary above sentence in one word: " + TURN_FORMATS[family].end)
    assert features["attention_mask"][:, -1].all()  # padded on the left
    with torch.no_grad():
        inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
        expected = encoder[0].model(**inputs).last_hidden_state[:, -1]
    expected = torch.nn.functional.normalize(expected, dim=1)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected.numpy(), atol=TOLERANCE)


def test_the_default_lora_is_on_the_language_model_alone(family, backbone):
    model = build_encoder(backbone(family), device="cpu", peft_config=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "layers" in name for name in trained)
    tower = {f".{name}" for name, module in model.named_modules() if module is vision_tower(model[0].model)}
    assert tower
    assert not [name for name in trained if any(part in name for part in tower) or "vision" in name or "visual" in name]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", BATCHES)
def test_gradients_through_every_kind_of_batch(encoder, kind):
    encoder.zero_grad()
    out = encoder(encoder.preprocess(BATCHES[kind]))
    out["sentence_embedding"].sum().backward()
    assert torch.isfinite(out["sentence_embedding"]).all()


STOCK = """
import json, sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
for folder in json.loads(sys.argv[1]):
    model = SentenceTransformer(folder, device="cpu")
    assert type(model[0]).__module__.startswith("sentence_transformers"), type(model[0])
    image = Image.open(folder + "/../picture.png").convert("RGB")
    batches = [["a red bus", "a longer text"], [image], [{"image": image, "text": "what colour?"}]]
    np.save(folder + "/../stock.npy", np.concatenate([model.encode(batch) for batch in batches]))
assert "unime_st" not in sys.modules
"""


def test_stock_code_in_a_fresh_process_gives_the_same(backbone, tmp_path):
    """Plain, with adapters, and merged, all families in one process."""
    expected = {}
    for family in FAMILIES:
        model = build_encoder(backbone(family), device="cpu", max_seq_length=300, peft_config=family == "fast_vlm")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.encode(["a warm-up, after which the tokenizer has a padding and truncation state"])
        image = picture("purple")
        batches = [["a red bus", "a longer text"], [image], [{"image": image, "text": "what colour?"}]]
        folder = tmp_path / family / "saved"
        folder.parent.mkdir()
        image.save(folder.parent / "picture.png")
        expected[folder] = np.concatenate([model.encode(batch) for batch in batches])
        model.save_pretrained(str(folder))
        types = [entry["type"] for entry in json.loads((folder / "modules.json").read_text())]
        assert all(kind.startswith("sentence_transformers.") for kind in types)
    folders = json.dumps([str(folder) for folder in expected])
    subprocess.run([sys.executable, "-c", STOCK, folders], check=True, capture_output=True, text=True)
    for folder, values in expected.items():
        np.testing.assert_allclose(np.load(folder.parent / "stock.npy"), values, atol=TOLERANCE, err_msg=str(folder))
        again = load_encoder(folder, device="cpu")
        assert isinstance(again[0], MultimodalEncoder)
        assert again.max_seq_length == 300
        np.testing.assert_allclose(again.encode(["a red bus", "a longer text"]), values[:2], atol=TOLERANCE)


def test_unknown_family(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no prompt template for the family 'bert'.*prompt_template"):
        build_encoder(tmp_path)


def test_stock_class_is_what_a_user_gets(backbone):
    assert isinstance(build_encoder(backbone("fast_vlm"), device="cpu"), SentenceTransformer)
