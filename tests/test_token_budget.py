"""Budgets told "auto", on a device that is made up: chosen from what passes take, halved where memory runs out."""

import random

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder, token_budget
from unime_st.data import encode_corpus
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config
from unime_st.token_budget import CPU_TOKENS, TokenBudget
from unime_st.training import PairsTraining

ITEMS = [
    *("a red bus", "long " * 60, "a dog", "b", "a bird", "a cat on a mat", "no"),
    *(picture("red"), {"image": picture("white"), "text": "what colour?"}, picture("black")),
    {"image": [picture("red"), picture("green")], "text": "both"},
]
A_TOKEN = 1000  # bytes
LOGGER = "unime_st.token_budget"


class FakeMemory:
    """A device with a number of bytes, on which the passes that `seen` counts take so much a token."""

    def __init__(self, capacity, seen):
        self.capacity, self.seen = capacity, seen
        self.calls = {"start": 0, "release": 0}
        self.since = 0

    def free(self):
        return self.capacity

    def start(self):
        self.calls["start"] += 1
        self.since = len(self.seen)

    def peak(self):
        return A_TOKEN * max(self.seen[self.since :], default=0)

    def release(self):
        self.calls["release"] += 1


class Device:
    """Makes a model run out of memory in passes of more than so many tokens, or in chosen ones."""

    def __init__(self, model, monkeypatch, *, most=10**9, failing=(), capacity=10**9):
        self.seen, self.most, self.failing = [], most, set(failing)
        self.memory = FakeMemory(capacity, self.seen)
        monkeypatch.setattr(token_budget, "memory_of", lambda device: self.memory)
        decoder = model[0].model.get_input_embeddings()
        self.hook = decoder.register_forward_hook(self)

    def __call__(self, _module, args, _output):
        tokens = args[0].numel()
        self.seen.append(tokens)
        if tokens > self.most or len(self.seen) - 1 in self.failing:
            raise torch.OutOfMemoryError("made up")


def test_what_fits_is_chosen_from_what_passes_take(monkeypatch, caplog):
    memory = FakeMemory(10**8, seen := [])
    monkeypatch.setattr(token_budget, "memory_of", lambda _: memory)
    budget = TokenBudget(torch.device("cpu"))
    told = [budget.tokens]
    with caplog.at_level("INFO", logger=LOGGER):
        for _ in range(5):
            budget.start()
            seen.append(budget.tokens)
            budget.learn(budget.tokens)
            told.append(budget.tokens)
    assert told == [2048, 8192, 32768, 80_000, 80_000, 80_000]  # four fifths of 10^8 bytes, 1,000 a token
    assert memory.calls["start"] == 3  # nothing is watched once it is known
    (message,) = [record.message for record in caplog.records if record.name == LOGGER]
    assert "80000 tokens" in message
    memory.capacity = 10**7  # someone else has taken the rest
    budget.start()
    assert budget.tokens == 8000


def test_small_passes_do_not_decide(monkeypatch):
    memory = FakeMemory(10**8, [])
    monkeypatch.setattr(token_budget, "memory_of", lambda _: memory)
    budget = TokenBudget(torch.device("cpu"))
    monkeypatch.setattr(memory, "peak", lambda: 32_000_000)  # a workspace
    budget.learn(10)
    assert budget.tokens == 2048
    monkeypatch.setattr(memory, "peak", lambda: 34_048_000)
    budget.learn(2048)
    assert budget.tokens == int(0.8 * 10**8 / (34_048_000 / 2048))


def test_a_device_that_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r'"auto" measures the memory of CUDA devices.*Give a number'):
        TokenBudget(torch.device("meta"))
    budget = TokenBudget(torch.device("cpu"))
    budget.start()
    budget.learn(10)
    assert budget.tokens == CPU_TOKENS == 1024


