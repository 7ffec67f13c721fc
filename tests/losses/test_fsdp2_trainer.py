"""FSDP2 through the Trainer, on two processes: accelerate starts it on GPUs only, so it is told that it did."""

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.distributed.tensor import DTensor

from two_processes import run_two
from unime_st import build_encoder, load_encoder
from unime_st.losses import HardNegativeInfoNCELoss

QUERIES = [f"find {number}" for number in range(16)]
TARGETS = [f"number {number} " * (1 + number % 3) for number in range(16)]


def train(folder, output, per_device, *, split):
    torch.manual_seed(0)
    model = build_encoder(folder, device="cpu", peft_config=True)
    arguments = SentenceTransformerTrainingArguments(
        str(output), per_device_train_batch_size=per_device, max_steps=3, save_steps=3, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, learning_rate=0.01, dataloader_drop_last=True,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(
        model, temperature=0.5, num_hard_negatives=None, mini_batch_size=2, gather_across_devices=True
    )
    rows = Dataset.from_dict({"query": QUERIES, "target": TARGETS})
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss)
    if split:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
            transformer_cls_names_to_wrap=["Qwen2VLDecoderLayer"], cpu_ram_efficient_loading=False,
        )  # fmt: skip
        trainer.accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        trainer.is_fsdp_enabled = True
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def job(_rank, folder, output):
    model, losses = train(folder, output, 2, split=True)
    return {"losses": losses, "split": sum(isinstance(weight, DTensor) for weight in model.parameters())}


@pytest.mark.slow
def test_the_trainer_splits_weights_trains_as_one_process_and_saves_them_whole(backbone, tmp_path):
    folder = str(backbone("qwen2_vl"))
    told = run_two(job, tmp_path, folder, str(tmp_path / "split"))
    one, losses = train(folder, tmp_path / "one", 4, split=False)
    for each in told:
        assert each["split"] > 20
        assert each["losses"] == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.05
    loaded = dict(load_encoder(tmp_path / "split" / "checkpoint-3", device="cpu").named_parameters())
    trained = {name: weight for name, weight in one.named_parameters() if "lora_" in name}
    assert len(trained) > 20
    for name, weight in trained.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=2e-4, msg=name)
