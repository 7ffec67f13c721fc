"""FSDP2 through the Trainer, on two processes: accelerate starts it on GPUs only, so it is told that it did."""

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from torch.distributed.tensor import DTensor

from two_processes import run_two
from unime_st import build_encoder, load_encoder
from unime_st.checkpoints import CheckpointCallback, ResumingTrainer, last_complete_checkpoint
from unime_st.losses import HardNegativeInfoNCELoss

QUERIES = [f"find {number}" for number in range(16)]
TARGETS = [f"number {number} " * (1 + number % 3) for number in range(16)]


def train(folder, output, per_device, *, split="", resume=None, save_steps=3):
    torch.manual_seed(0)
    model = build_encoder(folder, device="cpu", peft_config=True)
    arguments = SentenceTransformerTrainingArguments(
        str(output), per_device_train_batch_size=per_device, max_steps=3, save_steps=save_steps, logging_steps=1,
        use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.01, dataloader_drop_last=True,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(
        model, temperature=0.5, num_hard_negatives=None, mini_batch_size=2, gather_across_devices=True
    )
    rows = Dataset.from_dict({"query": QUERIES, "target": TARGETS})
    trainer = ResumingTrainer(model, arguments, train_dataset=rows, loss=loss, callbacks=[CheckpointCallback()])
    if split:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=split,
            transformer_cls_names_to_wrap=["Qwen2VLDecoderLayer"], cpu_ram_efficient_loading=False,
        )  # fmt: skip
        for state in (PartialState, trainer.accelerator.state):  # the second copies the first's whenever it is made
            state._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.accelerator.state._shared_state["fsdp_plugin"] = plugin
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def job(_rank, folder, output):
    model, losses = train(folder, output, 2, split="FULL_STATE_DICT")
    return {"losses": losses, "split": sum(isinstance(weight, DTensor) for weight in model.parameters())}


@pytest.mark.slow
def test_the_trainer_splits_weights_trains_as_one_process_and_saves_them_whole(backbone, tmp_path):
    folder = str(backbone("qwen2_vl"))
    told = run_two(job, tmp_path, folder, str(tmp_path / "split"))
    one, losses = train(folder, tmp_path / "one", 4)
    for each in told:
        assert each["split"] > 20
        assert each["losses"] == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.05
    loaded = dict(load_encoder(tmp_path / "split" / "checkpoint-3", device="cpu").named_parameters())
    trained = {name: weight for name, weight in one.named_parameters() if "lora_" in name}
    assert len(trained) > 20
    for name, weight in trained.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=2e-4, msg=name)


def again(_rank, folder, output, kind):
    """A run of three steps, and one that goes on from the second, in the same processes."""
    found = {}
    for name, resume in (("whole", None), ("resumed", f"{output}/whole/checkpoint-2")):
        model, losses = train(folder, f"{output}/{name}", 2, split=kind, resume=resume, save_steps=2)
        weights = {name: weight.full_tensor() for name, weight in model.named_parameters() if "lora_" in name}
        found[name] = {"losses": losses, "weights": weights}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_run_of_two_processes_goes_on_from_its_checkpoint_to_the_same_weights(backbone, tmp_path, kind):
    for told in run_two(again, tmp_path, str(backbone("qwen2_vl")), str(tmp_path), kind):
        whole, resumed = told["whole"], told["resumed"]
        assert whole["losses"] == resumed["losses"]
        assert len(whole["weights"]) > 20
        for name, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
    assert last_complete_checkpoint(tmp_path / "whole") == tmp_path / "whole" / "checkpoint-3"
