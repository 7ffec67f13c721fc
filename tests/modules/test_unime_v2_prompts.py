"""UniME-V2 reads what its authors' code gives it: bare texts, one image prompt, no instruction of UniME's."""

import numpy as np
import pytest
import torch
from jinja2 import Environment
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import picture
from unime_st import export_encoder, load_encoder
from unime_st.prompts import chat_template

IMAGE_PROMPT = "Find an image caption describing the given image."
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Find its twin."}]}
TEXT, IMAGE, VIDEO = {"type": "text", "text": " a cat\n"}, {"type": "image"}, {"type": "video"}
CASES = [  # template, messages, what is read
    ("unime_v2_qwen2_vl", [[TEXT]], " a cat\n"),
    ("unime_v2_qwen2_vl", [[IMAGE]], f"<|image_pad|> {IMAGE_PROMPT}"),
    ("unime_v2_qwen2_vl", [[IMAGE, IMAGE]], f"<|image_pad|><|image_pad|> {IMAGE_PROMPT}"),
    ("unime_v2_qwen2_vl", [[TEXT, IMAGE]], "<|image_pad|>\n a cat\n"),
    ("unime_v2_qwen2_vl", [SYSTEM, [IMAGE]], "<|image_pad|> Find its twin."),
    ("unime_v2_qwen2_vl", [SYSTEM, [TEXT]], "Find its twin.\n a cat\n"),
    ("unime_v2_qwen2_vl", [SYSTEM, [IMAGE, TEXT]], "<|image_pad|>\nFind its twin.\n a cat\n"),
    ("unime_v2_qwen2_vl", [[VIDEO]], f"<|video_pad|> {IMAGE_PROMPT}"),
    ("unime_v2_llava_onevision", [[TEXT]], "<|im_start|>user \na cat<|im_end|><|im_start|>assistant\n"),
    (
        "unime_v2_llava_onevision",
        [[IMAGE]],
        f"<|im_start|>user <image>\n{IMAGE_PROMPT}<|im_end|><|im_start|>assistant\n",
    ),
    (
        "unime_v2_llava_onevision",
        [SYSTEM, [IMAGE, TEXT]],
        "<|im_start|>user <image>\nFind its twin.\na cat<|im_end|><|im_start|>assistant\n",
    ),
]


@pytest.mark.parametrize(("name", "messages", "expected"), CASES)
def test_golden(name, messages, expected):
    turns = [turn if isinstance(turn, dict) else {"role": "user", "content": turn} for turn in messages]
    assert Environment().from_string(chat_template(name)).render(messages=turns) == expected


def authors(processor, model, text, image):
    """What their script does with one input: the processor, the last state of the last token, its direction."""
    inputs = processor(text=[text], images=None if image is None else [image], return_tensors="pt")
    with torch.no_grad():
        state = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
    return torch.nn.functional.normalize(state, dim=-1)[0].numpy()


@pytest.mark.parametrize("load", ["ours", "stock"])
def test_embeddings_are_those_of_the_authors_script(load, backbone, tmp_path):
    folder = backbone("qwen2_vl")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = load_encoder(folder, published="TianchengGu/UniME-V2-Qwen2VL-2B", device="cpu")
    if load == "stock":
        encoder = SentenceTransformer(str(export_encoder(encoder, tmp_path / "e")), device="cpu")
    image = picture("red", (300, 200)).resize((56, 56))
    items = ["A man is crossing the street.", image, {"image": image, "text": "What is it?"}]
    read = [
        (items[0], None),
        (f"<|image_pad|> {IMAGE_PROMPT}", image),
        ("<|image_pad|>\nWhat is it?", image),
    ]
    expected = np.stack([authors(processor, model, *pair) for pair in read])
    np.testing.assert_allclose(encoder.encode(items), expected, atol=1e-5)
    assert np.abs(expected[1] - authors(processor, model, read[1][0], picture("green", (56, 56)))).max() > 1e-2
