"""Loss and gradient against plain Python, in float64 within 1e-9, over random settings."""

import random

import pytest
import torch
from loss_oracles import candidate_kl, distill_kl, hard_negative_info_nce

from unime_st import functional
from unime_st.losses import CandidateKLLoss, DistillKLLoss, HardNegativeInfoNCELoss

SETTINGS = 240
TOLERANCE = 1e-9


def rows(rng, count, dim):
    return [[rng.gauss(0, 1) for _ in range(dim)] for _ in range(count)]


def tensors(columns):
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in columns]


def check(loss, columns, expected, expected_gradients):
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=TOLERANCE)
    for column, gradient in zip(columns, expected_gradients, strict=True):
        torch.testing.assert_close(column.grad, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=TOLERANCE)


def contrast_setting(seed):
    """Embeddings that are a function of their content, with contents repeated more or less often."""
    rng = random.Random(seed)
    batch, negatives, dim = rng.randint(1, 7), rng.randint(0, 3), rng.randint(2, 6)
    contents = rng.choice([4, 8, 1000])
    ids = [[rng.randrange(contents) for _ in range(batch)] for _ in range(2 + negatives)]
    if rng.random() < 0.5:  # queries of their own, never equal to a candidate
        ids[0] = [10_000 + i for i in ids[0]]
    table = dict(zip(sorted({i for c in ids for i in c}), rows(rng, 99, dim), strict=False))
    columns = [[list(table[i]) for i in column] for column in ids]
    labels = [rng.randrange(max(2, batch)) for _ in range(batch)] if rng.random() < 0.5 else None
    margin = rng.choice([None, -0.3, 0.0, 0.1, 0.5])
    k = rng.choice([None, 1, 2, 5, 50])
    return columns, ids, labels, margin, k, rng.choice([0.02, 0.1, 1.0]), rng.random() < 0.3


