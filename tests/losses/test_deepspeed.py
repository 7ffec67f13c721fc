"""DeepSpeed ZeRO-2 on two processes is one process: it takes each parameter's gradient once a step, not once a pass."""

import os

import pytest
import torch
from helpers import features
from test_sharded import ANCHORS, LOSSES, POSITIVES, TEACHER

from two_processes import run_two
from unime_st import build_encoder


def encoder(folder):
    model = build_encoder(folder, device="cpu", peft_config=True).float().train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_of(name, model, gathered):
    cls, options = LOSSES[name]
    return cls(model, **options, gather_across_devices=gathered, mini_batch_size=2).train()


def batch(model, name, rows=slice(None)):
    """Features and label of some rows."""
    label = TEACHER[rows] if name == "distillation" else None
    return [dict(column) for column in features(model, ANCHORS[rows], POSITIVES[rows])], label


def job(rank, folder, name):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda *_: None  # else it compiles for minutes
    deepspeed.init_distributed("gloo", dist_init_required=False)
    model = encoder(folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=torch.optim.SGD(trained, lr=1.0), config=settings
    )
    value = loss_of(name, engine, gathered=True)(*batch(model, name, slice(rank * 4, rank * 4 + 4)))
    engine.backward(value)
    engine.step()
    return {"loss": value.detach(), "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_zero_2_is_a_step_of_one_process(backbone, tmp_path, name):
    first, second = run_two(job, tmp_path, backbone("llava_next"), name)
    model = encoder(backbone("llava_next"))
    value = loss_of(name, model, gathered=False)(*batch(model, name))
    value.backward()
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, value.detach(), rtol=0, atol=1e-6)
    moved = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            moved += int(parameter.grad.abs().max() > 1e-3)
            for rank in (first, second):
                expected = parameter.detach() - parameter.grad
                torch.testing.assert_close(rank["weights"][parameter_name], expected, rtol=0, atol=1e-5)
    assert moved > 10
