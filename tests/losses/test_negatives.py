"""The number of negatives that training starts with, and the launch mistakes that make it smaller."""

from types import SimpleNamespace

import pytest
import torch

from unime_st.losses import CandidateKLLoss, DistillKLLoss, HardNegativeInfoNCELoss, effective_negatives


def arguments(**changes):
    """What is read of the Trainer's arguments."""
    usual = {"world_size": 1, "n_gpu": 1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    return SimpleNamespace(**{**usual, "device": torch.device("cpu"), **changes})


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("gathered", "number"), [(True, 8 * 16 * 3 - 1), (False, 16 * 3 - 1)])
def test_rows_of_all_processes_count_when_they_are_gathered(gathered, number):
    loss = HardNegativeInfoNCELoss(None, gather_across_devices=gathered)
    found = effective_negatives(loss, arguments(world_size=8), candidates_a_row=3)
    assert found.number == number
    assert bool(found.warnings) != gathered


def test_nothing_is_wrong_with_one_process():
    assert effective_negatives(DistillKLLoss(None, temperature=0.1), arguments()) == (15, 16, 1, ())


def test_a_row_compared_with_its_own_candidates_has_as_many_whatever_the_batch():
    found = effective_negatives(CandidateKLLoss(None), arguments(world_size=8), candidates_a_row=9)
    assert found == (8, 16, 8, ())


MISTAKES = {
    "gather_across_devices=True": {"world_size": 4, "per_device_train_batch_size": 128},
    "--num_processes 2": {"n_gpu": 2, "per_device_train_batch_size": 128},
    "GradCache": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 128},
    "is more than the 3 there are": {"per_device_train_batch_size": 4},
    "keeps a few of only 31 candidates": {"per_device_train_batch_size": 32},
}


@pytest.mark.parametrize("advice", MISTAKES)
def test_each_mistake_is_told_with_what_to_do(advice):
    found = effective_negatives(HardNegativeInfoNCELoss(None, num_hard_negatives=8), arguments(**MISTAKES[advice]))
    assert len(found.warnings) == 1
    assert advice in found.warnings[0]


def test_a_few_after_all_are_no_mistake():
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=8, hard_negatives_warmup_steps=8)
    assert effective_negatives(loss, arguments(per_device_train_batch_size=32)).warnings == ()


def test_a_process_that_should_not_be_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    (warning,) = effective_negatives(HardNegativeInfoNCELoss(None), arguments()).warnings
    assert "8 processes" in warning
    assert "torchrun" in warning
    assert (
        effective_negatives(HardNegativeInfoNCELoss(None, gather_across_devices=True), arguments(world_size=8)).warnings
        == ()
    )


def test_idle_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (warning,) = effective_negatives(HardNegativeInfoNCELoss(None), arguments(device=torch.device("cuda"))).warnings
    assert warning.startswith("4 devices are there")
