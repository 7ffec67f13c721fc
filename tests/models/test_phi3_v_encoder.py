"""Phi-3-Vision as an encoder: prompts, batches, adapters, and the folder it leaves behind."""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import phi3_v_oracle as oracle
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from tiny import picture
from unime_st import MultimodalEncoder, build_encoder, export_encoder, load_encoder
from unime_st.hub import encoder_card
from unime_st.modules import default_lora_config
from unime_st.modules.speed.vision_cache import vision_tower

TOLERANCE = 1e-5
TEXTS = ["a red bus", "a longer text about nothing in particular"]
IMAGES = [picture("green"), picture("white", (50, 160))]
BOTH = {"image": picture("green"), "text": "what colour?"}
SEVERAL = {"image": [picture("white"), picture("black", (50, 60))], "text": "which?"}
BATCHES = {
    "text": TEXTS,
    "image": IMAGES,
    "image_text": [BOTH, BOTH],
    "several_images": [SEVERAL, SEVERAL],
    "mixed": [TEXTS[0], IMAGES[0], SEVERAL, BOTH, TEXTS[1]],
    "none_first": [*TEXTS, IMAGES[1]],
}
ABOVE_BOTH = "Summary above image and sentence in one word: <|end|>\n<|assistant|>\n"
PROMPTS = {
    "text": (TEXTS[0], "<|user|>\na red bus\nSummary above sentence in one word: <|end|>\n<|assistant|>\n"),
    "image": (IMAGES[0], "<|user|>\n<|image_1|>\nSummary above image in one word: <|end|>\n<|assistant|>\n"),
    "both": (
        BOTH,
        f"<|user|>\n<|image_1|>\nwhat colour?\n{ABOVE_BOTH}",
    ),
    "several": (SEVERAL, f"<|user|>\n<|image_1|>\n<|image_2|>\nwhich?\n{ABOVE_BOTH}"),
}


@pytest.fixture(scope="module")
def encoder(backbone):
    return build_encoder(backbone("phi3_v"), device="cpu")


@pytest.fixture(scope="module")
def state(backbone):
    tensors = load_file(backbone("phi3_v") / "model.safetensors")
    return {name.removeprefix("model."): value.double() for name, value in tensors.items()}


def images_of(item):
    images = item.get("image") if isinstance(item, dict) else item
    return [] if isinstance(images, str) else images if isinstance(images, list) else [images]


