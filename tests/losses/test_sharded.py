"""Weights split over two processes, as FSDP2 does, with processes that have unequally much to embed."""

import pytest
import torch
from helpers import assert_same_step, features, packing_as_if_large
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tiny import picture
from two_processes import run_two
from unime_st import build_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss

# The second process has two distinct inputs, the first eight: both must gather the weights as often.
ANCHORS = [picture("red"), "one", "two", {"image": picture("green"), "text": "what?"}, "a", "a", "a", "a"]
POSITIVES = ["three", picture("blue"), "four", "five", "b", "b", "b", "b"]
LOSSES = {
    "contrastive": (HardNegativeInfoNCELoss, {"temperature": 1.0, "num_hard_negatives": 3}),
    "distillation": (DistillKLLoss, {"temperature": 0.5}),
}
TEACHER = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0))
CASES = [(name, gathered) for name in LOSSES for gathered in (True, False)]


def step(folder, case, rows, sharded):
    name, gathered = case
    model = build_encoder(folder, device="cpu", peft_config=True).double().train()
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model[0].model.language_model.layers:  # as examples/accelerate/fsdp2.yaml has it, and why
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model[0].share_prefixes = sharded  # compared with padded rows
    cls, options = LOSSES[name]
    loss = cls(model, **options, gather_across_devices=gathered, mini_batch_size=2).train()
    with packing_as_if_large():
        value = loss(features(model, ANCHORS[rows], POSITIVES[rows]), TEACHER[rows] if name == "distillation" else None)
        value.backward()
    whole = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    split = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    encoder = model[0]
    told = [split, len(loss.last_plan.mini_batches), encoder.vision_cache.misses]
    return value.detach(), whole, torch.tensor([*told, encoder.prefixes.computed, encoder.prefixes.padded])


def job(rank, folder):
    rows = slice(rank * 4, rank * 4 + 4)
    return {str(case): step(folder, case, rows, sharded=True) for case in CASES}


@pytest.fixture(scope="module")
def two_processes(backbone, tmp_path_factory):
    return run_two(job, tmp_path_factory.mktemp("ranks"), backbone("llava_next"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sharded_weights_get_the_gradients_of_one_process(two_processes, backbone, case):
    first, second = (result[str(case)] for result in two_processes)
    if case[1]:
        one = step(backbone("llava_next"), case, slice(None), sharded=False)
        expected = one[:2]
        assert first[2][2] + second[2][2] == one[2][2] > 0  # the frozen tower ran once, sharded or not
    else:  # each process by itself, gradients averaged
        halves = [step(backbone("llava_next"), case, rows, sharded=False) for rows in (slice(4), slice(4, None))]
        means = {name: (halves[0][1][name] + halves[1][1][name]) / 2 for name in halves[0][1]}
        expected = (halves[0][0] + halves[1][0]) / 2, means
    for _, gradients, told in (first, second):
        assert_same_step(expected, ((first[0] + second[0]) / 2, gradients), least=10)
        assert told[0] > 20  # parameters are split
    assert first[2][1] == second[2][1] >= 2
    assert 0 < first[2][3] + second[2][3] < first[2][4] + second[2][4]  # packed
