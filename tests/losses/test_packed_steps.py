"""A step over packed sequences is the step over padded rows, and over each row by itself; it computes less."""

import pytest
import torch
from helpers import assert_same_step, features, packing_as_if_large
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from test_distinct_inputs import encoder

from tiny import FAMILIES, picture
from unime_st import build_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config
from unime_st.modules.speed import prefixes as shared_prefix

RED, GREEN = picture("red"), picture("green", (60, 30))
TEXTS = ["a cat", "a cat on a mat", "no", "a dog " * 6, "a cat on the moon, far away", "yes", "a dog there", "two " * 9]
OTHERS = ["the cat", "a dog " * 6, "it is not", "one", "the cat is here", "a mat", "nothing of the kind", "three"]
ANCHORS = [{"image": RED, "text": text} for text in ("what?", "who is it?", "what is it there?")] + [
    *({"image": GREEN, "text": text} for text in ("what?", "where was it " * 3)),
    *("a cat", "a dog " * 6),
    GREEN,
]
POSITIVES = ["kitten", "crimson " * 4, {"image": RED, "text": "which?"}, RED, "a cat", "lime", "dogs", "a green thing"]
SHARING = ("llava_next", "qwen2_vl", "smolvlm", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "fast_vlm")
FAST = ("llava_next", "qwen3_vl")
FAMILY = [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in SHARING]
MODES = {"plain": {}, "rows": {"mini_batch_size": 4}, "tokens": {"mini_batch_num_tokens": 400}}
TEACHER = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0))
STAGES = {
    "texts": (DistillKLLoss, {"temperature": 0.5}, (TEXTS, OTHERS), TEACHER),
    "images": (HardNegativeInfoNCELoss, {"temperature": 1.0, "num_hard_negatives": 3}, (ANCHORS, POSITIVES), None),
}


@pytest.fixture(autouse=True)
def _packed():
    with packing_as_if_large():
        yield


def step(model, stage, *, shared=True, attention="mask", **options):
    """Loss, gradients, and places computed of the padded ones."""
    cls, fixed, columns, labels = STAGES[stage]
    model.zero_grad(set_to_none=True)
    model[0].share_prefixes = shared
    prefixes = model[0].prefixes = shared_prefix.SharedPrefixes()
    prefixes.attention = attention
    value = cls(model, **fixed, **options)(features(model, *columns), labels)
    value.backward()
    assert not prefixes.active
    assert prefixes.taken in (attention, None)
    assert "forward" not in vars(shared_prefix.language_model(model[0].model))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), gradients, (prefixes.computed, prefixes.padded)


def row_by_row(model, stage):
    """The same, of a pass for each row."""
    cls, fixed, columns, labels = STAGES[stage]
    model.zero_grad(set_to_none=True)
    parts = [[model.preprocess([item]) for item in column] for column in columns]
    embeddings = [torch.cat([model(dict(row))["sentence_embedding"] for row in column]) for column in parts]
    if stage == "texts":
        value = cls(None, **fixed).compute_loss_from_embeddings(embeddings, labels)
    else:
        ids = [torch.cat([row["content_id"] for row in column]) for column in parts]
        value = cls(None, **fixed).compute_loss_from_embeddings(embeddings, content_ids=ids)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("attention", ["mask", "tree"])
@pytest.mark.parametrize("family", FAMILY)
def test_packed_steps_are_those_of_padded_rows_and_of_each_row(family, attention, stage, frozen, backbone):
    model = encoder(backbone(family), frozen=frozen)
    alone = row_by_row(model, stage)
    for mode, options in MODES.items():
        packed = step(model, stage, attention=attention, **options)
        computed, padded = packed[2]
        if attention == "mask":  # short rows fill no block of a tree
            assert 0 < computed < (0.8 if mode == "plain" else 0.95) * padded, mode
        assert computed
        rows = step(model, stage, shared=False, **options)
        assert rows[2] == (0, 0)
        for expected in (rows, alone):
            assert_same_step(expected[:2], packed[:2], least=10, atol=1e-6)


def test_every_family_that_shares_is_tested(backbone):
    assert set(FAMILIES) - set(SHARING) == {"gemma3"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["mask", "tree"])
@pytest.mark.parametrize("mode", MODES)
def test_with_gradient_checkpointing(mode, attention, reentrant, backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    expected = step(model, "images", shared=False, **MODES[mode])
    decoder = model[0].model.language_model
    calls = []
    inner = decoder.layers[-1].mlp.gate_proj
    inner.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[:2].numel()))
    step(model, "images", attention=attention, **MODES[mode])
    assert max(calls) <= 8  # last tokens alone
    passes = len(calls)
    calls.clear()
    model[0].model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model[0].model.enable_input_require_grads()
    found = step(model, "images", attention=attention, **MODES[mode])
    assert found[2][0]
    assert attention == "tree" or found[2][0] < found[2][1]
    assert len(calls) > passes  # those with gradients again in the backward pass
    assert min(calls) > 8  # where the last tokens are not known
    assert_same_step(expected[:2], found[:2], least=10, atol=1e-6)


