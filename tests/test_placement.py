"""What goes to a device goes once and without waiting; what decides about passes stays at hand."""

import copy
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder, placement
from unime_st.features import select_rows
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
    assert set(next(value for value in found.values() if isinstance(value, AtHand)).pairs) == {"input_ids", NUMBERS}
    assert read({"input_ids": features["input_ids"]}, "input_ids") is features["input_ids"]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))], ids=["copy", "pickle"]
)
def test_what_is_at_hand_is_of_the_same_tensor(again, monkeypatch):
    features = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    monkeypatch.setattr(placement, "sent", lambda value, _: value + 100)  # another tensor, as on a device
    found = again(moved(features, CUDA))
    assert torch.equal(read(found, "input_ids"), features["input_ids"])
    found["input_ids"] = found["input_ids"][[1, 0]]  # as large as before
    assert torch.equal(read(found, "input_ids"), found["input_ids"])
    assert torch.equal(read(found, "attention_mask"), features["attention_mask"])
    assert with_numbers_at_hand(found).keys() == features.keys()


@pytest.mark.parametrize("rows", [[1, 0], [2], [3, 0], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_rows_of_what_was_moved(family, rows, backbone, monkeypatch):
    model = build_encoder(backbone(family), device="cpu")
    red = picture("red")
    items = [{"image": red, "text": "a"}, {"image": red, "text": "what is it?"}, "no image", picture("green")]
    monkeypatch.setattr(placement, "sent", lambda value, _: value.clone())
    features = moved(model.preprocess(items), torch.device("cpu"))
    some = select_rows(features, rows, trim_leading=True)
    assert (IMAGES in features) is (family not in ("idefics3", "smolvlm"))
    assert (IMAGES in some) is (IMAGES in features and rows != [2])
    for key in ("attention_mask", "input_ids", NUMBERS):
        assert key not in some or torch.equal(read(some, key), some[key])
    expected = model.encode([items[row] for row in rows])
    with torch.no_grad():
        np.testing.assert_allclose(model(some)["sentence_embedding"], expected, atol=1e-5)


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
