"""Images through both losses: cached equals plain with the vision tower frozen and trained, on stock modules."""

import copy

import pytest
import torch
from helpers import assert_same_step, features, run
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from unime_st.losses import HardNegativeInfoNCELoss

TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %} word"
)
COLOURS = ["red", "green", "blue", "white", "yellow", "purple"]
WORDS = ["<pad>", "<unk>", "<image>", "word", "a", "picture", "of", *COLOURS]


@pytest.fixture(scope="module")
def _image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )
    tokenizer.image_token = "<image>"
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, initializer_factor=20.0, **layers),
        text_config=LlamaConfig(
            vocab_size=len(WORDS), max_position_embeddings=64, num_key_value_heads=2, initializer_range=0.3, **layers
        ),
        image_token_id=WORDS.index("<image>"),
        initializer_range=0.3,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformer = Transformer(str(folder), model_kwargs={"dtype": torch.float32})
    return SentenceTransformer(modules=[transformer, Pooling(16, "lasttoken")], device="cpu").double()


@pytest.fixture
def image_model(_image_model):
    return copy.deepcopy(_image_model)


def columns():
    queries = [f"a picture of {colour}" for colour in COLOURS]
    return queries, [Image.new("RGB", (16, 16), colour) for colour in COLOURS]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen vision", "trained vision"])
@pytest.mark.parametrize("options", [{"mini_batch_size": 2}, {"mini_batch_num_tokens": 20}])
def test_cached_equals_plain(image_model, frozen, options):
    for name, parameter in image_model.named_parameters():
        parameter.requires_grad = not (frozen and ("vision_tower" in name or "projector" in name))
    arguments = {"num_hard_negatives": 3, "temperature": 0.1, "margin": None}
    labels = torch.arange(6)
    plain = run(HardNegativeInfoNCELoss(image_model, **arguments), image_model, columns(), labels)
    cached = run(HardNegativeInfoNCELoss(image_model, **arguments, **options), image_model, columns(), labels)
    assert_same_step(plain, cached, least=10)
    trained = [name for name, gradient in plain[1].items() if "vision_tower" in name and gradient.abs().max() > 1e-4]
    assert bool(trained) != frozen


def test_the_loss_depends_on_the_image(image_model):
    loss = HardNegativeInfoNCELoss(image_model, num_hard_negatives=3)
    queries, images = columns()
    right = loss(features(image_model, queries, images), torch.arange(6))
    wrong = loss(features(image_model, queries, images[1:] + images[:1]), torch.arange(6))
    assert abs(right.item() - wrong.item()) > 1e-3
