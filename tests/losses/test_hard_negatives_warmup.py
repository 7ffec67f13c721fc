"""All negatives first, then the hardest: by the Trainer's steps, however a step is split, and stopped and resumed."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import ANCHORS, NEGATIVES, POSITIVES, assert_same_step, run
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import TrainerCallback

from unime_st.losses import HardNegativeInfoNCELoss, LossMetricsCallback

COLUMNS = (ANCHORS, POSITIVES, NEGATIVES)
WARMUP = {"num_hard_negatives": 2, "hard_negatives_warmup_steps": 4, "temperature": 0.1}


class Stopped(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == self.step:
            raise Stopped


class Spying(HardNegativeInfoNCELoss):
    """Keeps the step and the number of negatives of each pass."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.kept = []

    def _negatives_to_keep(self):
        k = super()._negatives_to_keep()
        self.kept.append((self.global_step, k))
        return k


def train(model, folder, *callbacks, wrap=lambda model, loss: loss, resume=False, options=None, **arguments):
    model = copy.deepcopy(model).float()
    loss = Spying(model, **WARMUP, **(options or {}))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            report_to="none",
            learning_rate=0.01,
            use_cpu=True,
            disable_tqdm=True,
            **{"per_device_train_batch_size": 4, "max_steps": 8, "save_steps": 2, "logging_steps": 1, **arguments},
        ),
        train_dataset=Dataset.from_dict(dict(zip(("anchor", "positive", "negative_1"), COLUMNS, strict=True))),
        loss=wrap(model, loss),
        callbacks=list(callbacks),
    )
    LossMetricsCallback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert loss.global_step is None  # another training begins anew
    logs = [{n: v for n, v in entry.items() if "similarity" in n} for entry in trainer.state.log_history]
    return loss.kept, [entry for entry in logs if entry], model.state_dict()


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}], ids=["plain", "cached"])
def test_the_first_steps_compare_with_all_and_the_others_with_the_hardest(text_model, options):
    loss = HardNegativeInfoNCELoss(text_model, **WARMUP, **options)
    for step, k in ((0, None), (3, None), (4, 2), (100, 2)):
        loss.global_step = step
        alone = HardNegativeInfoNCELoss(text_model, num_hard_negatives=k, temperature=0.1, **options)
        assert_same_step(run(loss, text_model, COLUMNS), run(alone, text_model, COLUMNS))


def test_evaluation_compares_with_the_hardest_and_needs_no_step():
    columns = [torch.randn(9, 4, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    values = []
    for options in (WARMUP, WARMUP | {"hard_negatives_warmup_steps": 0}):
        for loss in (HardNegativeInfoNCELoss(None, **options), HardNegativeInfoNCELoss(None, **options).eval()):
            with torch.set_grad_enabled(not loss.training):
                values.append(loss.compute_loss_from_embeddings(columns).item())
    assert len(set(values)) == 1


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}], ids=["plain", "cached"])
def test_a_step_that_nobody_tells_is_refused(text_model, options):
    advice = r"nobody tells the loss.*LossMetricsCallback\(loss\).*loss.global_step"
    with pytest.raises(ValueError, match=advice):
        run(HardNegativeInfoNCELoss(text_model, **WARMUP, **options), text_model, COLUMNS)


def test_a_few_of_a_small_batch_are_not_warned_of_after_all(caplog):
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=8, hard_negatives_warmup_steps=8)
    loss.global_step = 0
    loss.compute_loss_from_embeddings([torch.randn(32, 8), torch.randn(32, 8)])
    assert not caplog.records


def matryoshka(model, loss):
    return MatryoshkaLoss(model, loss, [16, 8])


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
@pytest.mark.parametrize(
    ("passes", "arguments"),
    [
        (1, {}),
        (2, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        (2, {"wrap": matryoshka}),
    ],
    ids=["whole", "accumulated", "matryoshka"],
)
def test_a_step_counts_once(text_model, tmp_path, options, passes, arguments):
    kept, *_ = train(text_model, tmp_path, options=options, save_strategy="no", **arguments)
    assert kept == [(step, None if step < 4 else 2) for step in range(8) for _ in range(passes)]


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}], ids=["plain", "cached"])
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_is_one_that_was_never_stopped(text_model_with_dropout, tmp_path, stop, options):
    kept, logs, weights = train(text_model_with_dropout, tmp_path / "whole", options=options)
    with pytest.raises(Stopped):
        train(text_model_with_dropout, tmp_path / "stopped", StopAt(stop), options=options)
    rest, resumed_logs, resumed = train(text_model_with_dropout, tmp_path / "stopped", resume=True, options=options)
    first = (stop - 1) // 2 * 2  # checkpoints are of even steps; a step is stopped before it is saved
    assert [step for step, _ in kept] == list(range(8))
    assert rest == kept[first:]
    assert resumed_logs == logs
    start = text_model_with_dropout.state_dict()
    assert sum((value - start[name]).abs().max() > 1e-3 for name, value in weights.items()) > 20
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
