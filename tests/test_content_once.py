"""What an input says is told once on each of its ways through the package."""

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import MultimodalEncoder, build_encoder, export_encoder
from unime_st.data import encode_corpus, encode_stream
from unime_st.evaluation import encode_distinct
from unime_st.identity import content as content_module
from unime_st.identity.content import Content, takes_contents
from unime_st.modules import MultimodalSentenceTransformer


@pytest.fixture
def inputs(tmp_path):
    picture("green").save(tmp_path / "green.png")
    return ["a red bus", picture("white"), {"image": str(tmp_path / "green.png"), "text": "what colour?"}, "a cat"]


@pytest.fixture
def told(monkeypatch):
    """How often an input is taken apart, and a medium hashed."""
    counts = {"inputs": 0, "media": 0}
    begin, digest = Content.__init__, content_module.medium_digest

    def counted(self, item, **options):
        counts["inputs"] += 1
        begin(self, item, **options)

    def hashed(value, read_files):
        counts["media"] += 1
        return digest(value, read_files)

    monkeypatch.setattr(Content, "__init__", counted)
    monkeypatch.setattr(content_module, "medium_digest", hashed)
    return counts


WAYS = {
    "encode": lambda encoder, inputs, folder: encoder.encode(inputs),
    "evaluation": lambda encoder, inputs, folder: encode_distinct(encoder, inputs, cache=folder / "cache"),
    "stream": lambda encoder, inputs, folder: np.concatenate(list(encode_stream(encoder, inputs, window_size=3))),
    "corpus": lambda encoder, inputs, folder: encode_corpus(encoder, inputs, folder / "corpus").rows(range(4)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_every_way_tells_an_input_once_and_embeds_alike(family, way, backbone, inputs, told, tmp_path):
    encoder = build_encoder(backbone(family), device="cpu")
    found = WAYS[way](encoder, inputs, tmp_path)
    assert told == {"inputs": 4, "media": 2}
    alone = np.concatenate([encoder.encode([item]) for item in inputs])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.abs(alone[1] - alone[3]).max() > 1e-3  # or the images would go unseen


def test_a_step_tells_each_column_once(backbone, inputs, told):
    encoder = build_encoder(backbone("qwen2_vl"), device="cpu")
    features = encoder.preprocess(inputs)
    assert told == {"inputs": 4, "media": 2}
    assert features["content_id"].tolist() == [Content(item).id for item in inputs]


def test_stock_models_get_the_inputs_themselves(backbone, inputs, told, tmp_path):
    ours = build_encoder(backbone("qwen2_vl"), device="cpu")
    stock = SentenceTransformer(str(export_encoder(ours, tmp_path / "stock")), device="cpu")
    for way in ("evaluation", "stream"):
        np.testing.assert_allclose(WAYS[way](stock, inputs, tmp_path), ours.encode(inputs), atol=1e-5)


def test_what_is_opened_late_keeps_its_content(inputs):
    known = Content(inputs[2])
    opened = known.given_as({"image": picture("green"), "text": "what colour?"})
    assert (opened.fingerprint, opened.id, opened.media) == (known.fingerprint, known.id, known.media)
    assert opened.item is not known.item
    assert Content(opened.item).fingerprint != known.fingerprint  # pixels are another identity than a file's bytes


def test_contents_pass_through_a_pool(backbone, inputs):
    encoder = build_encoder(backbone("qwen2_vl"), device="cpu")
    contents = [Content(item) for item in inputs]
    found = encoder.encode(contents, device=["cpu", "cpu"])
    np.testing.assert_allclose(found, encoder.encode(inputs), atol=1e-5)
    tokens = encoder.encode(contents, output_value="token_embeddings")  # stock code's way
    assert len(tokens) == len(inputs)


def test_an_error_shows_the_input_and_not_its_content(backbone):
    encoder = build_encoder(backbone("qwen2_vl"), device="cpu")
    with pytest.raises(ValueError, match=r"\(row 1\).*media"):
        encoder.encode([Content("fine"), Content("a <|image_pad|> of words")])
    assert repr(Content("fine")) == "'fine'"


class Wrapper:
    """A model around ours whose `encode` edits inputs, as users write them."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.__dict__["model"], name)

    def encode(self, inputs, **options):
        return self.model.encode([item.lower() if isinstance(item, str) else item for item in inputs], **options)


class Prefixing(MultimodalSentenceTransformer):
    def encode(self, inputs, **options):
        return super().encode([f"T: {item}" if isinstance(item, str) else item for item in inputs], **options)


@pytest.mark.parametrize(
    "way", [encode_distinct, lambda model, items: np.concatenate(list(encode_stream(model, items)))]
)
def test_encode_of_others_gets_the_inputs_themselves(backbone, inputs, way):
    encoder = build_encoder(backbone("qwen2_vl"), device="cpu")
    items = [item.upper() if isinstance(item, str) else item for item in inputs]
    expected = encoder.encode(inputs)
    np.testing.assert_allclose(way(Wrapper(encoder), items), expected, atol=1e-5)
    assert np.abs(encoder.encode(items) - expected).max() > 1e-3
    prefixing = Prefixing(modules=list(encoder), device="cpu")
    found = way(prefixing, inputs)
    wanted = encoder.encode([f"T: {item}" if isinstance(item, str) else item for item in inputs])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    encoder.encode = lambda items, **options: np.ones((len(items), 2), np.float32)  # on the instance
    assert not takes_contents(encoder)


def test_what_a_subclass_puts_in_an_inputs_place_is_told_anew(backbone, inputs):
    class Cutting(MultimodalEncoder):
        def preprocess(self, inputs, *args, **options):
            return super().preprocess([item if isinstance(item, dict) else "cut" for item in inputs], *args, **options)

    encoder = build_encoder(backbone("qwen2_vl"), device="cpu")
    encoder[0].__class__ = Cutting
    np.testing.assert_allclose(encoder.encode(inputs)[[0, 3]], encoder.encode(["cut", "cut"]), atol=1e-5)


def test_items_of_a_lazy_sequence_are_not_held():
    made = []

    class Lazy(Sequence):
        def __len__(self):
            return 40

        def __getitem__(self, number):
            if number >= len(self):
                raise IndexError(number)
            image = picture("red", (4 + number, 4))
            made.append(weakref.ref(image))
            return image

    class Counting:
        most = 0

        def encode(self, items, **options):
            gc.collect()
            self.most = max(self.most, sum(image() is not None for image in made))
            return np.ones((len(items), 2), np.float32)

    model = Counting()
    assert len(encode_distinct(model, Lazy(), batch_size=1)) == 40
    assert model.most < 12  # those of a chunk
