import logging
import re

import pytest
import torch
from helpers import ANCHORS, NEGATIVES, POSITIVES, assert_same_step, features, run
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from unime_st.losses import DistillKLLoss

DIRECTIONS = ["teacher_student", "student_teacher", "symmetric"]


def teacher(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mini_batch_size": 1}, {"mini_batch_size": 3}, {"mini_batch_num_tokens": 16}])
@pytest.mark.parametrize("diagonal", [True, False])
def test_cached_equals_plain(text_model, options, diagonal):
    columns, labels = (ANCHORS, POSITIVES, NEGATIVES), teacher(8, 3, 24)
    arguments = {"temperature": 0.2, "include_diagonal": diagonal}
    plain = run(DistillKLLoss(text_model, **arguments), text_model, columns, labels)
    cached = run(DistillKLLoss(text_model, **arguments, **options), text_model, columns, labels)
    assert_same_step(plain, cached)


def test_columns_are_one_batch(text_model):
    labels = teacher(8, 2, 24)
    loss = DistillKLLoss(text_model, temperature=0.2, direction="symmetric")
    two = run(loss, text_model, (ANCHORS, POSITIVES), labels)
    one = run(loss, text_model, (ANCHORS + POSITIVES,), torch.cat([labels[:, 0], labels[:, 1]]))
    assert_same_step(two, one)


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_equals_the_sum_over_dimensions(text_model, cached):
    options = {"mini_batch_size": 3} if cached else {}
    labels = teacher(8, 24)
    wrapped = MatryoshkaLoss(text_model, DistillKLLoss(text_model, temperature=0.2, **options), [16, 8], [1.0, 0.5])

    class Sum(torch.nn.Module):
        def forward(self, columns, labels):
            embedding = text_model(columns[0])["sentence_embedding"]
            inner = DistillKLLoss(None, temperature=0.2)
            return inner.compute_loss_from_embeddings([embedding], labels) + 0.5 * inner.compute_loss_from_embeddings(
                [embedding[:, :8]], labels
            )

    assert_same_step(run(Sum(), text_model, (ANCHORS,), labels), run(wrapped, text_model, (ANCHORS,), labels))


def test_single_column_accepts_both_ranks():
    embeddings, labels = [teacher(5, 4, seed=1)], teacher(5, 6)
    loss = DistillKLLoss(None, temperature=0.1)
    torch.testing.assert_close(
        loss.compute_loss_from_embeddings(embeddings, labels),
        loss.compute_loss_from_embeddings(embeddings, labels[:, None]),
        rtol=0,
        atol=0,
    )


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("diagonal", [True, False])
def test_student_equal_to_the_teacher_has_no_loss_and_no_gradient(direction, diagonal):
    student = teacher(6, 4).requires_grad_()
    loss = DistillKLLoss(None, temperature=0.1, direction=direction, include_diagonal=diagonal)
    value = loss.compute_loss_from_embeddings([student], 3.0 * student.detach())
    value.backward()
    assert abs(value.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert float(loss.last_metrics["nearest_neighbor_agreement"]) == 1


@pytest.mark.parametrize("diagonal", [True, False])
def test_one_text_alone_is_finite(diagonal):
    student = teacher(1, 4).requires_grad_()
    value = DistillKLLoss(None, temperature=0.1, include_diagonal=diagonal).compute_loss_from_embeddings(
        [student], teacher(1, 6)
    )
    value.backward()
    assert value.item() == 0
    assert torch.count_nonzero(student.grad) == 0


def test_directions_differ_and_symmetric_is_their_mean():
    values = [
        DistillKLLoss(None, temperature=0.1, direction=direction)
        .compute_loss_from_embeddings([teacher(6, 4)], teacher(6, 9, seed=1))
        .item()
        for direction in DIRECTIONS
    ]
    assert abs(values[0] - values[1]) > 0.01
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)


# --- the saturated teacher --------------------------------------------------------------------------------------------


def test_saturated_teacher_warns_once_with_the_measure_and_a_cure(caplog):
    embeddings, labels = [teacher(16, 8)], teacher(16, 300, seed=1)
    loss = DistillKLLoss(None, temperature=0.02)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss.compute_loss_from_embeddings(embeddings, labels)
    (record,) = caplog.records
    assert re.search(r"1\.0000 of its probability.*include_diagonal=False", record.getMessage())
    cure = float(re.search(r"one half at ([\d.e-]+)", record.getMessage()).group(1))
    mended = DistillKLLoss(None, temperature=0.02, teacher_temperature=cure)
    mended.compute_loss_from_embeddings(embeddings, labels)
    assert float(mended.last_metrics["teacher_self_probability"]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("arguments", [{"temperature": 0.5}, {"temperature": 0.02, "include_diagonal": False}])
def test_no_warning_when_there_is_something_to_learn(caplog, arguments):
    with caplog.at_level(logging.WARNING):
        DistillKLLoss(None, **arguments).compute_loss_from_embeddings([teacher(16, 8)], teacher(16, 300, seed=1))
    assert not caplog.records


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "columns", "message"),
    [
        ((5, 6), 1, "5 rows, but the student's embeddings have 8"),
        ((8,), 1, r"\(8,\).*shape \(B, Dt\)"),
        ((8, 12), 2, r"\(8, 12\).*2 text column\(s\) need floats of shape \(B, 2, Dt\)"),
        ((8, 3, 6), 2, r"\(B, 2, Dt\)"),
        ((8, 2, 6), 1, r"\(B, Dt\)"),
    ],
)
def test_wrong_teacher_shapes(shape, columns, message):
    loss = DistillKLLoss(None, temperature=0.1)
    with pytest.raises(ValueError, match=message):
        loss.compute_loss_from_embeddings([teacher(8, 4)] * columns, teacher(*shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_teacher_that_is_not_finite_is_named_before_the_student_runs(text_model, bad):
    labels = teacher(8, 12)
    labels[3, 5] = bad
    loss = DistillKLLoss(text_model, temperature=0.1)
    text_model.forward = lambda *_: pytest.fail("the student ran first")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"row\(s\) \[3\] of the batch \(1 of 8\)"):
            loss(features(text_model, ANCHORS), labels)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_teacher_of_zeros_is_named_with_its_text(text_model, columns):
    labels = teacher(8, columns, 12)
    labels[6, columns - 1] = 0
    loss = DistillKLLoss(text_model, temperature=0.1)
    with pytest.raises(
        ValueError, match=r"nothing but zeros in row\(s\) \[6\].*1 of 8.*The first is of '(a small small|dog is)"
    ):
        loss(features(text_model, *(ANCHORS, POSITIVES)[:columns]), labels)
    labels[6, columns - 1, 3] = 1e-20  # small, but it says something
    assert torch.isfinite(loss(features(text_model, *(ANCHORS, POSITIVES)[:columns]), labels))


def test_a_teacher_of_too_few_rows_is_told_before_the_student_runs(text_model):
    loss = DistillKLLoss(text_model, temperature=0.1, mini_batch_size=2)
    text_model.forward = lambda *_: pytest.fail("the student ran first")
    with pytest.raises(ValueError, match="5 rows, but the student's embeddings have 8"):
        loss(features(text_model, ANCHORS), teacher(5, 12))


@pytest.mark.parametrize("options", [{}, {"include_diagonal": False}, {"mini_batch_size": 1}], ids=str)
def test_a_text_alone_is_said_once(text_model, caplog, options):
    loss = DistillKLLoss(text_model, temperature=0.1, **options).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss(features(text_model, ANCHORS[:1]), teacher(1, 12)).backward()
    (record,) = caplog.records
    assert "compared with itself alone. Raise `per_device_train_batch_size`" in record.getMessage()


def test_missing_or_integer_teacher(text_model):
    loss = DistillKLLoss(text_model, temperature=0.1)
    with pytest.raises(ValueError, match=r"no label.*teacher_embeddings"):
        loss(features(text_model, ANCHORS))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        loss(features(text_model, ANCHORS), torch.ones(8, 4).long())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": 1.0, "teacher_temperature": -1.0}, "teacher_temperature=-1"),
        ({"temperature": 1.0, "student_temperature": 0.0}, "student_temperature=0"),
        ({"temperature": 1.0, "direction": "both"}, "'both'.*symmetric"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": 1.0, "teacher_temperature": float("nan")}, "teacher_temperature=nan"),
        ({"temperature": 1.0, "student_temperature": True}, "student_temperature=True"),
        ({"temperature": 1.0, "mini_batch_size": 0}, "mini_batch_size=0"),
        ({"temperature": 1.0, "mini_batch_num_tokens": 0.5}, "mini_batch_num_tokens=0.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DistillKLLoss(None, **arguments)


def test_config_and_citation():
    arguments = {
        "temperature": 0.1,
        "student_temperature": None,
        "teacher_temperature": 0.2,
        "direction": "symmetric",
        "include_diagonal": False,
        "gather_across_devices": True,
        "mini_batch_size": None,
        "mini_batch_num_tokens": 100,
    }
    loss = DistillKLLoss(None, **arguments)
    assert loss.get_config_dict() == arguments
    assert "2504.17432" in loss.citation
