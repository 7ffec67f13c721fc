"""The loss over a row's own candidates: cached as plain, wrapped, beside another loss, and what it refuses."""

import logging

import pytest
import torch
from datasets import Dataset
from helpers import ANCHORS, NEGATIVES, POSITIVES, assert_same_step, features, run
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MatryoshkaLoss
from sentence_transformers.util import pairwise_cos_sim

from unime_st.losses import CandidateKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback

COLUMNS = [ANCHORS, POSITIVES, NEGATIVES, ANCHORS[::-1]]
CACHED = [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 30}]


def scores(rows=8, candidates=3, missing=()):
    found = torch.rand(rows, candidates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for place in missing:
        found[place] = -1
    return found


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("direction", ["symmetric", "teacher_student", "student_teacher"])
def test_cached_equals_plain(text_model, options, direction):
    labels = scores(missing=[(1, 1), (1, 2), (4, 2)])
    steps = [
        run(CandidateKLLoss(text_model, temperature=0.2, direction=direction, **more), text_model, COLUMNS, labels)
        for more in ({}, options)
    ]
    assert_same_step(*steps, atol=1e-12)


@pytest.mark.parametrize("options", [{}, *CACHED], ids=str)
def test_rows_of_fewer_candidates_are_as_if_alone(text_model, options):
    """What stands in the place of a missing candidate changes nothing, and costs nothing if it is the positive."""
    labels = scores(missing=[(row, 2) for row in range(8)])
    loss = CandidateKLLoss(text_model, temperature=0.2, **options)
    filled = run(loss, text_model, [*COLUMNS[:3], POSITIVES], labels)
    assert loss.last_plan.distinct == len({*ANCHORS, *POSITIVES, *NEGATIVES})
    assert_same_step(filled, run(loss, text_model, COLUMNS, labels), atol=1e-12)
    assert_same_step(filled, run(loss, text_model, COLUMNS[:3], labels[:, :2].clone()), atol=1e-12)


def test_it_is_the_stock_loss_in_one_direction(text_model):
    ours = run(CandidateKLLoss(text_model, temperature=0.2, direction="teacher_student"), text_model, COLUMNS, scores())
    theirs = DistillKLDivLoss(text_model, similarity_fct=pairwise_cos_sim, temperature=0.2)
    value, gradients = run(theirs, text_model, COLUMNS, scores())
    square = 0.2**2
    assert_same_step(ours, (value / square, {name: g / square for name, g in gradients.items()}), atol=1e-10)


@pytest.mark.parametrize("options", [{}, *CACHED], ids=str)
def test_matryoshka_equals_the_sum_over_dimensions(text_model, options):
    wrapped = MatryoshkaLoss(text_model, CandidateKLLoss(text_model, temperature=0.2, **options), [16, 8], [1.0, 0.5])
    first = run(wrapped, text_model, COLUMNS, scores())
    loss = CandidateKLLoss(None, temperature=0.2)
    text_model.zero_grad(set_to_none=True)
    embedded = [text_model(f)["sentence_embedding"] for f in features(text_model, *COLUMNS)]
    value = sum(
        weight * loss.compute_loss_from_embeddings([column[:, :dim] for column in embedded], scores())
        for dim, weight in ((16, 1.0), (8, 0.5))
    )
    value.backward()
    gradients = {name: p.grad.clone() for name, p in text_model.named_parameters() if p.grad is not None}
    assert_same_step(first, (value.detach(), gradients), atol=1e-10)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angles = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64)
    others = [torch.stack([angle.cos(), angle.sin()])[None].requires_grad_() for angle in angles]
    loss = CandidateKLLoss(None)
    value = loss.compute_loss_from_embeddings([query, *others], angles.cos()[None])
    value.backward()
    assert abs(value.item()) < 1e-12
    assert all(other.grad.abs().max() < 1e-10 for other in others)
    assert float(loss.last_metrics["best_candidate_agreement"]) == 1
    assert float(loss.last_metrics["candidates_per_row"]) == 3


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
def test_rows_without_scores_train_with_another_loss_in_the_same_run(text_model, tmp_path, options):
    text_model.float()
    judged = Dataset.from_dict(
        {"anchor": ANCHORS, "positive": POSITIVES, "negative_1": NEGATIVES, "label": scores(8, 2, [(3, 1)]).tolist()}
    )
    pairs = Dataset.from_dict({"anchor": NEGATIVES, "positive": ANCHORS})
    losses = {
        "judged": CandidateKLLoss(text_model, temperature=0.2, **options),
        "pairs": HardNegativeInfoNCELoss(text_model, **options),
    }
    before = {name: p.detach().clone() for name, p in text_model.named_parameters()}
    trainer = SentenceTransformerTrainer(
        model=text_model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=12, logging_steps=4, save_strategy="no",
            report_to="none", learning_rate=0.002, use_cpu=True, disable_tqdm=True,
        ),
        train_dataset={"judged": judged, "pairs": pairs},
        loss=losses,
        callbacks=[LossMetricsCallback(losses)],
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]
    told = {name for log in logs for name in log}
    assert {f"judged_{name}" for name in CandidateKLLoss.metric_names} <= told
    assert "pairs_positive_similarity" in told
    assert any(not torch.equal(before[name], p) for name, p in text_model.named_parameters())


