"""Rows that begin alike: the same embeddings as one by one, from fewer tokens."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

import tiny
from tiny import FAMILIES, PLUGIN_FAMILIES, picture, tiny_encoder
from unime_st.modules import build_encoder, export_encoder, sentence_transformer
from unime_st.modules.speed import prefixes as shared_prefix
from unime_st.modules.speed import row_attention
from unime_st.modules.speed.batches import encoding_order
from unime_st.modules.speed.prefixes import SharedPrefixes, language_model, shares_prefixes
from unime_st.modules.speed.token_tree import flatten_tree, pack_tree
from unime_st.modules.speed.tree_attention import BLOCK

PADDED = ("gemma3", "phi3_v")  # not causal alone, or positions that depend on the length


def inputs():
    """Three questions an image, images of several sizes, images alone, texts that begin alike or not, copies."""
    images = [picture("red"), picture("green", (30, 60)), picture("yellow", (70, 20))]
    questions = ["What colour is it?", "What colour is the left half?", "Is it " + "very " * 4 + "red?"]
    items = [{"image": image, "text": text} for image, text in product(images, questions)]
    items += [*images, "a cat", "a cat on a mat", "Find the image of a cat.", "Find the image of a dog.", "a cat"]
    items += [{"image": [images[0], images[1]], "text": "Which?"}, {"image": [images[0], images[2]], "text": "Which?"}]
    return items


@pytest.fixture(params=["rows", "mask", "tree"])
def layout(request, monkeypatch):
    """`encode` on the CPU, with masks, and as on a GPU; families that cannot pack may not be asked to by name."""
    as_usual = SharedPrefixes.__init__
    padded = "family" in request.fixturenames and request.getfixturevalue("family") in PADDED

    def init(self):
        as_usual(self)
        self.attention = "auto" if padded else request.param

    monkeypatch.setattr(SharedPrefixes, "__init__", init)
    return request.param


@pytest.fixture(autouse=True)
def _as_a_large_model(monkeypatch):
    """Attention costs a tiny model too much for long sequences to pay; plan as for one of usual width."""
    plan = partial(pack_tree, hidden_size=4096)
    monkeypatch.setattr(shared_prefix, "pack_tree", lambda keys, mask, hidden_size, training: plan(keys, mask))


@pytest.fixture(params=FAMILIES + PLUGIN_FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def encoder(family, backbone):
    return build_encoder(backbone(family), device="cpu")


def one_by_one(model, items):
    """Embeddings without sharing, batching or sorting."""
    model.eval()
    kept, model[0].share_prefixes = model[0].share_prefixes, False
    with torch.inference_mode():
        rows = [model(model.preprocess([item]))["sentence_embedding"] for item in items]
    model[0].share_prefixes = kept
    return torch.cat(rows).numpy()


def test_encode_equals_rows_one_by_one(layout, encoder, family, monkeypatch):
    called = []
    monkeypatch.setattr(
        row_attention, "_places", lambda before, own=row_attention._places: called.append(1) or own(before)
    )
    items = inputs()
    expected = one_by_one(encoder, items)
    np.testing.assert_allclose(encoder.encode(items, batch_size=3), expected, atol=2e-6)
    counted = encoder[0].prefixes = SharedPrefixes()
    np.testing.assert_allclose(encoder.encode(items, batch_size=64), expected, atol=2e-6)
    if family in PADDED:
        assert counted.computed == 0
        assert not shares_prefixes(encoder[0].model)
    else:
        assert 0 < counted.computed < 0.8 * counted.padded + (BLOCK if layout == "tree" else 0)
    assert bool(called) is (layout == "rows" and family not in PADDED)
    assert counted.taken == (None if family in PADDED else layout)
    distances = np.abs(expected[:, None] - expected[None]).max(axis=-1) + np.eye(len(items))
    distances[[12, 16], [16, 12]] = 1  # the one pair of copies
    assert distances.min() > 1e-4  # else equality of embeddings says nothing


def test_a_shared_image_matters(layout, encoder):
    """Two rows differ in their image alone, or in the last word alone."""
    items = [{"image": picture(color), "text": text} for color, text in product(("red", "green"), ("a b", "a c"))]
    embeddings = encoder.encode(items)
    np.testing.assert_allclose(embeddings, one_by_one(encoder, items), atol=2e-6)
    distances = np.abs(embeddings[:, None] - embeddings[None]).max(axis=-1) + np.eye(4)
    assert distances.min() > 1e-4


def test_images_that_differ_in_one_pixel_are_two(encoder):
    image = picture("red", (28, 28))
    other = image.copy()
    other.paste("white", (0, 0, 14, 14))
    items = [{"image": image, "text": "x"}, {"image": other, "text": "x"}]
    embeddings = encoder.encode(items)
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_code_gives_the_same(family, backbone, tmp_path, layout):
    model = build_encoder(backbone(family), device="cpu")
    export_encoder(model, tmp_path / "encoder")
    stock = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert type(stock) is SentenceTransformer
    items = [item for item in inputs() if isinstance(item, dict) and not isinstance(item["image"], list)]
    np.testing.assert_allclose(model.encode(items), stock.encode(items), atol=1e-5)


@pytest.mark.parametrize("inference", [True, False])
def test_every_token_has_its_state(backbone, inference):
    """Not only the last: what is handed back is a batch as any other."""
    model = build_encoder(backbone("qwen2_vl"), device="cpu").eval()
    features = model.preprocess(inputs()[:9])
    mask = features["attention_mask"].bool()
    with torch.inference_mode():
        with model[0].prefixes.encoding(inference=inference):
            shared = model[0](dict(features))["token_embeddings"]
        plain = model[0](dict(features))["token_embeddings"]
    assert 0 < model[0].prefixes.computed < mask.sum()
    torch.testing.assert_close(shared[mask], plain[mask], atol=1e-5, rtol=0)


def changed(name, model, features):
    """Features that were packed before, and now are a case of `refused`."""
    features = dict(features)
    if name == "keys of another shape":
        features["prefix_key"] = features["prefix_key"][:, 1:]
    elif name == "padded on the right":
        features = {
            key: value.roll(-1, 1) if isinstance(value, torch.Tensor) and value.ndim == 2 else value
            for key, value in features.items()
        }
        features["attention_mask"][:, -1] = 0
    elif name == "no keys":
        del features["prefix_key"]
    elif name == "switched off":
        model[0].share_prefixes = False
    elif name == "states of all layers":
        model[0].model.config.output_hidden_states = True
    elif name == "compiled":
        model[0].model.language_model.layers[-1].compile(backend="eager")
    return features


@pytest.mark.parametrize(
    "refused",
    [
        *("keys of another shape", "padded on the right", "no keys", "switched off", "states of all layers"),
        *("compiled", "outside of the context"),
    ],
)
def test_what_does_not_fit_stays_with_padded_rows(backbone, refused, layout):
    model = build_encoder(backbone("llava_next"), device="cpu").eval()
    features = model.preprocess(["a cat", "a cat on a mat", "a dog " * 9, "no"])
    counted = model[0].prefixes
    with counted.encoding(last_token_only=True, inference=True):
        model(dict(features))
    assert 0 < counted.computed < counted.padded
    before = counted.computed
    features = changed(refused, model, features)
    within = partial(counted.encoding, last_token_only=True, inference=True)
    if refused == "outside of the context":
        within = nullcontext
    elif refused != "switched off":
        with within(), pytest.raises(ValueError, match=rf"`attention='{layout}'` asks for packed .* 'auto'"):
            model(dict(features))
        assert counted.computed == before
        counted.attention = "auto"
    with within():
        output = model(dict(features))
    assert counted.computed == before
    assert output["token_embeddings"].abs().min(dim=2).values.max() > 0
    assert "forward" not in vars(language_model(model[0].model))


def test_contexts_nest(backbone):
    prefixes = SharedPrefixes()
    seen = lambda: (prefixes.active, prefixes.last_token_only, prefixes.inference)  # noqa: E731
    with prefixes.encoding(last_token_only=True, inference=True):
        with prefixes.encoding():
            assert seen() == (True, False, False)
        assert seen() == (True, True, True)
    assert seen() == (False, False, False)


@pytest.fixture
def by_branch(monkeypatch):
    """Passes whose attention went by branch: the rows of each."""
    found, own = [], row_attention.Branches
    monkeypatch.setattr(
        shared_prefix, "Branches", lambda tree, dtype: found.append(len(tree.branches)) or own(tree, dtype)
    )
    return found


def test_attention_by_branch_has_the_models_own_scale(backbone, by_branch):
    model = build_encoder(backbone("llava_next"), device="cpu")
    before = model.encode(inputs()[:9])
    for layer in language_model(model[0].model).layers:
        layer.self_attn.scaling *= 4
    found = model.encode(inputs()[:9])
    assert by_branch
    assert np.abs(found - before).max() > 1e-3
    np.testing.assert_allclose(found, one_by_one(model, inputs()[:9]), atol=2e-6)


@pytest.mark.parametrize(("text_model", "goes_by_branch"), [("stablelm", True), ("gpt_neox", False), ("xglm", None)])
def test_text_models_of_other_families(text_model, goes_by_branch, tmp_path, monkeypatch, by_branch):
    """Layers that hand nothing down to attention, that have other names, and positions that are not rotary."""
    own = tiny._config

    def other(family, tokenizer):
        config = own(family, tokenizer)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        text = {name: getattr(config.text_config, name) for name in sizes}
        text |= {"num_layers": text["num_hidden_layers"], "attention_heads": text["num_attention_heads"]}
        text["num_key_value_heads"] = text["num_attention_heads"]
        config.text_config = AutoConfig.for_model(text_model, **text, pad_token_id=config.text_config.pad_token_id)
        return config

    monkeypatch.setattr(tiny, "_config", other)
    model = tiny_encoder("llava_next", tmp_path / "tiny")
    items = inputs()[:9]
    found = model.encode(items)
    assert len(by_branch) == bool(goes_by_branch)
    assert shares_prefixes(model[0].model) is (goes_by_branch is not None)
    if goes_by_branch is not None:  # padding moves absolute positions, in stock code too
        np.testing.assert_allclose(found, one_by_one(model, items), atol=2e-6)


def a_copy(config):
    copied = copy.deepcopy(config)
    copied._attn_implementation = "sdpa"
    return copied


@pytest.mark.parametrize("why", ["eager", "attention has a config of its own", "training"])
def test_attention_by_branch_is_for_inference_with_sdpa(why, backbone, by_branch):
    model = build_encoder(backbone("llava_next"), device="cpu").eval()
    decoder = language_model(model[0].model)
    expected = one_by_one(model, inputs()[:9])
    model.encode(inputs()[:9])
    assert by_branch
    by_branch.clear()
    if why == "eager":
        model[0].model.set_attn_implementation("eager")
    elif why != "training":
        decoder.layers[-1].self_attn.config = a_copy(decoder.config)
    before = model[0].prefixes.computed
    if why == "training":
        with torch.no_grad(), model[0].prefixes.encoding():
            found = model(model.preprocess(inputs()[:9]))["sentence_embedding"].numpy()
    else:
        found = model.encode(inputs()[:9])
    assert not by_branch
    assert model[0].prefixes.computed > before  # packed, then
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_usual_attention_is_back_after_an_error(backbone, monkeypatch):
    model = build_encoder(backbone("llava_next"), device="cpu")
    decoder = language_model(model[0].model)
    expected = model.encode(inputs()[:3])

    def failing(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(row_attention, "scaled_dot_product_attention", failing)
        with pytest.raises(MemoryError):
            model.encode(inputs()[:3])
    assert decoder.config._attn_implementation == "sdpa"
    np.testing.assert_array_equal(model.encode(inputs()[:3]), expected)


def test_others_get_the_usual_attention_meanwhile(backbone, monkeypatch):
    """A call of the model in another thread, while attention goes by branch in this one, and a plan there."""
    model = build_encoder(backbone("llava_next"), device="cpu").eval()
    decoder = language_model(model[0].model)
    features = model.preprocess(["a cat on a mat", "a dog", "no"])
    states = {name: features[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        expected = decoder(**states).last_hidden_state
        tree = flatten_tree(features["prefix_key"].numpy(), features["attention_mask"].numpy() > 0)
        with (
            row_attention.by_branch(decoder, row_attention.Branches(tree, torch.float32)),
            ThreadPoolExecutor(1) as pool,
        ):
            found = pool.submit(torch.inference_mode()(lambda: decoder(**states).last_hidden_state)).result()
            planned = pool.submit(model.preprocess, ["a cat"]).result()
    torch.testing.assert_close(found, expected)
    assert "prefix_key" in planned


@pytest.mark.parametrize("budget", [None, 150])
def test_a_beginning_longer_than_a_pass_is_computed_once(budget, backbone, monkeypatch):
    monkeypatch.setattr(sentence_transformer, "CPU_TOKENS", 150)
    model = build_encoder(backbone("llava_next"), device="cpu")
    items = [{"image": picture("red", (64, 64)), "text": "very " * 30 + last} for last in "abc"]
    alone = int(model.preprocess(items[:1])["attention_mask"].sum())
    assert alone > 150
    expected, before = one_by_one(model, items), model[0].prefixes.computed
    found = model.encode(items, batch_num_tokens=budget)
    assert model[0].prefixes.computed - before < 2 * alone
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_positions_that_do_not_fit_fall_back_to_padded_rows(backbone, monkeypatch, layout):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    items = inputs()
    expected = one_by_one(model, items)
    monkeypatch.setattr(shared_prefix, "_positions", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"asks for packed passes.* positions depend on more"):
        model.encode(items)
    model[0].prefixes.attention = "auto"
    np.testing.assert_allclose(model.encode(items), expected, atol=2e-6)


def test_positions_are_looked_at_until_they_are_known_to_fit(backbone, monkeypatch):
    """For each rule by which they are counted: those of another model, of media, and passes without any are others."""
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    looked, plain = [], shared_prefix._positions

    def noted(*args, sure):
        looked.append(not sure)
        return plain(*args, sure=sure)

    def looks(items):
        looked.clear()
        model[0].vision_cache.clear()
        model.encode(items)
        (found,) = looked
        return found

    monkeypatch.setattr(shared_prefix, "_positions", noted)
    red = picture("red")
    shown = [{"image": red, "text": "what?"}, {"image": red, "text": "where?"}]
    for _ in range(shared_prefix._PASSES_TO_BE_SURE + 1):
        looks(["one", "two"])  # has no positions in this family
    for _ in range(shared_prefix._PASSES_TO_BE_SURE):
        assert looks(shown)
    assert not looks(shown)
    assert not looks([*shown, "one"])

    class Another(type(model[0].model)):
        pass

    model[0].model.__class__ = Another
    assert looks(shown)


def test_it_can_be_switched_off(tmp_path):
    model = tiny_encoder("llava_onevision", tmp_path / "tiny")
    expected = model.encode(inputs())
    model[0].share_prefixes = False
    before = model[0].prefixes.computed
    np.testing.assert_allclose(model.encode(inputs()), expected, atol=2e-6)
    assert model[0].prefixes.computed == before > 0


def random_rows(rng):
    """Rows grown from a random tree, padded on the left."""
    rows = [[int(rng.integers(1, 4))]]
    for _ in range(int(rng.integers(0, 20))):
        parent = rows[rng.integers(len(rows))]
        rows.append(parent[: rng.integers(1, len(parent) + 1)] + rng.integers(1, 4, rng.integers(0, 9)).tolist())
    width = max(map(len, rows))
    keys = np.array([[0] * (width - len(row)) + row for row in rows])
    return keys, keys > 0


@pytest.mark.parametrize("seed", range(200))
def test_the_tree_against_a_plain_loop(seed):
    keys, mask = random_rows(np.random.default_rng(seed))
    tree = pack_tree(keys, mask, hidden_size=64)
    if tree is None:
        return
    flat = keys.reshape(-1)
    length = tree.source.shape[1]
    for row in range(len(keys)):
        own = keys[row, mask[row]].tolist()
        places = tree.place[row, mask[row]]
        assert len({place // length for place in places}) == 1  # one sequence a row
        for depth, place in enumerate(places):
            sequence, at = divmod(int(place), length)
            assert tree.used[sequence, at]
            assert tree.depth[sequence, at] == depth
            assert flat[tree.source[sequence, at]] == own[depth]
            seen = np.flatnonzero(tree.allowed[sequence, at])
            assert seen.tolist() == [int(p) % length for p in places[: depth + 1]]
    assert tree.allowed.any(axis=2).all()
    assert tree.used.sum() <= mask.sum()


@pytest.mark.parametrize("seed", range(200))
def test_the_branches_against_a_plain_loop(seed):
    keys, mask = random_rows(np.random.default_rng(seed))
    tree = flatten_tree(keys, mask)
    beginnings = {tuple(row[at][: end + 1]) for row, at in zip(keys, mask, strict=True) for end in range(at.sum())}
    if tree is None:
        assert len(beginnings) == mask.size
        return
    assert tree.allowed is None
    assert tree.source.shape == (1, len(beginnings))  # each once, and nothing else
    own = {end - 1: [*before.tolist(), *range(start, end)] for start, end, before in tree.branches}
    assert sorted(place for start, end, _ in tree.branches for place in range(start, end)) == [*range(len(beginnings))]
    for row in range(len(keys)):
        places = tree.place[row, mask[row]].tolist()
        assert keys.reshape(-1)[tree.source[0, places]].tolist() == keys[row, mask[row]].tolist()
        assert tree.depth[0, places].tolist() == [*range(len(places))]
        assert own.get(places[-1], places) == places  # what the last token attends to; or it is inside of another row
    assert tree.used.all()


def test_trees_are_found_where_there_are_any():
    found = [pack_tree(*random_rows(np.random.default_rng(seed)), hidden_size=64) for seed in range(200)]
    assert sum(tree is not None for tree in found) > 150
    training = [pack_tree(*random_rows(np.random.default_rng(n)), hidden_size=64, training=True) for n in range(200)]
    wide = [(a.source.shape, b.source.shape) for a, b in zip(found, training, strict=True) if a and b]
    assert all(a[1] >= b[1] for a, b in wide)  # attention weighs more: shorter sequences
    assert any(a[1] > b[1] for a, b in wide)
    equal = np.arange(1, 33).reshape(4, 8)
    assert pack_tree(equal, equal > 0, hidden_size=64) is None  # nothing shared, nothing padded


def test_order_of_encoding():
    image = picture("red")
    items = [{"image": image, "text": "a"}, "x y", {"image": image, "text": "b"}, "x z", "x y"]
    order = encoding_order(items, 2, by_beginning=True)
    assert order.distinct.tolist() == [0, 1, 2, 3]
    assert order.index.tolist() == [0, 1, 2, 3, 1]
    assert sorted(sorted(batch.tolist()) for batch in order.batches) == [[0, 2], [1, 3]]


def test_order_by_length_brings_the_largest_first():
    texts = ["a" * length for length in (3, 50, 1, 20)]
    order = encoding_order([*texts, picture("red", (9, 9))], 1, by_beginning=False)
    assert [int(batch[0]) for batch in order.batches] == [4, 1, 3, 0, 2]


def test_a_broken_input_is_named_and_the_next_call_works(encoder):
    with pytest.raises(FileNotFoundError, match="no-such"):
        encoder.encode(["a", {"image": "no-such-file.png"}, "b"], batch_size=1)
    assert encoder.encode(["a"]).shape[0] == 1