def test_cuda_is_asked_for_what_is_free_and_what_was_taken(monkeypatch):
    numbers = {"memory_reserved": 50, "memory_allocated": 30, "max_memory_allocated": 75, "mem_get_info": (100, 200)}
    asked = []
    for name in (*numbers, "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, own=name: asked.append(own) or numbers.get(own))
    memory = token_budget.memory_of(torch.device("cuda", 0))
    assert memory.free() == 120
    memory.start()
    assert asked[-2:] == ["reset_peak_memory_stats", "memory_allocated"]
    assert memory.peak() == 45
    memory.release()
    assert asked[-1] == "empty_cache"


@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_encode_gives_the_same_after_running_out_of_memory(family, backbone, monkeypatch, caplog):
    model = build_encoder(backbone(family), device="cpu")
    expected = model.encode(ITEMS, batch_size=len(ITEMS))
    model[0].vision_cache.clear()
    longest = max(model.preprocess([item])["input_ids"].numel() for item in ITEMS)
    device = Device(model, monkeypatch, most=longest + 1)
    with caplog.at_level("INFO", logger=LOGGER):
        found = model.encode(ITEMS, batch_size=len(ITEMS), batch_num_tokens="auto")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    budget = model[0].token_budget_on(torch.device("cpu"))
    assert budget.halvings > 0
    assert device.memory.calls["release"] == budget.halvings
    told = [record.message for record in caplog.records if record.name == LOGGER]
    assert len(told) == 1
    assert told[0].startswith("Out of memory with")
    count, halvings = len(device.seen), budget.halvings
    np.testing.assert_allclose(model.encode(ITEMS, batch_size=len(ITEMS), batch_num_tokens="auto"), expected, atol=1e-5)
    assert budget.halvings == halvings  # what was learned stays
    assert len(device.seen) > count


@pytest.mark.parametrize("failing", [[0], [1], [2], [0, 1], [0, 2]])
def test_whichever_pass_fails(failing, backbone, monkeypatch):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    expected = model.encode(ITEMS)
    device = Device(model, monkeypatch, failing=failing)
    options = {
        "batch_size": 3 + 8 * (len(failing) > 1),
        "normalize_embeddings": True,
        "num_workers": 2 * (failing == [1]),
    }
    found = model.encode(ITEMS, batch_num_tokens="auto", **options)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert model[0].token_budget_on(torch.device("cpu")).halvings == len(failing)
    assert len(device.seen) > len(failing)


def test_passes_grow_as_far_as_memory_goes(backbone, monkeypatch):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    texts = [f"{number} {'word ' * 20}" for number in range(60)]
    expected = model.encode(texts)
    monkeypatch.setattr(token_budget, "_AT_FIRST", 300)
    device = Device(model, monkeypatch, capacity=1000 * A_TOKEN)
    found = model.encode(texts, batch_size=60, batch_num_tokens="auto")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    tokens = model[0].token_budget_on(torch.device("cpu")).tokens
    assert 300 < tokens <= 800
    assert device.seen[0] < device.seen[1]


def test_one_input_that_does_not_fit_is_an_error(backbone, monkeypatch):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    device = Device(model, monkeypatch, most=60)
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        model.encode(ITEMS, batch_num_tokens="auto")
    assert "forward" not in vars(model[0].model.language_model)
    device.most = 10**9  # and it goes on
    assert len(model.encode(["a cat"], batch_num_tokens="auto")) == 1


def test_corpora_hand_it_on_and_on_a_cpu_it_is_the_default(backbone, tmp_path):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    expected = model.encode(ITEMS)
    np.testing.assert_array_equal(model.encode(ITEMS, batch_num_tokens="auto"), expected)
    corpus = encode_corpus(model, ITEMS, tmp_path / "corpus", batch_num_tokens="auto", model_name="m")
    np.testing.assert_allclose(corpus.rows(range(len(ITEMS))), expected, atol=1e-6)
    again = encode_corpus(model, ITEMS, tmp_path / "corpus", batch_num_tokens=64, model_name="m")  # no other corpus
    assert len(again) == len(ITEMS)


TEXTS = ["a cat", "a cat on a mat", "no", "a dog " * 6, "a cat on the moon, far away", "yes", "a dog there", "two " * 9]
OTHERS = ["the cat", "a dog " * 6, "it is not", "one", "the cat is here", "a mat", "nothing of the kind", "three"]
ANCHORS = [{"image": picture("red"), "text": text} for text in ("what?", "who is it there?")] + [
    *(picture("green", (30, 60)), "a cat", "a dog " * 6, "b", "c", "d"),
]
TEACHER = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0))
LOSSES = {
    "contrast": (HardNegativeInfoNCELoss, {"temperature": 1.0, "num_hard_negatives": 3, "negative_selection": "random"},
                 (ANCHORS, OTHERS), None),
    "distil": (DistillKLLoss, {"temperature": 0.5}, (TEXTS, OTHERS), TEACHER),
}  # fmt: skip


