"""Soft labels with images among the candidates: all families, nested dimensions, GradCache, and two processes."""

import pytest
import torch
from helpers import assert_same_step, features
from packaging import version
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch.nn.parallel import DistributedDataParallel

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from two_processes import run_two
from unime_st import build_encoder
from unime_st.losses import CandidateKLLoss

RED, GREEN, WIDE = picture("red"), picture("green"), picture("white", (60, 20))
# The first process has no image in its positives; a picture recurs in both; the cell of a missing negative holds the
# row's positive, as `load_judged_negatives` fills it.
POSITIVES = ["a bus", "two", {"image": GREEN, "text": "this"}, WIDE]
COLUMNS = [
    [{"image": RED, "text": "what?"}, "a boat", RED, "where?"],
    POSITIVES,
    [GREEN, "three", "a car", {"image": RED, "text": "that"}],
    [WIDE, POSITIVES[1], RED, POSITIVES[3]],
    [POSITIVES[0], POSITIVES[1], "a tree", POSITIVES[3]],
]
SCORES = torch.tensor([[0.9, 0.2, 0.1, -1], [0.8, 0.4, -1, -1], [0.7, 0.1, 0.3, 0.2], [0.9, 0.6, -1, -1]]).double()
LOCAL = len(SCORES) // 2
MODES = {"plain": {}, "inputs": {"mini_batch_size": 2}, "tokens": {"mini_batch_num_tokens": 80}}


def encoder_of(folder, adapters=False):
    encoder = build_encoder(folder, device="cpu", peft_config=adapters).double()
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def step(encoder, mode, *, rows=slice(None), nested=False, wrap=lambda model: model):
    encoder.zero_grad(set_to_none=True)
    model = wrap(encoder)
    loss = CandidateKLLoss(model, temperature=0.3, **MODES[mode])
    columns = features(encoder, *(column[rows] for column in COLUMNS))
    whole = MatryoshkaLoss(encoder, loss, [32, 16], [1.0, 0.5]) if nested else loss
    whole.model = model  # as the Trainer does
    value = whole([dict(column) for column in columns], SCORES[rows])
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def by_hand(encoder, dims=((32, 1.0),)):
    """The loss by plain arithmetic, each input embedded by itself, and its gradients."""
    encoder.zero_grad(set_to_none=True)
    total = 0
    for row in range(len(SCORES)):
        there = [0, *(1 + place for place in range(SCORES.shape[1]) if SCORES[row, place] >= 0)]
        own = [encoder(encoder.preprocess([COLUMNS[place][row]]))["sentence_embedding"][0] for place in there]
        judged = (SCORES[row][[place - 1 for place in there[1:]]] / 0.3).softmax(dim=0)
        for dim, weight in dims:
            cosines = torch.stack([torch.cosine_similarity(own[0][:dim], other[:dim], dim=0) for other in own[1:]])
            student = (cosines / 0.3).softmax(dim=0)
            divergence = ((judged - student) * (judged.log() - student.log())).sum() / 2
            total = total + weight * divergence / len(SCORES)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_every_family_learns_scores_of_images_and_texts(backbone, family):
    encoder = encoder_of(backbone(family)).eval()  # batch normalisation of a trained tower sees the batch
    expected = by_hand(encoder)
    # Their norms and rotary positions compute in single precision, whatever the weights are.
    for mode in MODES:
        assert_same_step(step(encoder, mode), expected, least=20, atol=1e-5)
    assert any("vis" in name and gradient.abs().max() > 1e-5 for name, gradient in expected[1].items())


@pytest.mark.parametrize("mode", MODES)
def test_nested_dimensions_by_hand(backbone, mode):
    encoder = encoder_of(backbone("qwen2_vl"))
    expected = by_hand(encoder, dims=((32, 1.0), (16, 0.5)))
    assert_same_step(step(encoder, mode, nested=True), expected, least=20, atol=1e-6)


def wrapped(encoder):
    """As the Trainer does, with `ddp_broadcast_buffers=False` where torch needs it (docs/limits.md)."""
    older = version.parse(torch.__version__) < version.parse("2.12")
    model = DistributedDataParallel(encoder, find_unused_parameters=True, broadcast_buffers=not older)
    model.get_embedding_dimension = encoder.get_embedding_dimension
    return model


def job(rank, folder):
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    found = {}
    for adapters in (False, True):
        encoder = encoder_of(folder, adapters)
        for mode in MODES:
            for nested in (False, True):
                found[f"{mode} {nested} {adapters}"] = step(encoder, mode, rows=rows, nested=nested, wrap=wrapped)
    return found


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_two_processes_are_one_nested_and_cached(backbone, tmp_path, family):
    ranks = run_two(job, tmp_path, backbone(family))
    assert len(ranks[0]) == 12
    for adapters in (False, True):
        encoder = encoder_of(backbone(family), adapters)
        for mode in MODES:
            for nested in (False, True):
                one = step(encoder, mode, nested=nested)
                first, second = (rank[f"{mode} {nested} {adapters}"] for rank in ranks)
                assert first[0] != second[0]
                for rank in (first, second):
                    gradients = {name: gradient for name, gradient in rank[1].items() if name in one[1]}
                    both = ((first[0] + second[0]) / 2, gradients)
                    assert_same_step(one, both, least=10)
