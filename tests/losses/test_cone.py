"""How much alike different inputs are: a number in the logs, and a warning when training does not tell them apart."""

import logging
import math

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import nn
from transformers import TrainerState

from unime_st.losses import HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.losses.cone import STEPS

ROWS, BATCH = 1024, 32
OLD, NEW, ALL = (
    {"num_hard_negatives": 8},
    {"num_hard_negatives": 8, "hard_negatives_warmup_steps": 8},
    {"num_hard_negatives": None},
)


class Cone(nn.Module):
    """Embeddings that are a common direction and a small part that tells inputs apart; pairs share it but for noise."""

    def __init__(self, width=8, dim=16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        meaning, noise = torch.randn(2, ROWS, width, generator=generator)
        self.inputs = torch.cat([meaning, meaning + 3 * noise])
        self.differences = nn.Parameter(0.04 * torch.randn(width, dim, generator=generator) / math.sqrt(width))
        self.common = nn.Parameter(torch.randn(dim, generator=generator) / math.sqrt(dim))

    def forward(self, features):
        return {"sentence_embedding": self.inputs[features["input_ids"][:, 0]] @ self.differences + self.common}


def train(loss, steps=30, *, passes=1, told=True):
    """Train in batches that never repeat; the similarities of positives and of other inputs in each step."""
    optimizer = torch.optim.Adam(loss.model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        loss.global_step = step if told else None
        for _ in range(passes):
            rows = torch.randperm(ROWS, generator=generator)[:BATCH]
            mask = torch.ones(BATCH, 1, dtype=torch.long)
            loss([{"input_ids": ids[:, None], "attention_mask": mask} for ids in (rows, rows + ROWS)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append([float(loss.last_metrics[f"{name}_similarity"]) for name in ("positive", "negative")])
    return found


def told(caplog):
    return [text for text in (record.getMessage() for record in caplog.records) if "embeddings point one way" in text]


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 20}], ids=["plain", "cached"])
@pytest.mark.parametrize("setting", [OLD, NEW, ALL], ids=["k = 8", "all, then k = 8", "all"])
def test_a_cone_that_stays_is_said_once_and_one_that_opens_is_not(caplog, setting, options):
    loss = HardNegativeInfoNCELoss(Cone(), temperature=0.1, **setting, **options).train()
    with caplog.at_level(logging.WARNING):
        found = train(loss)
    assert found[0][1] > 0.8
    if setting is not OLD:
        assert found[-1][1] < 0.2 < found[-1][0]
        assert not caplog.records
        return
    assert found[-1][1] > 0.95
    (text,) = told(caplog)
    assert f"Over {STEPS} training steps different inputs have a mean cosine of 0.9" in text
    for advice in ("hard_negatives_warmup_steps", "`num_hard_negatives=None`", "per_device_train_batch_size"):
        assert advice in text


def test_the_number_of_steps_counts_and_not_that_of_passes(caplog):
    with caplog.at_level(logging.WARNING):
        for steps, passes, step_told in ((STEPS, 3, True), (STEPS, 1, False)):
            train(HardNegativeInfoNCELoss(Cone(), temperature=0.1, **OLD).train(), steps, passes=passes, told=step_told)
            assert not told(caplog)
        for count, step_told in enumerate((True, False), start=1):
            train(HardNegativeInfoNCELoss(Cone(), temperature=0.1, **OLD).train(), STEPS + 1, told=step_told)
            assert len(told(caplog)) == count


def alike(loss, step):
    loss.global_step = step
    loss.compute_loss_from_embeddings([torch.ones(4, 3), torch.ones(4, 3)])
    loss.look_back()


def test_a_loss_that_sees_few_of_the_steps_is_judged_by_as_many(caplog):
    loss = HardNegativeInfoNCELoss(None)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 10 * STEPS, 10):
            alike(loss, step)
        assert not told(caplog)
        alike(loss, 10 * STEPS)
    assert told(caplog)


def test_the_hardest_are_not_blamed_while_all_are_compared(caplog):
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=1, hard_negatives_warmup_steps=3 * STEPS)
    with caplog.at_level(logging.WARNING):
        for step in range(4 * STEPS):
            alike(loss, step)
        assert not told(caplog)
        alike(loss, 4 * STEPS)
    assert f"more than the {3 * STEPS} of now" in told(caplog)[0]


def test_another_training_is_judged_from_its_beginning(caplog):
    loss = HardNegativeInfoNCELoss(None)
    with caplog.at_level(logging.WARNING):
        for step in (*range(STEPS), *range(STEPS)):
            alike(loss, step)
        assert not told(caplog)


def test_evaluation_is_not_judged(caplog):
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=2, margin=None)
    alike = [torch.ones(4, 3), torch.ones(4, 3)]
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2 * STEPS):
            loss.compute_loss_from_embeddings(alike)
            loss.look_back()
    assert not caplog.records


def test_with_all_negatives_the_advice_is_another(caplog):
    loss = HardNegativeInfoNCELoss(None)
    with caplog.at_level(logging.WARNING):
        for _ in range(STEPS + 1):
            loss.compute_loss_from_embeddings([torch.ones(4, 3), torch.ones(4, 3)])
            loss.look_back()
    (text,) = told(caplog)
    assert "whether the learning rate is too low" in text
    assert "hardest" not in text


@pytest.mark.parametrize("seed", range(5))
def test_the_similarity_of_different_inputs_equals_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    labels = torch.randint(0, 5, (7,), generator=generator)
    queries, positives, negatives = (torch.randint(0, 6, (7,), generator=generator) for _ in range(3))
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=1, margin=-0.5)
    loss.compute_loss_from_embeddings(columns, labels, [queries, positives, negatives])
    found, counted = [], 0
    for i in range(7):
        answering = [r for r in range(7) if r == i or labels[r] == labels[i] or queries[r] == queries[i]]
        right = {int(positives[r]) for r in answering} | {int(queries[i])}
        others = [j for j in range(7) if int(positives[j]) not in right]
        similarities = [float(torch.cosine_similarity(columns[0][i], columns[1][j], dim=0)) for j in others]
        found += [sum(similarities) / len(others)] if others else []
        counted += len(others)
    assert 0 < counted < 42
    assert float(loss.last_metrics["negative_similarity"]) == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_steps_in_which_the_learning_rate_rises_are_not_judged(caplog):
    loss = HardNegativeInfoNCELoss(None)
    loss.rising_steps = 5 * STEPS
    with caplog.at_level(logging.WARNING):
        for step in range(6 * STEPS):
            alike(loss, step)
        assert not told(caplog)
        alike(loss, 6 * STEPS)
    assert told(caplog)


def test_the_callback_tells_how_long_the_learning_rate_rises(tmp_path):
    loss = HardNegativeInfoNCELoss(None)
    callback = LossMetricsCallback(loss)
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), warmup_steps=0.25, use_cpu=True)
    callback.on_step_begin(arguments, TrainerState(global_step=3, max_steps=40))
    assert (loss.global_step, loss.rising_steps) == (3, 10)