@pytest.mark.parametrize(("implementation", "attention"), [("sdpa", "mask"), ("eager", "mask"), ("sdpa", "tree")])
def test_under_autocast(backbone, implementation, attention):
    model = encoder(backbone("qwen3_vl"), frozen=True).float()
    model[0].model.set_attn_implementation(implementation)
    exact = step(model, "images", attention=attention, mini_batch_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = step(model, "images", attention=attention, mini_batch_size=4)
        padded = step(model, "images", shared=False, mini_batch_size=4)
    assert packed[2][0]
    scale = max(gradient.abs().max() for gradient in exact[1].values())
    errors = [
        max((exact[1][name] - found[1][name]).abs().max() for name in exact[1]) / scale for found in (packed, padded)
    ]
    assert errors[0] < max(2 * errors[1], 0.1)
    assert abs(packed[0] - exact[0]) < max(2 * abs(padded[0] - exact[0]), 0.02)


def test_both_passes_drop_out_the_same(backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    model[0].model.delete_adapter("default")
    model.add_adapter(default_lora_config(rank=4, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    seen = []
    model.train().register_forward_hook(
        lambda _module, _args, output: seen.append(output["sentence_embedding"].detach())
    )
    step(model, "images", mini_batch_size=4)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 + 1 :]
    assert len(first) == len(second) > 1
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    seen.clear()
    step(model, "images", mini_batch_size=4)
    assert not torch.equal(seen[0], first[0])


STOCK = {
    "ranking": lambda model: MultipleNegativesRankingLoss(model, scale=5.0),
    "cached": lambda model: CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=3),
    "matryoshka": lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=5.0), [32, 16]),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_losses_see_padded_rows(name, backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    columns = [model.preprocess(column) for column in (TEXTS, OTHERS)]
    assert all(column["prefix_key"].shape == column["attention_mask"].shape for column in columns)
    found = []
    for keys in (True, False):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        given = [{key: value for key, value in column.items() if keys or key != "prefix_key"} for column in columns]
        value = STOCK[name](model)(given, None)
        value.backward()
        found.append((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert_same_step(*found, least=10, atol=1e-12)
    assert model[0].prefixes.computed == 0


@pytest.mark.parametrize("wrapper", [MatryoshkaLoss, None], ids=["matryoshka", "alone"])
def test_our_losses_inside_stock_ones(wrapper, backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    found = []
    for shared in (True, False):
        model[0].share_prefixes = shared
        model.zero_grad(set_to_none=True)
        loss = HardNegativeInfoNCELoss(model, temperature=1.0, num_hard_negatives=3)
        loss = loss if wrapper is None else wrapper(model, loss, [32, 16])
        value = loss(features(model, TEXTS, OTHERS), None)
        value.backward()
        found.append((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert model[0].prefixes.computed > 0
    assert_same_step(*found, least=10, atol=1e-6)


def test_without_the_vision_tower_in_memory(backbone):
    model = build_encoder(backbone("fast_vlm"), device="cpu", text_only=True).double().train()
    found = [step(model, "texts", shared=shared) for shared in (True, False)]
    assert 0 < found[0][2][0] < found[0][2][1]
    assert_same_step(found[0][:2], found[1][:2], least=10, atol=1e-6)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_pooling_gets_the_states_it_reads(pooling, backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    model[1].pooling_mode = pooling
    found = [step(model, "texts", shared=shared) for shared in (True, False)]
    assert 0 < found[0][2][0] < found[0][2][1]
    assert_same_step(found[0][:2], found[1][:2], least=10, atol=1e-6)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_given_padded_rows(how, backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    model.forward = torch.compiler.disable(model.forward)  # what matters is what is around it
    wrapped = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "in place":
        model.compile(backend="eager")
    for options in MODES.values():
        loss = DistillKLLoss(wrapped, temperature=0.5, **options).train()
        loss(features(model, TEXTS, OTHERS), TEACHER).backward()
    assert model[0].prefixes.computed == 0


def test_evaluation_of_a_loss_is_packed_too(backbone):
    model = encoder(backbone("llava_next"), frozen=True).eval()
    loss = DistillKLLoss(model, temperature=0.5).eval()
    values = []
    for shared in (True, False):
        model[0].share_prefixes = shared
        with torch.no_grad():
            values.append(loss(features(model, TEXTS, OTHERS), TEACHER))
    assert model[0].prefixes.computed > 0
    torch.testing.assert_close(*values, rtol=0, atol=1e-6)
