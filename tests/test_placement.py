"""What goes to a device goes once and without waiting; what decides about passes stays at hand."""

import copy
import threading
import time

import pytest
import torch

from unime_st.modules.speed.batches import prepared
from unime_st.placement import IMAGES, NUMBERS, AtHand, moved, ranges, read, sent, with_numbers_at_hand

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Notes what is pinned and what is sent, in place of a GPU."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((*args, kwargs)) or self)
    return calls


def test_to_a_gpu_from_pinned_memory_while_the_cpu_goes_on(gpu):
    sent(torch.ones(3), CUDA)
    assert gpu == ["pinned", (CUDA, {"non_blocking": True})]
    gpu.clear()
    sent(torch.ones(3), torch.device("cpu"))
    assert gpu == [(torch.device("cpu"), {})]


def test_features_are_sent_and_numbers_stay_at_hand(gpu):
    features = {
        "input_ids": torch.arange(6).view(2, 3),
        "prompt": "a text",
        NUMBERS: torch.tensor([[0], [0]]),
        IMAGES: {"pixel_values": torch.ones(4, 5), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    }
    found = moved(features, CUDA)
    assert gpu.count("pinned") == 3  # not the grid, by which pixels are chosen
    assert found["prompt"] == "a text"
    assert read(found, "input_ids") is features["input_ids"]
    assert read(found, NUMBERS) is features[NUMBERS]
    assert read(found, "attention_mask") is None
    assert set(next(value for value in found.values() if isinstance(value, AtHand)).tensors) == {"input_ids", NUMBERS}
    assert read({"input_ids": features["input_ids"]}, "input_ids") is features["input_ids"]
    copied = copy.deepcopy(found)
    assert torch.equal(read(copied, NUMBERS), features[NUMBERS])


def test_numbers_on_a_device_are_read_by_one_copy(monkeypatch):
    features = {
        "input_ids": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False]),
        "pixels": torch.ones(2, 2),
        "scalar": torch.tensor(3),
        IMAGES: {"pixel_values": torch.ones(4, 5), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    }
    copies = []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or plain(self))
    monkeypatch.setattr("unime_st.placement._is_away", lambda _: True)
    found = with_numbers_at_hand(features)
    assert copies == [6 + 2 + 3]
    for name in ("input_ids", "mask"):
        torch.testing.assert_close(found[name], features[name], rtol=0, atol=0)
        assert found[name] is not features[name]
    assert torch.equal(found[IMAGES]["image_grid_thw"], features[IMAGES]["image_grid_thw"])
    assert found[IMAGES]["pixel_values"] is features[IMAGES]["pixel_values"]
    assert found["pixels"] is features["pixels"]


def test_two_batches_are_prepared_at_most():
    """The one that is in use, and the next."""
    made, most = [], 0
    lock = threading.Lock()

    def prepare(batch):
        with lock:
            made.append(batch)
        return batch

    for used, batch in enumerate(prepared(range(8), prepare, ahead=True), 1):
        assert batch == used - 1
        time.sleep(0.02)  # a pass, in which the thread may run ahead
        with lock:
            most = max(most, len(made) - used)
    assert made == list(range(8))
    assert most == 1


def test_ranges_of_none():
    assert ranges(torch.tensor([2, 3]), torch.tensor([], dtype=torch.long)).tolist() == []