def trained(folder, dropout=0.0):
    model = build_encoder(folder, device="cpu", peft_config=default_lora_config(rank=4, dropout=dropout))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double().train()


def step(model, name, tokens, before=0.0):
    """Loss, gradients added to `before`, metrics, the random state afterwards, and the loss itself."""
    kind, options, columns, labels = LOSSES[name]
    loss = kind(model, **options, mini_batch_num_tokens=tokens).train()
    features = [model.preprocess(list(column)) for column in columns]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, before) if before else None
    torch.manual_seed(7)
    value = loss(features, labels)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return value.detach(), gradients, loss.pop_mean_metrics(), torch.get_rng_state(), loss


def assert_same(found, expected, *, with_values=True):
    if with_values:  # else they are of the first try, which dropped out otherwise
        torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)
    assert found[1].keys() == expected[1].keys()
    assert sum(gradient.abs().max() > 1e-4 for gradient in found[1].values()) > 10
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=0, msg=name)
    assert found[2].keys() == expected[2].keys()
    assert found[2]
    for name, value in expected[2].items() if with_values else ():
        torch.testing.assert_close(found[2][name], value, atol=1e-6, rtol=0, msg=name)
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize("before", [0.0, 0.5], ids=["first", "accumulating"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_that_ran_out_of_memory_is_the_undisturbed_one(name, dropout, before, backbone, monkeypatch):
    """Whichever pass fails, of those without gradients, with them, and in the backward pass of the step."""
    model = trained(backbone("qwen2_vl"), dropout)
    monkeypatch.setattr(token_budget, "_AT_FIRST", 400)
    device = Device(model, monkeypatch)
    undisturbed = step(model, name, "auto", before)[-1].last_plan
    passes = len(device.seen)
    assert passes == 2 * len(undisturbed.mini_batches) - 1 >= 5  # the last keeps its activations
    device.hook.remove()
    for failing in range(passes):
        device = Device(model, monkeypatch, failing=[failing])
        found = step(model, name, "auto", before)
        loss = found[-1]
        device.hook.remove()
        assert loss._budget.halvings == 1
        assert len(device.seen) > passes
        known = not dropout or failing < len(undisturbed.mini_batches)
        assert_same(found, step(model, name, loss._budget.tokens, before), with_values=known)


def test_a_backward_pass_that_fails_half_way_leaves_nothing(backbone, monkeypatch):
    """Memory runs out after gradients of some weights have been made."""
    model = trained(backbone("qwen2_vl"))
    monkeypatch.setattr(token_budget, "_AT_FIRST", 400)
    device = Device(model, monkeypatch)
    weight = model[0].model.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight
    later = model[0].model.language_model.layers[1].self_attn.q_proj.lora_A["default"].weight
    calls = []

    def fail(_):
        calls.append(later.grad is not None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("made up")

    hook = weight.register_hook(fail)
    found = step(model, "distil", "auto", 0.5)
    hook.remove()
    device.hook.remove()
    assert calls[2]  # others had theirs
    assert found[-1]._budget.halvings == 1
    assert_same(found, step(model, "distil", found[-1]._budget.tokens, 0.5))


def test_dimensions_that_are_drawn_are_drawn_again_alike(backbone, monkeypatch):
    """`MatryoshkaLoss` draws them by Python's generator; a step done again has those of its first try."""
    model = trained(backbone("qwen2_vl"))
    loss = DistillKLLoss(model, temperature=0.5, mini_batch_num_tokens="auto").train()
    drawn, decorated = [], MatryoshkaLoss(model, loss, [32, 16, 8, 4], n_dims_per_step=1)
    plain = loss.compute_loss

    def noted(embeddings, targets):
        drawn.append(embeddings[0].shape[1])
        return plain(embeddings, targets)

    loss.compute_loss = noted
    for seed in range(4):
        random.seed(seed)
        loss._budget = None
        value = decorated([model.preprocess(TEXTS), model.preprocess(OTHERS)], TEACHER)
        device = Device(model, monkeypatch, failing=[0])
        value.backward()
        device.hook.remove()
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 1


def test_steps_learn(backbone, monkeypatch):
    model = trained(backbone("qwen2_vl"))
    monkeypatch.setattr(token_budget, "_AT_FIRST", 100)
    device = Device(model, monkeypatch, capacity=400 * A_TOKEN)
    loss = DistillKLLoss(model, temperature=0.5, mini_batch_num_tokens="auto").train()
    counts = []
    for _ in range(4):
        loss([model.preprocess(TEXTS), model.preprocess(OTHERS)], TEACHER).backward()
        counts.append(len(loss.last_plan.mini_batches))
    assert counts[0] > counts[-1]
    assert loss._budget.tokens == pytest.approx(0.8 * 400, rel=0.2)
    assert max(device.seen) <= 400


def test_a_step_of_single_inputs_that_does_not_fit_is_an_error_and_leaves_nothing(backbone, monkeypatch):
    model = trained(backbone("qwen2_vl"))
    loss = DistillKLLoss(model, temperature=0.5, mini_batch_num_tokens="auto").train()
    columns = [model.preprocess(TEXTS), model.preprocess(OTHERS)]
    loss(columns, TEACHER).backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    device = Device(model, monkeypatch, most=10)
    loss._budget = None
    with pytest.raises(torch.OutOfMemoryError):
        loss([model.preprocess(TEXTS), model.preprocess(OTHERS)], TEACHER).backward()
    assert len(device.seen) > 1
    for name, gradient in kept.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_evaluation_is_tried_again_too(backbone, monkeypatch):
    model = trained(backbone("qwen2_vl")).eval()
    loss = DistillKLLoss(model, temperature=0.5, mini_batch_num_tokens="auto").eval()
    values = []
    for failing in ([], [0]):
        loss._budget = None
        device = Device(model, monkeypatch, failing=failing)
        with torch.no_grad():
            values.append(loss([model.preprocess(TEXTS), model.preprocess(OTHERS)], TEACHER))
        device.hook.remove()
    torch.testing.assert_close(*values, atol=1e-6, rtol=0)
    assert loss._budget.halvings == 1


def test_what_may_be_given(backbone, monkeypatch):
    for make in (lambda value: DistillKLLoss(None, temperature=1.0, mini_batch_num_tokens=value),
                 lambda value: PairsTraining(mini_batch_num_tokens=value)):  # fmt: skip
        assert make("auto") is not None
        for bad in ("all", 0, 1.5):
            with pytest.raises((TypeError, ValueError), match="mini_batch_num_tokens"):
                make(bad)
    loss = DistillKLLoss(None, temperature=1.0, mini_batch_num_tokens="auto")
    assert loss.get_config_dict()["mini_batch_num_tokens"] == "auto"
    monkeypatch.setattr("unime_st.distributed.has_process_group", lambda: True)
    model = trained(backbone("qwen2_vl"))
    with pytest.raises(ValueError, match=r"for one process by itself.*Give the number"):
        step(model, "distil", "auto")
