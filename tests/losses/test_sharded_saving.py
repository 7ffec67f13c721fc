"""Weights split over two processes are saved whole, adapters included, by one of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tiny import picture
from two_processes import run_two
from unime_st import build_encoder, export_encoder, load_encoder

ITEMS = ["one", {"image": picture("red"), "text": "what?"}, picture("green"), "two words"]


def model_of(folder, adapters):
    model = build_encoder(folder, device="cpu", peft_config=True if adapters else None).float()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or (not adapters and "language_model" in name and parameter.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def job(rank, backbone, folder, adapters):
    model = model_of(backbone, adapters)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model[0].model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.save_pretrained(folder)
    assert "state_dict" not in vars(model[0].model)
    with pytest.raises(ValueError, match=r"split over processes.*load_encoder"):
        export_encoder(model, Path(folder).parent / "export")
    return {"split": sum(isinstance(parameter, DTensor) for parameter in model.parameters())}


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all weights"])
def test_what_is_saved_is_whole(adapters, backbone, tmp_path):
    source = backbone("llava_next")
    for told in run_two(job, tmp_path, str(source), str(tmp_path / "saved"), adapters):
        assert told["split"] > 20
    model = model_of(source, adapters)
    expected = model.encode(ITEMS)
    assert np.abs(expected - build_encoder(source, device="cpu").encode(ITEMS)).max() > 1e-3
    again = load_encoder(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.encode(ITEMS), expected, atol=1e-5)
    exported = SentenceTransformer(str(export_encoder(again, tmp_path / "exported")), device="cpu")
    np.testing.assert_allclose(exported.encode(ITEMS), expected, atol=1e-5)
