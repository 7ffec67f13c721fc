"""Qwen3-VL-Embedding against its authors' arithmetic, written anew: prompt, last attended token, direction."""

import shutil
import string
import unicodedata

import numpy as np
import pytest
import torch
from jinja2 import Environment
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoProcessor

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.prompts import PUNCTUATION, chat_template
from unime_st.published import PUBLISHED
from unime_st.videos import VideoSettings

NAME = "Qwen/Qwen3-VL-Embedding-2B"
IMAGE = picture("red", (84, 56))  # within the bounds and of whole patches: nobody resizes it
OTHER = picture("green", (112, 84))
OWN_SIZE = picture("red", (56, 56))
ITEMS = [
    "a cat",
    IMAGE,
    {"image": OTHER, "text": "What is it? It is long."},
    {"image": [IMAGE, OTHER], "text": "b"},
    "",
]
SHOWN = [[], [IMAGE], [OTHER], [IMAGE, OTHER], []]
TEXTS = ["a cat", "", "What is it? It is long.", "b", ""]


def asked(instruction):
    """The system turn: its default, or what is told, in white space's absence and with a full stop."""
    words = (instruction or "").strip() or "Represent the user's input."
    return words if unicodedata.category(words[-1]).startswith("P") else words + "."


def by_script(folder, instruction=None):
    """All of ITEMS as one batch that is padded on the right."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        f"<|im_start|>system\n{asked(instruction)}<|im_end|>\n<|im_start|>user\n"
        + ("<|vision_start|><|image_pad|><|vision_end|>" * len(images) + text or "NULL")
        + "<|im_end|>\n<|im_start|>assistant\n"
        for text, images in zip(TEXTS, SHOWN, strict=True)
    ]
    images = [image for own in SHOWN for image in own]
    inputs = processor(
        text=prompts, images=images, padding=True, return_tensors="pt", images_kwargs={"do_resize": False}
    )
    assert inputs["attention_mask"][0, -1] == 0
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    last = inputs["attention_mask"].sum(dim=1) - 1
    return torch.nn.functional.normalize(states[torch.arange(len(last)), last], dim=-1).numpy()


@pytest.fixture(scope="module")
def encoder(backbone):
    return load_encoder(backbone("qwen3_vl"), published=NAME, device="cpu")


@pytest.mark.parametrize("instruction", [None, " Find its twin ", "Find its twin.", "找到图片。"])
def test_embeddings_are_the_scripts(encoder, backbone, instruction):
    expected = by_script(backbone("qwen3_vl"), instruction)
    for batch_size in (len(ITEMS), 1, 2):
        found = encoder.encode(ITEMS, prompt=instruction, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - by_script(backbone("qwen3_vl"), "Another.")).max(axis=1).min() > 1e-3


def test_as_stock_code_reads_it_after_export(encoder, backbone, tmp_path):
    stock = SentenceTransformer(str(export_encoder(encoder, tmp_path / "e")), device="cpu")
    for instruction in (None, "Find its twin"):
        expected = by_script(backbone("qwen3_vl"), instruction)
        items = [ITEMS[0], *ITEMS[1:3]]
        np.testing.assert_allclose(stock.encode(items, prompt=instruction), expected[:3], atol=1e-5)


def test_a_copy_with_modules_of_sentence_transformers_loads_as_those_say(backbone, tmp_path):
    template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nRepresent the user's input.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    shutil.copytree(backbone("qwen3_vl"), tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text(template, encoding="utf-8")
    opened = {"chat_template": {"add_generation_prompt": True}}
    transformer = Transformer(str(tmp_path / "own"), processing_kwargs=opened)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(tmp_path / "stock"))
    found = load_encoder(tmp_path / "stock", device="cpu")
    stock = SentenceTransformer(str(tmp_path / "stock"), device="cpu")
    items = [ITEMS[0], OWN_SIZE]
    for instruction in (None, "Find its twin."):
        embeddings = found.encode(items, prompt=instruction)
        np.testing.assert_allclose(embeddings, stock.encode(items, prompt=instruction), atol=1e-5)
        np.testing.assert_allclose(embeddings[0], by_script(backbone("qwen3_vl"), instruction)[0], atol=1e-5)


def test_a_start_checkpoint_keeps_its_prompts_through_training(backbone, tmp_path):
    model = load_encoder(backbone("qwen3_vl"), published=NAME, device="cpu")
    model[0].model.language_model.layers[0].mlp.up_proj.weight.data += 0.1
    again = load_encoder(export_encoder(model, tmp_path / "e"), device="cpu")
    np.testing.assert_allclose(again.encode(ITEMS), model.encode(ITEMS), atol=1e-5)
    assert again[0].processor.chat_template == model[0].processor.chat_template
    assert tuple(again[0].processor.image_processor.size[key] for key in ("shortest_edge", "longest_edge")) == (
        PUBLISHED[NAME].pixels
    )


def test_images_are_bounded_as_in_the_script(encoder):
    def pixels(image):
        rows = encoder[0].preprocess([image])["image_grid_thw"]
        return int(rows.prod()) * 14**2

    assert pixels(picture("red", (20, 20))) >= 4 * 32**2
    assert pixels(picture("red", (3000, 2000))) <= 1800 * 32**2 < 3000 * 2000


def rendered(*parts, system=None):
    messages = [{"role": "user", "content": list(parts)}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return Environment().from_string(chat_template("qwen3_vl_embedding")).render(messages=messages)


def test_golden_with_a_video_first():
    parts = {"type": "text", "text": "a cat"}, {"type": "image"}, {"type": "video"}, {"type": "image"}
    assert rendered(*parts, system="  Find it") == (
        "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("told", [None, "", " \n"])
def test_golden_of_nothing_at_all(told):
    assert rendered({"type": "text", "text": ""}, system=told) == (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\nNULL<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_punctuation_is_unicodes():
    assert {unicodedata.category(sign)[0] for sign in PUNCTUATION} == {"P"}
    ascii_signs = {sign for sign in string.punctuation if unicodedata.category(sign).startswith("P")}
    assert ascii_signs == {sign for sign in PUNCTUATION if sign.isascii()}
    for sign in PUNCTUATION:
        assert f"\nFind it{sign}<|im_end|>" in rendered({"type": "image"}, system=f"Find it{sign}")
    for sign in "a1+=$|~":
        assert f"\nFind it{sign}.<|im_end|>" in rendered({"type": "image"}, system=f"Find it{sign}")


def test_videos_beside_images_and_texts(backbone):
    model = load_encoder(
        backbone("qwen3_vl"), published=NAME, device="cpu", videos=VideoSettings(num_frames=4, max_pixels=56 * 84)
    )
    film = [picture(color, (84, 56)) for color in ("red", "green", "yellow", "black")]
    items = [{"video": film}, {"video": film[::-1], "image": IMAGE, "text": "what?"}, "a cat", IMAGE]
    found = model.encode(items)
    np.testing.assert_allclose(found, np.concatenate([model.encode([item]) for item in items]), atol=1e-5)
    np.testing.assert_allclose(
        model.encode({"image": IMAGE, "text": "what?", "video": film[::-1]}), found[1], atol=1e-5
    )
    assert np.abs(found[0] - model.encode({"video": film[::-1]})).max() > 1e-3


def test_the_familys_own_prompts_are_others(encoder, backbone):
    assert (
        np.abs(build_encoder(backbone("qwen3_vl"), device="cpu").encode(ITEMS[:3]) - encoder.encode(ITEMS[:3]))
        .max(axis=1)
        .min()
        > 1e-3
    )
