"""Published models against their authors' scripts: the same calls of transformers, the same embeddings."""

import numpy as np
import pytest
import torch
from jinja2 import Environment
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.identity.model import model_fingerprint
from unime_st.prompts import chat_template
from unime_st.published import PUBLISHED

V1_ONEVISION = "DeepGlint-AI/UniME-LLaVA-OneVision-7B"
V2_ONEVISION = "TianchengGu/UniME-V2-LLaVA-OneVision-8B"
V2_QWEN = "TianchengGu/UniME-V2-Qwen2VL-2B"
V2_IMAGE = "<image> Find an image caption describing the given image."
CHAT = (  # LLaVA-OneVision's own, as its repository has it
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = "A man is crossing the street with a red car parked nearby."
IMAGE = picture("red", (60, 40)).resize((56, 56))
ITEMS = [TEXT, IMAGE, {"image": IMAGE, "text": "What is it?"}]


def words_of_unime(text, image):
    """What the script of the first paper's LLaVA-OneVision puts into a turn; it has no words for both together."""
    if image is None:
        return f"{text}\nSummary above sentence in one word:\n"
    both = f"{text}\nSummary above image and sentence in one word:\n"
    return both if text else "Summary above image in one word:\n"


def words_of_v2(text, image):
    """What that of UniME-V2 does: MMEB's placeholder out, blanks off."""
    given = text if image is None else (f"<image>\n{text}\n" if text else V2_IMAGE)
    return given.replace("<image>\n", "").replace("<image>", "").strip()


def by_script(folder, words):
    """Their call for each of ITEMS: a conversation, its own chat template, the last state of the last token."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = CHAT
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for text, image in ((TEXT, None), (None, IMAGE), ("What is it?", IMAGE)):
        content = [{"type": "text", "text": words(text, image)}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        with torch.no_grad():
            state = model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1][:, -1, :]
        rows.append(torch.nn.functional.normalize(state, dim=-1)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("load", ["ours", "stock"])
@pytest.mark.parametrize(("published", "words"), [(V1_ONEVISION, words_of_unime), (V2_ONEVISION, words_of_v2)])
def test_llava_onevision_is_its_authors_script(published, words, load, backbone, tmp_path):
    folder = backbone("llava_onevision")
    encoder = load_encoder(folder, published=published, device="cpu")
    if load == "stock":
        encoder = SentenceTransformer(str(export_encoder(encoder, tmp_path / "e")), device="cpu")
    expected = by_script(folder, words)
    np.testing.assert_allclose(encoder.encode(ITEMS), expected, atol=1e-5)
    familys = build_encoder(folder, device="cpu").encode(ITEMS)
    assert (np.abs(familys - expected).max(axis=1) > 1e-3).all()  # so other words are seen


def counted_like_words(folder, prompts, images):
    """Rows of the code that UniME-V2's Qwen2-VL was trained with: positions 0, 1, 2, ... over an image's tokens too."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt, image in zip(prompts, images, strict=True):
        inputs = processor(text=[prompt], images=None if image is None else [image], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(length).view(1, 1, -1).expand(3, 1, -1)
        with torch.no_grad():
            state = model(**inputs, position_ids=positions, output_hidden_states=True).hidden_states[-1][:, -1]
        rows.append(torch.nn.functional.normalize(state, dim=-1)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_an_images_tokens_counted_like_words(family, backbone, tmp_path, caplog):
    folder, large = backbone(family), picture("green", (112, 168))
    items = [TEXT, IMAGE, large, {"image": large, "text": "What?"}, "x"]
    prompt = "<|image_pad|> Find an image caption describing the given image."
    expected = counted_like_words(
        folder, [TEXT, prompt, prompt, "<|image_pad|>\nWhat?", "x"], [None, IMAGE, large, large, None]
    )
    model = build_encoder(folder, device="cpu", prompt_template="unime_v2_qwen2_vl")
    by_rows = model.encode(items)
    assert (np.abs(by_rows - expected).max(axis=1)[1:4] > 1e-3).all()
    before = model_fingerprint(model)
    model[0].flat_image_positions = True
    assert model_fingerprint(model) != before
    np.testing.assert_allclose(model.encode(items), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(items, batch_size=1), expected, atol=1e-5)
    exported = export_encoder(model, tmp_path / "e")
    assert "`flat_image_positions`, which stock sentence-transformers does not know" in caplog.text
    again = load_encoder(exported, device="cpu")
    assert model_fingerprint(again) == model_fingerprint(model)
    np.testing.assert_allclose(again.encode(items), expected, atol=1e-5)
    np.testing.assert_allclose(SentenceTransformer(str(exported), device="cpu").encode(items), by_rows, atol=1e-5)


@pytest.mark.parametrize("blank", ["", " \n"])
@pytest.mark.parametrize("published", [V2_QWEN, V2_ONEVISION])
def test_texts_without_a_word_are_finite(published, blank, backbone):
    model = load_encoder(backbone(PUBLISHED[published].family), published=published, device="cpu")
    embeddings = model.encode([blank, "a cat", blank])
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embeddings[1], model.encode("a cat"), atol=1e-5)
    np.testing.assert_allclose(embeddings[0], embeddings[2], atol=1e-6)


def test_the_chat_template_of_the_script_is_that_of_our_table():
    rendered = [rendering(chat_template(PUBLISHED[name].prompts)) for name in (V1_ONEVISION, V2_ONEVISION)]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "both?"}]}]
    assert rendered[1](turns) == rendering(CHAT)(turns)
    turns[0]["content"][2]["text"] = "both?\nSummary above image and sentence in one word:\n"
    told = rendering(CHAT)(turns)
    turns[0]["content"][2]["text"] = "both?"
    assert rendered[0](turns) == told


def rendering(source):
    """A template as transformers renders it."""
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    return lambda messages: template.render(messages=messages, add_generation_prompt=True)
