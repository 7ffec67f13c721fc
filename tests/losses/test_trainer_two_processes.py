"""The Trainer on two processes with half the batch each ends at the weights of one process with the whole batch."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import ANCHORS, NEGATIVES, POSITIVES
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from two_processes import run_two
from unime_st.losses import HardNegativeInfoNCELoss, LossMetricsCallback


def train(model, per_device, folder, mode):
    model = copy.deepcopy(model)
    loss = HardNegativeInfoNCELoss(
        model,
        num_hard_negatives=4,
        temperature=0.1,
        hard_negatives_warmup_steps=2 if mode == "warmed up" else 0,
        gather_across_devices=True,
        mini_batch_size=2 if mode == "cached" else None,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=per_device,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_drop_last=True,
        ),
        train_dataset=Dataset.from_dict(
            {"anchor": ANCHORS * 2, "positive": POSITIVES + ANCHORS, "negative_1": NEGATIVES * 2}
        ),
        loss=loss,
    )
    LossMetricsCallback.attach(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return dict(model.state_dict()), logs


def job(rank, model, folder, mode):
    weights, logs = train(model, 4, folder, mode)
    return {"weights": weights, "logs": logs}


@pytest.mark.parametrize("mode", ["plain", "cached", "warmed up"])
def test_two_processes_train_as_one(text_model, tmp_path, mode):
    results = run_two(job, tmp_path, text_model, str(tmp_path), mode)
    weights, logs = train(text_model, 8, tmp_path, mode)
    start = text_model.state_dict()
    moved = [name for name, value in weights.items() if (value - start[name]).abs().max() > 1e-3]
    assert len(moved) > 20
    for result in results:
        other_weights, other_logs = result["weights"], result["logs"]
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for event, other in zip(logs, other_logs, strict=True):
            for name in ("loss", "positive_similarity", "negative_similarity", "false_negatives_filtered"):
                assert other[name] == pytest.approx(event[name], abs=2e-4), name
            assert other["rows_without_negatives"] == event["rows_without_negatives"] / 2