@pytest.mark.parametrize("kind", PROMPTS)
def test_embeddings_are_those_of_the_published_prompt_computed_by_hand(encoder, state, kind):
    item, prompt = PROMPTS[kind]
    config, tokenizer = encoder[0].model.config, encoder[0].tokenizer
    images = images_of(item)
    sequence = []
    for index, part in enumerate(re.split(r"<\|image_\d\|>", prompt)):  # each text opens with the tokenizer's <s>
        sequence += list(state["embed_tokens.weight"][tokenizer(part)["input_ids"]])
        if index < len(images):
            sequence += list(oracle.image_embeddings(images[index], state, config, 4))
    last = oracle.hidden_states(torch.stack(sequence), state, config)[-1]
    expected = last / last.norm()
    np.testing.assert_allclose(encoder.encode([item])[0], expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("kind", PROMPTS)
def test_token_ids_spell_the_prompt(encoder, kind):
    item, prompt = PROMPTS[kind]
    features = encoder.preprocess(["padding makes this row much the longest of all " * 3, item])
    tokenizer = encoder[0].tokenizer
    ids = [number for number in features["input_ids"][1].tolist() if number != tokenizer.pad_token_id]
    spelled = tokenizer.decode(ids)
    numbers = iter(range(1, 9))
    spelled = re.sub(r"(<\|image\|>)+", lambda _: f"<|image_{next(numbers)}|>", spelled)
    assert spelled.replace("<bos>", "") == prompt
    assert features["attention_mask"][:, -1].all()


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_equals_its_rows(encoder, kind):
    rows = BATCHES[kind]
    together = encoder.encode(rows, batch_size=len(rows))
    encoder[0].vision_cache.clear()
    alone = np.concatenate([encoder.encode([row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=TOLERANCE)


def test_a_row_beyond_the_original_length_does_not_change_its_neighbours(encoder):
    rows = ["short", "a very long text " * 20, IMAGES[0]]
    together = encoder.encode(rows, batch_size=3)
    alone = np.concatenate([encoder.encode([row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)


def test_the_embedding_changes_with_the_image(encoder):
    for make in (lambda image: image, lambda image: {"image": [picture("black"), image], "text": "what colour?"}):
        first, second, again = encoder.encode([make(picture(color)) for color in ("yellow", "green", "yellow")])
        assert np.abs(first - second).max() > 100 * TOLERANCE
        np.testing.assert_allclose(first, again, atol=TOLERANCE)


def test_a_text_that_spells_a_placeholder(encoder):
    with pytest.raises(ValueError, match=r"holds '<\|image\|>', which is for media"):
        encoder.encode(["a <|image|>"])
    with pytest.raises(ValueError, match=r"Row 0 has 1 image\(s\).*names <\|image_1\|>, <\|image_1\|>"):
        encoder.encode([{"image": picture(), "text": "like <|image_1|>"}])


def test_a_limit_cuts_the_text_not_the_image(backbone):
    model = build_encoder(backbone("phi3_v"), device="cpu", max_seq_length=120)
    features = model.preprocess([{"image": picture(), "text": "word " * 40}])
    assert features["input_ids"].shape[1] <= 120
    spelled = model.tokenizer.decode(features["input_ids"][0])
    assert spelled.endswith("Summary above image and sentence in one word: <|end|>\n<|assistant|>\n")
    assert spelled.count("<|image|>") == 27
    model.encode([{"image": picture(), "text": "word " * 40}])


def test_num_crops_is_an_argument_of_the_processor(backbone):
    model = build_encoder(backbone("phi3_v"), device="cpu", processor_kwargs={"num_crops": 1})
    assert model.preprocess(IMAGES)["image_sizes"].tolist() == [[56, 56], [56, 56]]


def test_crops_are_computed_once_while_the_tower_is_fixed(backbone):
    model = build_encoder(backbone("phi3_v"), device="cpu")
    tower = vision_tower(model[0].model)
    assert tower is model[0].model.vision_embed_tokens.img_processor
    noise = [Image.effect_noise((40, 30), 90), Image.effect_noise((50, 160), 90)]  # no two crops alike
    first = model.encode(noise)
    misses = model[0].vision_cache.misses
    assert misses == (4 + 1) + (3 + 1)
    assert np.array_equal(model.encode(noise), first)
    assert (model[0].vision_cache.hits, model[0].vision_cache.misses) == (misses, misses)
    kept = next(iter(model[0].vision_cache._rows.values()))
    assert kept[2] == 16 * 32 * 4  # patch features alone, not all hidden states


def one_step(model, loss):
    model.zero_grad(set_to_none=True)
    columns = ([TEXTS[0], "two", IMAGES[1]], [IMAGES[0], SEVERAL, "no image"])
    value = loss([model.preprocess(list(column)) for column in columns], None)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_model_can_be_sent_to_another_process_after_it_has_seen_an_image(encoder):
    rows = BATCHES["mixed"]
    expected = encoder.encode(rows)
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_allclose(again.encode(rows), expected, atol=TOLERANCE)


def test_gradients_reach_the_adapters_of_the_language_model_alone(backbone):
    model = build_encoder(backbone("phi3_v"), device="cpu", peft_config=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapted = {name.split(".lora_")[0].rpartition("model.")[2] for name in trained}
    assert adapted == {
        f"layers.{layer}.{part}"
        for layer in range(2)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert not [name for name in trained if "vision" in name]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    value, gradients = one_step(model, MultipleNegativesRankingLoss(model, scale=5.0))
    assert set(gradients) == trained
    assert value > 0
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_chosen_layers(backbone):
    model = build_encoder(backbone("phi3_v"), device="cpu", peft_config=default_lora_config(rank=4, layers=[1]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("layers.1." in name for name in trained)


def test_gradient_cache_equals_the_plain_loss(backbone):
    model = build_encoder(backbone("phi3_v"), device="cpu").double()
    plain, expected = one_step(model, MultipleNegativesRankingLoss(model, scale=5.0))
    cached, found = one_step(model, CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=1))
    assert plain == pytest.approx(cached, abs=1e-6)
    alive = [name for name in expected if expected[name].abs().max() > 1e-4]
    assert any("img_processor" in name for name in alive)
    assert any("glb_GN" in name for name in alive)
    assert any("sub_GN" in name for name in alive)
    for name in alive:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("merge_adapters", [True, False])
def test_exported_with_adapters_and_loaded(backbone, tmp_path, merge_adapters):
    model = build_encoder(backbone("phi3_v"), device="cpu", peft_config=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = BATCHES["mixed"]
    expected = model.encode(rows)
    assert np.abs(expected - build_encoder(backbone("phi3_v"), device="cpu").encode(rows)).max() > 1e-3
    folder = export_encoder(model, tmp_path / "encoder", merge_adapters=merge_adapters)
    assert (folder / "adapter_config.json").is_file() is not merge_adapters
    again = load_encoder(folder, device="cpu")
    assert isinstance(again[0], MultimodalEncoder)
    np.testing.assert_allclose(again.encode(rows), expected, atol=TOLERANCE)
    stock = SentenceTransformer(str(folder), device="cpu")
    assert type(stock[0]).__module__.startswith("sentence_transformers")
    np.testing.assert_allclose(stock.encode(TEXTS), model.encode(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(stock.encode(IMAGES), model.encode(IMAGES), atol=TOLERANCE)


def test_the_saved_configuration_keeps_the_published_keys(encoder, tmp_path):
    folder = export_encoder(encoder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "phi3_v"
    assert config["img_processor"]["num_img_tokens"] == 4
    assert config["embd_layer"]["hd_transform_order"] == "sub_glb"
    again = load_encoder(export_encoder(load_encoder(folder, device="cpu"), tmp_path / "twice"), device="cpu")
    np.testing.assert_allclose(again.encode(BATCHES["mixed"]), encoder.encode(BATCHES["mixed"]), atol=TOLERANCE)


LOAD = """
import sys
{imports}
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[2], model.encode(["a red bus"]))
"""


def in_a_fresh_process(imports, *arguments):
    code = LOAD.format(imports=imports)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_stock_code_alone_refuses_and_the_card_says_what_to_do(encoder, tmp_path):
    folder = export_encoder(encoder, tmp_path / "encoder")
    refused = in_a_fresh_process("", folder, tmp_path / "vector.npy")
    assert refused.returncode != 0
    assert re.search(r"model type `phi3_v`.*does not recognize this architecture", refused.stderr)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "**Needs unime_st.** transformers does not know the architecture `phi3_v`" in card
    done = in_a_fresh_process("import unime_st", folder, tmp_path / "vector.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "vector.npy"), encoder.encode(["a red bus"]), atol=TOLERANCE)
    after = in_a_fresh_process("import sentence_transformers, unime_st", folder, tmp_path / "vector.npy")
    assert after.returncode == 0, after.stderr


def test_the_published_card_says_so_too_and_that_of_other_families_does_not(encoder, backbone):
    card = encoder_card(encoder, repo_id="me/phi")
    assert "**Needs unime_st.**" in card
    assert "no plug-in" not in card
    assert "```python\nimport unime_st\nfrom PIL import Image\n" in card
    other = encoder_card(build_encoder(backbone("llava_next"), device="cpu"), repo_id="me/llava")
    assert "unime_st" not in other.split("```python")[1].split("```")[0]
    assert "loading it takes no plug-in" in other
