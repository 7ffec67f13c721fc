"""Two processes with half of the batch each are one process with the whole, on rows of texts and images."""

from functools import partial

import pytest
import torch
from helpers import assert_same_step, features
from packaging import version
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch.nn.parallel import DistributedDataParallel

from tiny import picture
from two_processes import run_two
from unime_st import build_encoder
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.placement import IMAGES

# The first process has images in the targets only, the second in the queries too; a text and an image recur in both.
ANCHORS = ["a bus", "two", "three", picture("white"), "a bus", {"image": picture("black"), "text": "what?"}]
POSITIVES = [picture("green"), "words", picture("red"), "a train", picture("green"), picture("yellow")]
NEGATIVES = ["four", "five", picture("purple"), "six", "seven", "words"]
LOCAL = len(ANCHORS) // 2
PICTURES = [picture("green"), picture("red"), picture("navy"), picture("teal"), picture("gold"), picture("yellow")]
SHOWN_OFTEN = picture("red"), picture("green", (30, 60))
QUESTIONS = [
    {"image": SHOWN_OFTEN[row // 2 % 2], "text": text} for row, text in enumerate(["a", "b", "c", "d", "e", "f"])
]
BATCHES = {
    "mixed": (ANCHORS, POSITIVES, NEGATIVES),
    "images first": (PICTURES, ["green", "red", "navy", "teal", "gold", "yellow"]),
    "images last": (["green", "red", "navy", "teal", "gold", "yellow"], PICTURES),
    "images on one process": (["a", "b", "c", "d", "e", "f"], ["one", "two", "three", *PICTURES[:3]]),
    "images in many rows": (QUESTIONS, ["one", "two", SHOWN_OFTEN[0], "three", "four", SHOWN_OFTEN[1]]),
    "texts": (["a", "b", "c", "d", "e", "f"], ["one", "two", "three", "four", "five", "six"]),
}
MODES = {
    "cached": {"mini_batch_size": 2},  # all weights trained, with GradCache and without
    "whole": {},
    "nested": {},  # in a loss that has its own way to call the model
    "adapters": {},  # the vision tower frozen
}
CASES = [("mixed", mode) for mode in MODES]
CASES += [(batch, mode) for batch in list(BATCHES)[1:] for mode in ("whole", "nested")]
CASES += [("images in many rows", "cached")]


def step(folder, case, rows, wrap):
    batch, mode = case
    encoder = build_encoder(folder, device="cpu", peft_config=mode == "adapters").double()
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = wrap(encoder)
    # The model's norms compute in single precision whatever its weights are, and a low temperature magnifies it.
    loss = HardNegativeInfoNCELoss(
        model, temperature=1.0, num_hard_negatives=3, gather_across_devices=True, **MODES[mode]
    )
    columns = features(encoder, *(column[rows] for column in BATCHES[batch]))
    assert (IMAGES in columns[0]) is (batch == "images in many rows")
    whole = MatryoshkaLoss(encoder, loss, [32, 16]) if mode == "nested" else loss
    whole.model = model  # as the Trainer does
    value = whole(
        [dict(column) for column in columns], None
    )  # as the collator has them: DDP looks into plain dicts only
    value.backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return value.detach(), gradients, loss.last_metrics["false_negatives_by_identity"]


def job(rank, folder):
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    # As the Trainer wraps a model: a process may have no image for its vision tower. Before torch 2.12 a trained CLIP
    # tower that runs twice in a step needs `ddp_broadcast_buffers=False` (docs/limits.md).
    older = version.parse(torch.__version__) < version.parse("2.12")
    wrap = partial(DistributedDataParallel, find_unused_parameters=True, broadcast_buffers=not older)
    return {"-".join(case): step(folder, case, rows, wrap) for case in CASES}


@pytest.fixture(scope="module")
def two_processes(backbone, tmp_path_factory):
    return {
        family: run_two(job, tmp_path_factory.mktemp("ranks"), backbone(family))
        for family in ("llava_next", "qwen2_vl")
    }


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_equal_one(two_processes, backbone, family, case):
    one = step(backbone(family), case, slice(None), lambda model: model)
    first, second = (result["-".join(case)] for result in two_processes[family])
    assert first[0] != second[0]
    for rank in (first, second):  # gradients are averaged, so equal on both
        gradients = {name: gradient for name, gradient in rank[1].items() if name in one[1]}
        assert all(not gradient.any() for name, gradient in rank[1].items() if name not in one[1])
        assert_same_step(one[:2], ((first[0] + second[0]) / 2, gradients), least=10)
    trained = case[1] != "adapters" and case[0] != "texts"
    assert any("vis" in name and gradient.abs().max() > 1e-4 for name, gradient in one[1].items()) == trained


@pytest.mark.parametrize("mode", MODES)
def test_equal_rows_are_found_across_processes(two_processes, backbone, mode):
    one = step(backbone("llava_next"), ("mixed", mode), slice(None), lambda model: model)
    first, second = (result[f"mixed-{mode}"] for result in two_processes["llava_next"])
    # Rows 0 and 4 have one query and one target, row 1's target is row 5's explicit negative: all across processes.
    assert float(one[2]) == pytest.approx((first[2] + second[2]) / 2)
    assert float(first[2]) == pytest.approx(2 / LOCAL)
