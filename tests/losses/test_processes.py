"""Two and four processes are one: loss and gradients of the losses, homogeneous and mixed global batches."""

from functools import partial

import pytest
import torch
from helpers import assert_same_step, features, packing_as_if_large
from torch.nn.parallel import DistributedDataParallel

from tiny import picture
from two_processes import run_ranks
from unime_st import build_encoder
from unime_st.losses import CandidateKLLoss, DistillKLLoss, HardNegativeInfoNCELoss

RED, GREEN = picture("red"), picture("green")
TEXTS = [
    "a bus",
    "two trains",
    "a cat on a tree",
    "a dog",
    "a bus",
    "one",
    "a cat on a tree",
    "eight words are a longer text",
]
BATCHES = {
    # One kind of row on every process; equal inputs within a process and on several.
    "homogeneous": (
        TEXTS,
        ["bus", "train", "cat", "a hound", "bus", "1", "feline", "a dog"],
        ["a dog", "bus", "b", "c", "d", "bus", "e", "f"],
    ),
    # Images, texts and both, in other columns on each process.
    "mixed": (
        [
            "a bus",
            RED,
            "two",
            {"image": GREEN, "text": "what?"},
            "a bus",
            "four",
            {"image": GREEN, "text": "who?"},
            RED,
        ],
        [GREEN, "red", picture("blue"), "words", GREEN, "4", "a person", "crimson"],
        ["one", "words", RED, "b", "c", "d", "e", {"image": RED, "text": "f"}],
    ),
}
TEACHER = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0))
SCORES = torch.rand(8, 2, generator=torch.Generator().manual_seed(1))
SCORES[2, 1] = -1  # this row has no negative
LABELS = {"distillation": TEACHER, "soft labels": SCORES}
LOSSES = {
    "contrastive": (HardNegativeInfoNCELoss, {"temperature": 1.0, "num_hard_negatives": 6}),
    "weighted": (
        HardNegativeInfoNCELoss,
        {
            "temperature": 1.0,
            "num_hard_negatives": 6,
            "directions": ("query_to_doc", "doc_to_query"),
            "hardness_mode": "in_batch_negatives",
            "hardness_strength": 3.0,
        },
    ),
    "distillation": (DistillKLLoss, {"temperature": 0.5}),
    "soft labels": (CandidateKLLoss, {"temperature": 0.2}),
}
MODES = {"plain": {}, "rows": {"mini_batch_size": 2}, "tokens": {"mini_batch_num_tokens": 200}}
CASES = [(batch, loss, mode) for batch in BATCHES for loss in LOSSES for mode in MODES]


def step(folder, case, rows, wrap):
    batch, kind, mode = case
    encoder = build_encoder(folder, device="cpu", peft_config=True).double().train()
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = wrap(encoder)
    cls, options = LOSSES[kind]
    loss = cls(model, **options, **MODES[mode], gather_across_devices=True).train()
    columns = features(encoder, *(column[rows] for column in BATCHES[batch]))
    labels = LABELS[kind][rows] if kind in LABELS else None
    with packing_as_if_large():
        value = loss([dict(column) for column in columns], labels)
        value.backward()
    prefixes = encoder[0].prefixes
    assert 0 < prefixes.computed < prefixes.padded
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    embedded = sum(len(part) for _, part in loss.last_plan.mini_batches)
    return value.detach(), gradients, torch.tensor([loss.last_plan.distinct, embedded])


def job(rank, folder, world):
    own = len(TEXTS) // world
    rows = slice(rank * own, (rank + 1) * own)
    return {str(case): step(folder, case, rows, partial(DistributedDataParallel)) for case in CASES}


@pytest.fixture(scope="module")
def ranks(backbone, tmp_path_factory):
    made = {}

    def of(world):
        if world not in made:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            made[world] = run_ranks(world, job, folder, backbone("llava_next"), world)
        return made[world]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_processes_equal_one(ranks, backbone, case, world):
    one = step(backbone("llava_next"), case, slice(None), lambda model: model)
    results = [result[str(case)] for result in ranks(world)]
    values = torch.stack([result[0] for result in results])
    assert len(set(values.tolist())) == world
    for _, gradients, _ in results:  # averaged, so equal on all
        assert_same_step(one[:2], (values.mean(), gradients), least=10)
    if case[2] != "plain":  # an input that several processes have is embedded by one of them
        assert {int(result[2][0]) for result in results} == {int(one[2][0])}
        assert int(one[2][0]) < 3 * len(TEXTS)
        assert sum(int(result[2][1]) for result in results) <= int(one[2][1]) + world
