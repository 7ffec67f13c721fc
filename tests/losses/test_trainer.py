"""Both losses in sentence-transformers' own Trainer, and their numbers in its logs."""

import pytest
import torch
from datasets import Dataset
from helpers import ANCHORS, NEGATIVES, POSITIVES
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainerCallback

from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback

CONTRAST_METRICS = {
    "positive_similarity",
    "hard_negative_similarity",
    "negative_similarity",
    "false_negatives_filtered",
    "false_negatives_by_margin",
    "false_negatives_by_identity",
    "rows_without_negatives",
}
DISTILL_METRICS = {"teacher_self_probability", "student_self_probability", "nearest_neighbor_agreement"}


def contrast_data():
    return Dataset.from_dict({"anchor": ANCHORS * 2, "positive": POSITIVES * 2, "negative_1": NEGATIVES * 2})


def distill_data():
    teacher = torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"text": ANCHORS + NEGATIVES, "other": POSITIVES * 2, "label": teacher})


class Spy(TrainerCallback):
    """Stands for a tracker, and keeps what the loss reported after each forward pass."""

    def __init__(self, loss):
        self.loss, self.forward_passes, self.logged = loss, [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.forward_passes.append({name: float(value) for name, value in self.loss.last_metrics.items()})

    on_step_end = on_substep_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))


def trainer(model, data, loss, folder, callbacks=(), **arguments):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 12,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": 0.002,
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=data,
        loss=loss,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
@pytest.mark.parametrize("kind", ["contrast", "distill"])
def test_training_lowers_the_loss_and_logs_means_over_accumulation(text_model, tmp_path, kind, options):
    text_model.float()
    if kind == "contrast":
        loss = HardNegativeInfoNCELoss(text_model, num_hard_negatives=3, temperature=0.1, **options)
        data, names = contrast_data(), CONTRAST_METRICS
    else:
        loss, data = DistillKLLoss(text_model, temperature=0.3, **options), distill_data()
        names = DISTILL_METRICS
    spy = Spy(loss)
    run = trainer(text_model, data, loss, tmp_path, [LossMetricsCallback(loss), spy])
    run.train()
    events = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(events) == 12
    assert len(spy.forward_passes) == 48
    assert sum(e["loss"] for e in events[-3:]) < 0.9 * sum(e["loss"] for e in events[:3])
    for index, event in enumerate(events):
        passes = spy.forward_passes[4 * index : 4 * index + 4]  # 2 steps a log event, 2 passes a step
        for name in names:
            assert event[name] == pytest.approx(sum(each[name] for each in passes) / 4, abs=1e-5), name
    assert names <= spy.logged[0].keys()
    assert not names & run.state.log_history[-1].keys()  # the summary at the end is none of its business


def test_attach_reaches_trackers_and_wrapped_losses(text_model, tmp_path):
    inner = HardNegativeInfoNCELoss(text_model.float(), num_hard_negatives=3, mini_batch_size=2)
    loss = MatryoshkaLoss(text_model, inner, [16, 8])
    spy = Spy(inner)
    run = trainer(text_model, contrast_data(), loss, tmp_path, [spy], max_steps=2)
    LossMetricsCallback.attach(run)
    run.train()
    assert spy.logged[0].keys() >= CONTRAST_METRICS


def test_losses_by_data_set_are_told_apart_and_evaluation_does_not_count(text_model, tmp_path):
    text_model.float()
    losses = {
        "nli": DistillKLLoss(text_model, temperature=0.3),
        "mmeb": HardNegativeInfoNCELoss(text_model, num_hard_negatives=3),
    }
    data = {"nli": distill_data(), "mmeb": contrast_data()}
    run = SentenceTransformerTrainer(
        model=text_model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=2,
            num_train_epochs=1,
            logging_steps=8,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        loss=losses,
    )
    LossMetricsCallback.attach(run)
    run.train()
    (event,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert {f"nli_{name}" for name in DISTILL_METRICS} <= event.keys()
    assert {f"mmeb_{name}" for name in CONTRAST_METRICS} <= event.keys()
    assert event["nli_teacher_self_probability"] > 0
    assert all(not loss.pop_mean_metrics() for loss in losses.values())


def test_the_callback_needs_a_loss_with_metrics():
    with pytest.raises(ValueError, match="No loss with metrics in Linear: use one of"):
        LossMetricsCallback(torch.nn.Linear(1, 1))


def test_model_card_shows_the_losses_arguments_and_paper(text_model, tmp_path):
    loss = HardNegativeInfoNCELoss(text_model.float(), num_hard_negatives=3, margin=0.2)
    trainer(text_model, contrast_data(), loss, tmp_path, max_steps=1).train()
    card = text_model._create_model_card
    card(str(tmp_path), train_datasets=None)
    text = (tmp_path / "README.md").read_text()
    assert '"margin": 0.2' in text
    assert "2504.17432" in text


def test_static_embeddings_are_refused_in_mini_batches(text_model):
    static = SentenceTransformer(modules=[StaticEmbedding(text_model.tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match=r"StaticEmbedding.*Leave `mini_batch_size`"):
        HardNegativeInfoNCELoss(static, mini_batch_size=4)
