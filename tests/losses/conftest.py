"""A tiny trainable text encoder, made offline, that the stock losses accept too."""

import copy

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["red", "blue", "green", "small", "large", "bus", "train", "bird", "cat", "dog", "house", "tree"]
WORDS += ["on", "under", "near", "a", "the", "is"]


@pytest.fixture(scope="session")
def _text_model(tmp_path_factory) -> SentenceTransformer:
    folder = tmp_path_factory.mktemp("tiny-text")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,  # far from the start, where all embeddings are alike
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformer = Transformer(str(folder), model_kwargs={"dtype": torch.float32})
    # Double precision: what is compared is the method, not the rounding that a temperature of 0.02 magnifies.
    return SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").double()


@pytest.fixture
def text_model(_text_model) -> SentenceTransformer:
    """A fresh copy; no dropout, so that plain and cached runs are comparable."""
    return copy.deepcopy(_text_model)


@pytest.fixture
def text_model_with_dropout(_text_model) -> SentenceTransformer:
    model = copy.deepcopy(_text_model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return model
