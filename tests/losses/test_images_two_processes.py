"""Two processes with half of the batch each are one process with the whole, on rows of texts and images."""

from functools import partial

import pytest
import torch
from helpers import assert_same_step, features
from torch.nn.parallel import DistributedDataParallel

from tiny import picture
from two_processes import run_two
from unime_st import build_encoder
from unime_st.losses import HardNegativeInfoNCELoss

# The first process has images in the targets only, the second in the queries too; a text and an image recur in both.
ANCHORS = ["a bus", "two", "three", picture("white"), "a bus", {"image": picture("black"), "text": "what?"}]
POSITIVES = [picture("green"), "words", picture("red"), "a train", picture("green"), picture("yellow")]
NEGATIVES = ["four", "five", picture("purple"), "six", "seven", "words"]
LOCAL = len(ANCHORS) // 2
MODES = {  # GradCache with all weights trained; the vision tower frozen and the whole batch at once
    "cached": {"mini_batch_size": 2},
    "plain": {},
}


def step(folder, mode, rows, wrap):
    encoder = build_encoder(folder, device="cpu", peft_config=mode == "plain").double()
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = wrap(encoder)
    # The model's norms compute in single precision whatever its weights are, and a low temperature magnifies it.
    loss = HardNegativeInfoNCELoss(
        model, temperature=1.0, num_hard_negatives=3, gather_across_devices=True, **MODES[mode]
    )
    columns = features(encoder, *(column[rows] for column in (ANCHORS, POSITIVES, NEGATIVES)))
    value = loss([dict(column) for column in columns])  # as the collator has them: DDP looks into plain dicts only
    value.backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return value.detach(), gradients, loss.last_metrics["false_negatives_by_identity"]


def job(rank, folder):
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    # As the Trainer wraps a model: a process may have no image for its vision tower.
    wrap = partial(DistributedDataParallel, find_unused_parameters=True)
    return {mode: step(folder, mode, rows, wrap) for mode in MODES}


@pytest.fixture(scope="module")
def two_processes(backbone, tmp_path_factory):
    return run_two(job, tmp_path_factory.mktemp("ranks"), backbone("llava_next"))


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(two_processes, backbone, mode):
    one = step(backbone("llava_next"), mode, slice(None), lambda model: model)
    first, second = (result[mode] for result in two_processes)
    assert first[0] != second[0]
    for rank in (first, second):  # gradients are averaged, so equal on both
        assert_same_step(one, ((first[0] + second[0]) / 2, rank[1]), least=10)
    assert any("vision" in name and gradient.abs().max() > 1e-4 for name, gradient in one[1].items()) == (
        mode == "cached"
    )
    # Rows 0 and 4 have one query and one target, row 1's target is row 5's explicit negative: all across processes.
    assert float(one[2]) == pytest.approx((first[2] + second[2]) / 2)
    assert float(first[2]) == pytest.approx(2 / LOCAL)
