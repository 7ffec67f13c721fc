"""Attention over a tree of tokens: the mask is the tree's, whatever the tree, and the states are those of each row."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from unime_st.modules import build_encoder
from unime_st.modules.speed import tree_attention
from unime_st.modules.speed.prefixes import language_model
from unime_st.modules.speed.token_tree import flatten_tree
from unime_st.modules.speed.tree_attention import BLOCK, attend, attends_by_tree, padded_length, tree_mask

CPU = torch.device("cpu")


def rows_of(seed, count=12, longest=40, words=3):
    """Rows of few different words, padded on the left: they share beginnings of all lengths, some are equal."""
    generator = np.random.default_rng(seed)
    keys, mask = np.zeros((count, longest), np.int64), np.zeros((count, longest), bool)
    for row in range(count):
        length = int(generator.integers(1, longest + 1))
        keys[row, longest - length :] = generator.integers(1, words + 1, length)
        mask[row, longest - length :] = True
    keys[-1], mask[-1] = keys[0], mask[0]
    return keys, mask


def paths(tree):
    """Places of each row's tokens in the sequence, in their order."""
    return [tree.place[row][tree.mask[row]] for row in range(len(tree.mask))]


def allowed_by(mask, length):
    places = torch.arange(length)
    return mask.mask_mod(0, 0, places[:, None], places[None])


@pytest.mark.parametrize("words", [1, 2, 50])
@pytest.mark.parametrize("seed", range(8))
def test_a_token_attends_to_what_stands_before_it_in_its_row(seed, words):
    tree = flatten_tree(*rows_of(seed, words=words), padded_length)
    length = len(tree.end)
    assert length % BLOCK == 0
    expected = torch.eye(length, dtype=torch.bool)  # padding attends to itself
    for path in paths(tree):
        for at, place in enumerate(path):
            expected[place, path[: at + 1]] = True
    torch.testing.assert_close(allowed_by(tree_mask(tree.end, CPU), length), expected)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_are_left_out_hold_nothing_and_whole_ones_all(seed):
    tree = flatten_tree(*rows_of(seed, count=60, longest=300, words=2 + 30 * (seed % 2)), padded_length)
    mask, length = tree_mask(tree.end, CPU), len(tree.end)
    count = length // BLOCK
    assert count > 4
    inside = allowed_by(mask, length).view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)

    def blocks(counts, keys):
        found = torch.zeros(count, count, dtype=torch.bool)
        for query in range(count):
            found[query, keys[0, 0, query, : counts[0, 0, query]].long()] = True
        return found

    some = blocks(mask.kv_num_blocks, mask.kv_indices)
    whole = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (some & whole).any()
    assert torch.equal(whole, inside.all(-1))
    assert not (inside.any(-1) & ~some & ~whole).any()
    assert whole.any()
    assert (~some & ~whole).any()


@pytest.mark.parametrize("seed", range(3))
def test_states_are_those_of_each_row_alone(seed):
    keys, mask = rows_of(seed)
    tree = flatten_tree(keys, mask, padded_length)
    length = len(tree.end)
    query, key, value = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
    states = attend(torch.nn.Module(), query, key, value, tree_mask(tree.end, CPU), scaling=0.3)[0]
    for path in paths(tree):
        parts = (part[:, :, path] for part in (query, key, value))
        alone = scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(states[:, path], alone.transpose(1, 2), atol=1e-5, rtol=0)
    off = tree.end.copy()
    off[paths(tree)[0][0]] -= 1  # a wrong mask must show
    other = attend(torch.nn.Module(), query, key, value, tree_mask(off, CPU), scaling=0.3)[0]
    assert (other - states).abs().max() > 1e-3


def test_gradients_are_those_of_each_row_alone():
    keys, mask = rows_of(0)
    tree = flatten_tree(keys, mask, padded_length)
    length = len(tree.end)
    parts = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
    weights = torch.randn(length, 2, 16)
    states = attend(torch.nn.Module(), *parts, tree_mask(tree.end, CPU), scaling=None)[0]
    sum((states[0, path] * weights[path]).sum() for path in paths(tree)).backward()
    found = [part.grad.clone() for part in parts]
    for part in parts:
        part.grad = None
    for path in paths(tree):
        alone = scaled_dot_product_attention(*(part[:, :, path] for part in parts), is_causal=True)
        (alone.transpose(1, 2)[0] * weights[path]).sum().backward()
    for part, gradient in zip(parts, found, strict=True):
        torch.testing.assert_close(gradient, part.grad, atol=1e-5, rtol=0)


def test_lengths_are_few_and_padding_is_little():
    lengths = np.arange(1, 70_000)
    padded = np.array([padded_length(int(length)) for length in lengths])
    assert (padded >= lengths).all()
    assert (padded % BLOCK == 0).all()
    assert ((padded - lengths) < np.maximum(BLOCK, lengths / 8 + 1)).all()
    assert len(set(padded.tolist())) < 75  # each may be compiled for