def contrast_loss(labels, margin, k, temperature, trust, mode=None, strength=0.0, both=False):
    loss = HardNegativeInfoNCELoss(
        None,
        temperature=temperature,
        margin=margin,
        num_hard_negatives=k,
        filter_explicit_negatives=not trust,
        hardness_mode=mode,
        hardness_strength=strength,
        directions=("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
    )
    loss._checked_first_batch = True  # k above the batch's offer has a test of its own
    return loss, None if labels is None else torch.tensor(labels)


@pytest.mark.parametrize("block", range(8))
def test_hard_negative_info_nce_equals_the_oracle(block):
    seen_empty = seen_filtered = 0
    for seed in range(block, SETTINGS, 8):
        columns, ids, *setting = contrast_setting(seed)
        loss, labels = contrast_loss(*setting)
        embeddings = tensors(columns)
        value = loss.compute_loss_from_embeddings(embeddings, labels, [torch.tensor(i) for i in ids])
        expected, gradients, empty = hard_negative_info_nce(columns, ids, *setting)
        check(value, embeddings, expected, gradients)
        assert int(loss.last_metrics["rows_without_negatives"]) == empty
        seen_empty += empty
        seen_filtered += float(loss.last_metrics["false_negatives_filtered"])
    assert seen_empty, "no setting had a row without negatives"
    assert seen_filtered, "no setting had a false negative"


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_and_directions_equal_the_oracle(mode, both):
    weighted = 0
    for seed in range(60):
        columns, ids, *setting = contrast_setting(seed)
        options = {"mode": mode, "strength": 0.0 if mode is None else [9.0, 0.5][seed % 2], "both": both}
        loss, labels = contrast_loss(*setting, **options)
        embeddings = tensors(columns)
        value = loss.compute_loss_from_embeddings(embeddings, labels, [torch.tensor(i) for i in ids])
        check(value, embeddings, *hard_negative_info_nce(columns, ids, *setting, **options)[:2])
        weighted += abs(value.item() - hard_negative_info_nce(columns, ids, *setting)[0]) > TOLERANCE
    assert weighted > 10 or (mode is None and not both), "the options made no difference"


def test_the_oracle_without_content_ids_is_that_of_all_different_contents():
    for seed in range(40):
        columns, _, *setting = contrast_setting(seed)
        loss, labels = contrast_loss(*setting)
        rng = random.Random(seed)
        columns = [rows(rng, len(column), len(column[0])) for column in columns]
        different = [[100 * c + r for r in range(len(column))] for c, column in enumerate(columns)]
        embeddings = tensors(columns)
        value = loss.compute_loss_from_embeddings(embeddings, labels)
        check(value, embeddings, *hard_negative_info_nce(columns, different, *setting)[:2])


@pytest.mark.parametrize("block", range(4))
def test_distill_kl_equals_the_oracle(block):
    for seed in range(block, SETTINGS, 4):
        rng = random.Random(1000 + seed)
        batch, n, dim, teacher_dim = rng.randint(1, 5), rng.randint(1, 3), rng.randint(2, 5), rng.randint(2, 7)
        columns = [rows(rng, batch, dim) for _ in range(n)]
        teachers = [rows(rng, batch, teacher_dim) for _ in range(n)]
        if batch > 1 and rng.random() < 0.3:  # a repeated text
            columns[0][1], teachers[0][1] = list(columns[0][0]), list(teachers[0][0])
        tau = rng.choice([0.05, 0.2, 1.0])
        tau_student, tau_teacher = rng.choice([None, 0.1]), rng.choice([None, 0.3])
        direction = rng.choice(["teacher_student", "student_teacher", "symmetric"])
        diagonal = rng.random() < 0.5
        loss = DistillKLLoss(
            None,
            temperature=tau,
            student_temperature=tau_student,
            teacher_temperature=tau_teacher,
            direction=direction,
            include_diagonal=diagonal,
        )
        embeddings = tensors(columns)
        labels = torch.tensor(teachers, dtype=torch.float64).transpose(0, 1)  # (B, n, Dt)
        value = loss.compute_loss_from_embeddings(embeddings, labels.squeeze(1) if n == 1 else labels)
        expected = distill_kl(columns, teachers, tau_student or tau, tau_teacher or tau, direction, diagonal)
        check(value, embeddings, *expected)


@pytest.mark.parametrize("block", range(4))
def test_candidate_kl_equals_the_oracle(block):
    ragged = learned = 0
    for seed in range(block, SETTINGS, 4):
        rng = random.Random(2000 + seed)
        batch, n, dim = rng.randint(1, 6), rng.randint(2, 11), rng.randint(2, 6)
        columns = [rows(rng, batch, dim) for _ in range(1 + n)]
        missing = rng.choice([0.0, 0.3, 0.9])
        scores = [
            [None if place and rng.random() < missing else rng.choice([0.0, 1.0, rng.random()]) for place in range(n)]
            for _ in range(batch)
        ]
        tau, tau_teacher = rng.choice([0.02, 0.1, 1.0]), rng.choice([None, 0.02, 0.3])
        direction = rng.choice(["teacher_student", "student_teacher", "symmetric"])
        loss = CandidateKLLoss(None, temperature=tau, teacher_temperature=tau_teacher, direction=direction)
        embeddings = tensors(columns)
        labels = torch.tensor(
            [[-1.0 if score is None else score for score in row] for row in scores], dtype=torch.float64
        )
        value = loss.compute_loss_from_embeddings(embeddings, labels)
        expected, gradients = candidate_kl(columns, scores, tau, tau_teacher or tau, direction)
        check(value, embeddings, expected, gradients)
        ragged += any(None in row for row in scores)
        learned += expected > 0.01
    assert ragged > 20, "no setting had rows with differing numbers of candidates"
    assert learned > 40, "the oracle had nothing to learn from"


@pytest.mark.parametrize("seed", range(3))
def test_comparing_in_chunks_changes_nothing(seed, monkeypatch):
    """Values, gradients and logged numbers of both losses, whatever number of rows is compared at a time."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    teacher = torch.randn(11, 3, 5, generator=generator, dtype=torch.float64)
    ids = [torch.randint(0, 9, (11,), generator=generator) for _ in range(3)]
    losses = {
        "contrastive": (
            HardNegativeInfoNCELoss(None, num_hard_negatives=4, temperature=0.3),
            None,
            {"content_ids": ids},
        ),
        "random": (
            HardNegativeInfoNCELoss(None, num_hard_negatives=4, temperature=0.3, negative_selection="random"),
            None,
            {"content_ids": ids},
        ),
        "weighted": (
            HardNegativeInfoNCELoss(
                None,
                num_hard_negatives=4,
                temperature=0.3,
                directions=("query_to_doc", "doc_to_query"),
                hardness_mode="in_batch_negatives",
                hardness_strength=9.0,
            ),
            None,
            {"content_ids": ids},
        ),
        "distillation": (DistillKLLoss(None, temperature=0.3), teacher, {}),
    }
    for loss, labels, options in losses.values():
        results = []
        for at_once in (2**22, 60):
            monkeypatch.setattr(functional, "SCORES_AT_ONCE", at_once)
            torch.manual_seed(seed)
            for column in columns:
                column.grad = None
            value = loss.compute_loss_from_embeddings(columns, labels, **options)
            value.backward()
            results.append([value.detach(), *(column.grad for column in columns), *loss.last_metrics.values()])
        assert results[0][1].abs().max() > 0
        for whole, chunked in zip(*results, strict=True):
            torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-12)