def broken(row, column, value):
    labels = scores()
    labels[row, column] = value
    return labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (broken(5, 2, float("nan")), r"row 5, column 2 of the label \(negative 2, '.*'\) is nan, and 0 more"),
        (broken(3, 1, 1.5), r"row 3, column 1 of the label \(negative 1, '.*'\) is 1\.5.*sigmoid"),
        (broken(0, 1, -0.25), r"row 0, column 1 .* is -0\.25"),
        (broken(2, 0, float("inf")), r"row 2, column 0 of the label \(the positive, '.*'\) is inf"),
        (broken(7, 0, -1.0), r"row 7, column 0 of the label \(the positive, .* is -1.*a positive cannot have"),
        (scores(8, 2), r"shape \(8, 2\).*each of the 3 candidate columns.*floats of shape \(8, 3\)"),
        (scores(8, 4), r"shape \(8, 4\).*each of the 3 candidate columns"),
        (scores(5, 3), "scores of 5 rows, but the embeddings have 8"),
        (scores()[:, 0], r"shape \(8,\)"),
        (torch.ones(8, 3).long(), r"torch\.int64"),
        (None, r"no label.*HardNegativeInfoNCELoss"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=["plain", "cached"])
def test_bad_scores_are_named_before_the_model_runs(text_model, labels, message, options):
    loss = CandidateKLLoss(text_model, **options)
    columns = features(text_model, *COLUMNS)
    text_model.forward = lambda *_: pytest.fail("the model ran first")
    with pytest.raises(ValueError, match=message):
        loss(columns, labels)


def test_too_few_columns(text_model):
    with pytest.raises(ValueError, match=r"needs the columns .*, got 2 column"):
        CandidateKLLoss(text_model)(features(text_model, *COLUMNS[:2]), scores(8, 1))
    with pytest.raises(ValueError, match="Queries, positives and negatives must be"):
        CandidateKLLoss(None).compute_loss_from_embeddings([torch.ones(2, 3)] * 2, scores(2, 1))


def test_rows_without_any_negative_are_said_once(text_model, caplog):
    loss = CandidateKLLoss(text_model).train()
    labels = scores(missing=[(row, column) for row in range(8) for column in (1, 2)])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss(features(text_model, *COLUMNS), labels).backward()
    (record,) = caplog.records
    assert "8 row(s) have a positive and no negative" in record.getMessage()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"teacher_temperature": -1.0}, "teacher_temperature=-1"),
        ({"direction": "both"}, "direction='both'"),
        ({"mini_batch_size": 0}, "mini_batch_size=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CandidateKLLoss(None, **arguments)


def test_config_and_citation():
    told = CandidateKLLoss(None, teacher_temperature=0.05).get_config_dict()
    assert told["temperature"] == 0.02
    assert told["teacher_temperature"] == 0.05
    assert told["direction"] == "symmetric"
    assert "2510.13515" in CandidateKLLoss(None).citation
