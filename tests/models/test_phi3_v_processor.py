"""Phi-3-Vision: from texts with numbered placeholders and images to token ids."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from tiny import picture, tokenizer_for
from unime_st.models.phi3_v import Phi3VImageProcessor, Phi3VProcessor


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for("phi3_v")


@pytest.fixture(scope="module")
def processor(tokenizer):
    images = Phi3VImageProcessor(num_crops=4, num_img_tokens=4, size={"height": 56, "width": 56})
    return Phi3VProcessor(images, tokenizer)


def expected_ids(tokenizer, *parts):
    """Texts, each with its own opening token, and numbers of placeholders."""
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    ids = []
    for part in parts:
        ids += [image] * part if isinstance(part, int) else [tokenizer.bos_token_id, *plain(tokenizer, part)]
    return ids


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def real(features, row):
    return features["input_ids"][row][features["attention_mask"][row].bool()].tolist()


def test_an_image_becomes_as_many_placeholders_as_it_has_embeddings(processor, tokenizer):
    image = picture("red", (40, 30))
    count = (2 * 2 + 1) * 4 + 1 + (2 + 1) * 2
    found = processor(text="<|user|>\n<|image_1|>\nwhat? <|end|>", images=image, return_tensors="pt")
    assert real(found, 0) == expected_ids(tokenizer, "<|user|>\n", count, "\nwhat? <|end|>")
    assert found["image_sizes"].tolist() == [[112, 112]]


def test_rows_with_none_one_and_two_images(processor, tokenizer):
    square, wide = picture("red", (40, 40)), picture("green", (400, 90))
    assert processor.image_processor.grid(400, 90) == (4, 1)
    counts = {"square": 5 * 4 + 1 + 3 * 2, "wide": 5 * 4 + 1 + 2 * 2}
    found = processor(
        text=["no image", "<|image_1|>one", "two <|image_1|>\n<|image_2|>\nend"],
        images=[[], [wide], [square, wide]],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert real(found, 0) == expected_ids(tokenizer, "no image")
    assert real(found, 1) == expected_ids(tokenizer, "", counts["wide"], "one")
    assert real(found, 2) == expected_ids(tokenizer, "two ", counts["square"], "\n", counts["wide"], "\nend")
    assert found["attention_mask"][:, -1].all()
    assert found["image_sizes"].tolist() == [[56, 224], [112, 112], [56, 224]]
    flat = processor(
        text=["no image", "<|image_1|>one", "two <|image_1|>\n<|image_2|>\nend"],
        images=[wide, square, wide],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    for key, value in found.items():
        assert torch.equal(value, flat[key]), key


def test_num_crops_of_one_call(processor):
    image = picture("red", (40, 30))
    one = processor(text="<|image_1|>", images=image, images_kwargs={"num_crops": 1}, return_tensors="pt")
    assert one["image_sizes"].tolist() == [[56, 56]]
    assert int((one["input_ids"] == processor.image_token_id).sum()) == 2 * 4 + 1 + 2 * 2


def test_texts_alone(processor, tokenizer):
    found = processor(text=["a", "longer"], padding=True, padding_side="right", return_tensors="pt")
    assert set(found) == {"input_ids", "attention_mask"}
    assert real(found, 0) == expected_ids(tokenizer, "a")
    assert found["attention_mask"][0].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert processor(text="a")["input_ids"] == [expected_ids(tokenizer, "a")]
    assert processor(text="a", add_special_tokens=False)["input_ids"] == [plain(tokenizer, "a")]


def test_a_text_is_cut_and_an_image_is_not(processor, tokenizer):
    image = picture("red", (40, 40))
    options = {"truncation": True, "max_length": 30, "return_tensors": "pt"}
    cut = processor(text="<|image_1|>" + "word " * 9, images=image, **options)
    assert cut["input_ids"].shape == (1, 30)
    assert cut["input_ids"][0].tolist() == expected_ids(tokenizer, "", 27, "word " * 9)[:30]
    with pytest.raises(ValueError, match=r"Row 0 has 39 tokens.*would cut an image.*num_crops"):
        processor(text="word word <|image_1|>", images=image, **options)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<|image_2|>", 1),
        ("<|image_2|><|image_1|>", 2),
        ("<|image_1|><|image_1|>", 2),
        ("<|image_1|>", 2),
        ("words", 1),
    ],
)
def test_placeholders_that_do_not_name_the_images(processor, text, count):
    with pytest.raises(ValueError, match=rf"Row 0 has {count} image\(s\), but its text names .*in order, once each"):
        processor(text=[text], images=[[picture()] * count])


def test_a_text_that_names_an_image_it_does_not_have(processor):
    with pytest.raises(ValueError, match=r"Row 1 has 0 image\(s\), but its text names <\|image_1\|>"):
        processor(text=["<|image_1|>", "I like <|image_1|>"], images=[[picture()], []])
    with pytest.raises(ValueError, match=r"name 1 images.*2 came with them"):
        processor(text="<|image_1|>", images=[picture(), picture()])
    with pytest.raises(ValueError, match=r"2 texts, but images of 1 rows"):
        processor(text=["<|image_1|>", "b"], images=[[picture()]])
    with pytest.raises(ValueError, match="needs `text`"):
        processor(images=picture())


def test_a_tokenizer_of_another_family(processor):
    with pytest.raises(ValueError, match=r"no '<\|image\|>'.*not that of a phi3_v model"):
        Phi3VProcessor(processor.image_processor, tokenizer_for("llava_next"))


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, Phi3VProcessor)
    options = {"text": "<|image_1|>x", "images": picture(), "return_tensors": "pt"}
    for key, value in processor(**options).items():
        assert torch.equal(again(**options)[key], value), key


def test_files_of_the_published_layout(processor, backbone, tmp_path):
    """They name remote code, which is neither there nor needed, and spread over two files."""
    config = json.loads((backbone("phi3_v") / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3_v.Phi3VConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor.tokenizer.save_pretrained(tmp_path)
    published = {
        "auto_map": {
            "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
            "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
        },
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Phi3VImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "num_crops": 4,
        "num_img_tokens": 144,
        "processor_class": "Phi3VProcessor",
        "transformers_version": "4.38.1",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, Phi3VProcessor)
    found = again(text="<|image_1|>", images=picture("red", (640, 480)), return_tensors="pt")
    assert found["pixel_values"].shape == (1, 5, 3, 336, 336)
    assert int((found["input_ids"] == again.image_token_id).sum()) == 757


def test_a_tokenizer_of_the_published_kind(tmp_path):
    """Llama's: it opens texts with <s> and a space, and its special tokens eat the line break behind them."""
    letters = {symbol: 259 + place for place, symbol in enumerate("▁Sumaryinoe:")}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}, **letters}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    turns = ("<|assistant|>", "<|end|>", "<|user|>")
    names = ["<unk>", "<s>", "</s>", "<|endoftext|>", *turns, "<|image|>"]
    backend.add_special_tokens([AddedToken(name, rstrip=name in turns, normalized=False) for name in names])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "added_tokens_decoder": {
            str(backend.token_to_id(name)): {
                "content": name,
                "rstrip": name in turns,
                "special": True,
                "normalized": False,
            }
            for name in names
        },
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3_v"}))
    images = {"image_processor_type": "Phi3VImageProcessor", "num_crops": 4, "processor_class": "Phi3VProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    processor = AutoProcessor.from_pretrained(tmp_path)
    prompt = "<|user|>\n<|image_1|>\nSummary in one: <|end|>\n<|assistant|>\n"
    ids = processor(text=prompt, images=picture("red", (640, 480)), return_tensors="pt")["input_ids"][0].tolist()
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    behind = ["<s>", "▁", "<0x0A>", *"Summary▁in▁one:▁", "<|end|>", "<|assistant|>"]
    assert tokens == ["<s>", "<|user|>", *["<|image|>"] * 757, *behind]
