"""Equal inputs are embedded once and a frozen tower runs once, with the loss and gradients of the naive computation."""

from collections import Counter

import pytest
import torch
from helpers import assert_same_step, features

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules.speed.vision_cache import vision_tower

RED, GREEN = picture("red"), picture("green", (60, 30))
ANCHORS = [
    {"image": RED, "text": "what?"},
    "a cat",
    {"image": RED, "text": "who is it?"},
    "a cat",
    GREEN,
    "a dog there",
]
POSITIVES = [RED, "kitten", "crimson", GREEN, "a cat", {"image": RED, "text": "what?"}]
DISTINCT = 8  # five anchors, and three positives that are not among them
FAST = ("llava_next", "qwen2_vl", "smolvlm")
EVERY_FAMILY = [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
    for family in (*FAMILIES, *PLUGIN_FAMILIES)
]
MODES = {"plain": {}, "rows": {"mini_batch_size": 2}, "tokens": {"mini_batch_num_tokens": 150}}


class Naive(torch.nn.Module):
    """Embeds every input by itself, in a pass of its own, with nothing remembered."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, columns):
        self.model[0].vision_cache.max_bytes = 0
        embeddings = [
            torch.cat([self.model(self.model.preprocess([item]))["sentence_embedding"] for item in column])
            for column in columns
        ]
        ids = [torch.cat([self.model.preprocess([item])["content_id"] for item in column]) for column in columns]
        return self.loss.compute_loss_from_embeddings(embeddings, content_ids=ids)


def encoder(folder, *, frozen):
    model = build_encoder(folder, device="cpu", peft_config=frozen).double().train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics of a batch depend on how it is cut
    return model


def step(loss, model, inputs):
    model.zero_grad(set_to_none=True)
    value = loss(inputs)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen vision", "trained vision"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_loss_and_gradients_are_those_of_the_naive_computation(family, frozen, backbone):
    options = {"num_hard_negatives": 3, "temperature": 1.0}
    model = encoder(backbone(family), frozen=frozen)
    naive = step(Naive(model, HardNegativeInfoNCELoss(None, **options)), model, (ANCHORS, POSITIVES))
    model = encoder(backbone(family), frozen=frozen)
    for mode, bounds in MODES.items():
        loss = HardNegativeInfoNCELoss(model, **options, **bounds)
        ours = step(loss, model, features(model, ANCHORS, POSITIVES))
        assert_same_step(naive, ours, least=10, atol=1e-5)
        assert loss.last_plan.distinct == DISTINCT, mode
        seen = [name for name, gradient in ours[1].items() if "lora_" not in name and gradient.abs().max() > 1e-4]
        assert bool(seen) != frozen


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_frozen_tower_sees_each_image_once_a_step(family, backbone):
    model = encoder(backbone(family), frozen=True)
    cache = model[0].vision_cache
    cache.max_bytes = 64  # too few to keep anything but while a step runs
    seen = Counter()
    tower = vision_tower(model[0].model)
    first = next(module for module in tower.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)))
    first.register_forward_hook(lambda _module, args, _output: seen.update(rows=len(args[0])))
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=3, temperature=1.0, mini_batch_size=2).train()
    pixels = model.preprocess([RED, GREEN])
    with torch.no_grad():
        model(pixels)
    once = seen.pop("rows")
    cache.clear()
    step(loss, model, features(model, ANCHORS, POSITIVES))
    assert seen["rows"] == once
    assert cache._bytes <= 64  # let go of after the step
    step(loss, model, features(model, ANCHORS, POSITIVES))
    assert seen["rows"] == 2 * once


def test_the_language_model_sees_each_distinct_input_once_and_again_but_for_the_last(backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    rows, graphs = [], []

    def count(_module, _args, kwargs, _output):
        rows.append(len(kwargs["inputs_embeds"]))
        graphs.append(torch.is_grad_enabled())

    model[0].model.language_model.register_forward_hook(count, with_kwargs=True)
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=3, temperature=1.0, mini_batch_size=2).train()
    step(loss, model, features(model, ANCHORS, POSITIVES))
    # Five anchors and three positives; the largest mini-batch comes last, and is not embedded again.
    assert sorted(rows[:5]) == [1, 1, 2, 2, 2]
    assert rows[4] == 2
    assert rows[5:] == rows[:4]
    assert graphs == [False] * 4 + [True] * 5
    rows.clear()
    one_pass = HardNegativeInfoNCELoss(model, num_hard_negatives=3, temperature=1.0, mini_batch_size=16).train()
    texts = ["one", "two", "three", "four", "five", "two"]
    step(one_pass, model, features(model, ANCHORS, texts))
    assert rows == [5, 5, 5]  # of two mini-batches the second runs once


def test_one_mini_batch_is_one_pass(backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    calls = []
    model[0].model.language_model.register_forward_hook(lambda *_: calls.append(1))
    loss = DistillKLLoss(model, temperature=0.5, mini_batch_size=8).train()
    model.zero_grad(set_to_none=True)
    loss(features(model, ["one", "two", "three", "one"]), torch.eye(4)).backward()
    assert len(calls) == 1
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_another_instruction_is_another_input(backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=None, temperature=1.0, mini_batch_size=2).train()
    columns = [model.preprocess(["a", "b"]), model.preprocess(["a", "c"], prompt="Say it: ")]
    loss(columns).backward()
    assert loss.last_plan.distinct == 4
    loss([model.preprocess(["a", "b"]), model.preprocess(["a", "c"])]).backward()
    assert loss.last_plan.distinct == 3


def test_a_step_that_is_given_up_holds_nothing(backbone):
    model = encoder(backbone("llava_next"), frozen=True)
    cache = model[0].vision_cache
    cache.max_bytes = 64
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=1000, temperature=1.0, mini_batch_size=2).train()
    with pytest.raises(ValueError, match="Lower it"):
        loss(features(model, ANCHORS, POSITIVES))
    assert cache._bytes <= 64