def test_who_can(backbone, monkeypatch):
    monkeypatch.setattr(tree_attention, "_can_compile", lambda: True)
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    decoder = language_model(model[0].model)
    cuda = torch.device("cuda")  # nothing is put there
    assert attends_by_tree(decoder, CPU)
    head = decoder.config.hidden_size // decoder.config.num_attention_heads
    assert attends_by_tree(decoder, cuda) is (head >= 16)
    decoder.config.head_dim = 64
    assert attends_by_tree(decoder, cuda)
    for wrong in (8, 96):
        decoder.config.head_dim = wrong
        assert not attends_by_tree(decoder, cuda)
    decoder.config.head_dim = 64
    decoder.config.attention_dropout = 0.1
    assert attends_by_tree(decoder.eval(), cuda)
    assert not attends_by_tree(decoder.train(), cuda)
    decoder.config.attention_dropout = 0.0
    decoder.config._attn_implementation = "eager"
    assert not attends_by_tree(decoder, cuda)


def test_variants_of_the_kernel_are_not_given_up(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", asked.append)
    config = torch._dynamo.config
    with config.patch(recompile_limit=8):
        tree_attention._compiled.__wrapped__()
        assert config.recompile_limit >= 64
    with config.patch(recompile_limit=1000):
        tree_attention._compiled.__wrapped__()
        assert config.recompile_limit == 1000
    assert asked == [tree_attention.flex_attention] * 2


@pytest.mark.parametrize(("torch_version", "spec", "can"), [
    ("2.7.0", "there", True), ("2.14.1+cu130", "there", True), ("2.6.1", "there", False), ("2.11.0", None, False),
])  # fmt: skip
def test_what_compiles(torch_version, spec, can, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(tree_attention, "find_spec", lambda _: spec)
    assert tree_attention._can_compile.__wrapped__() is can


def test_a_torch_without_it_packs_with_masks_or_says_that_it_cannot(backbone, monkeypatch):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    texts = ["a cat on a mat", "a cat", "a dog"]
    prefixes, decoder = model[0].prefixes, language_model(model[0].model)
    expected = model.encode(texts)
    prefixes.attention = "tree"
    np.testing.assert_allclose(model.encode(texts), expected, atol=2e-6)
    assert prefixes.taken == "tree"
    monkeypatch.setattr(tree_attention, "flex_attention", None)
    with pytest.raises(ValueError, match=r"`attention='tree'`, but that needs FlexAttention.*'auto'"):
        model.encode(texts)
    assert "forward" not in vars(decoder)
    prefixes.attention = "auto"
    np.testing.assert_allclose(model.encode(texts), expected, atol=2e-6)
    assert prefixes._kind(decoder, torch.device("cuda")) == "mask"  # where "tree" is what is usual
    prefixes.attention = "rows"
    with pytest.raises(ValueError, match="`attention='rows'`, but row by row is for inference on a CPU"):
        prefixes._kind(decoder, torch.device("cuda"))


def test_rows_are_refused_in_training_and_what_is_unknown_at_once(backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu").train()
    model[0].prefixes.attention = "rows"
    with (
        model[0].embeddings_alone(last_token_only=True),
        pytest.raises(ValueError, match="`attention='rows'`, but row by row is for inference"),
    ):
        model(model.preprocess(["a cat", "a dog on a mat"]))
    with pytest.raises(ValueError, match="`attention='trees'`, but it must be one of 'auto', 'rows', 'tree', 'mask'"):
        model[0].prefixes.attention = "trees"
    assert model[0].prefixes.attention == "rows"


@pytest.mark.parametrize("family", ["gemma3", "phi3_v"])
def test_a_family_that_cannot_pack_refuses_to_be_asked_and_says_once_what_it_does(family, backbone, caplog):
    model = build_encoder(backbone(family), device="cpu")
    with caplog.at_level("INFO", logger="unime_st.modules.speed.prefixes"):
        for _ in range(2):
            expected = model.encode(["a cat", "a dog on a mat"])
    (told,) = [record.message for record in caplog.records if record.name == "unime_st.modules.speed.prefixes"]
    assert told.startswith("Passes run in padded rows: equal beginnings have no equal states")
    for kind in ("tree", "mask", "rows"):
        model[0].prefixes.attention = kind
        with pytest.raises(ValueError, match=f"`attention='{kind}'` asks for packed passes.*cannot run them"):
            model.encode(["a cat", "a dog on a mat"])
    model[0].share_prefixes = False  # padded rows are asked for, by name
    np.testing.assert_allclose(model.encode(["a cat", "a dog on a mat"]), expected, atol=2e-6)


def test_what_is_taken_is_told_once(backbone, caplog):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    assert model[0].prefixes.taken is None
    with caplog.at_level("INFO", logger="unime_st.modules.speed.prefixes"):
        for _ in range(3):
            model.encode(["a cat", "a dog on a mat"])
    told = [record.message for record in caplog.records if record.name == "unime_st.modules.speed.prefixes"]
    assert told == ["Packed passes on cpu attend by rows"]
