"""The pure maths, function by function; the losses' oracles in tests/losses cover them together."""

import math
import random

import pytest
import torch

from unime_st import functional as F
from unime_st.identity.features import mix64
from unime_st.losses.contrast import shuffled_priority


def loop_identity_mask(positive, num_candidates, candidate_ids, query_ids, labels):
    mask = [[False] * num_candidates for _ in positive]
    for q, own in enumerate(positive):
        answers = {own}
        for known in (labels, query_ids):
            if known is not None:
                answers |= {j for j in range(len(known)) if known[j] == known[own]}
        for c in range(num_candidates):
            mask[q][c] = c in answers
            if candidate_ids is not None:
                mask[q][c] |= any(candidate_ids[c] == candidate_ids[j] for j in answers)
                mask[q][c] |= query_ids is not None and candidate_ids[c] == query_ids[own]
    return mask


@pytest.mark.parametrize("seed", range(60))
def test_identity_mask_equals_a_loop(seed):
    rng = random.Random(seed)
    n, negatives = rng.randint(1, 6), rng.randint(0, 2)
    first = rng.randint(0, n - 1)
    positive = list(range(first, rng.randint(first, n - 1) + 1))  # the rows of one process
    total = n * (1 + negatives)

    def ids(count):
        return [rng.randrange(6) for _ in range(count)] if rng.random() < 0.7 else None

    candidate_ids, query_ids, labels = ids(total), ids(n), ids(n)
    got = F.identity_mask(
        torch.tensor(positive),
        total,
        candidate_ids=None if candidate_ids is None else torch.tensor(candidate_ids),
        query_ids=None if query_ids is None else torch.tensor(query_ids),
        labels=None if labels is None else torch.tensor(labels),
    )
    assert got.tolist() == loop_identity_mask(positive, total, candidate_ids, query_ids, labels)


def test_first_occurrence_equals_a_loop():
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(-3, 5) for _ in range(rng.randint(1, 12))]
        group, first = F.first_occurrence(torch.tensor(ids))
        assert first.tolist() == [value not in ids[:i] for i, value in enumerate(ids)]
        assert [[a == b for a in ids] for b in ids] == [[a == b for a in group.tolist()] for b in group.tolist()]
        assert 0 <= min(group.tolist()) <= max(group.tolist()) < len(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosine_scores(dtype):
    a, b = torch.randn(3, 5).to(dtype), torch.randn(4, 5).to(dtype)
    scores = F.cosine_scores(a, b)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(3):
        for j in range(4):
            x, y = a[i].double(), b[j].double()
            assert scores[i, j].item() == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
    assert torch.equal(F.cosine_scores(torch.zeros(1, 5), torch.randn(2, 5)), torch.zeros(1, 2))


def test_negatives_are_values_with_empty_places():
    scores = torch.tensor([[0.5, 0.7, 0.58, 0.2], [0.1, 0.3, 0.2, 0.25]])
    chosen = F.hardest_valid_negatives(scores, torch.tensor([0, 1]), k=3, margin=0.1)
    inf = torch.inf
    torch.testing.assert_close(chosen.scores, torch.tensor([[0.58, 0.2, -inf], [0.25, 0.2, 0.1]]))
    assert chosen.filtered_by_margin.tolist() == [1, 0]
    assert chosen.filtered_by_identity.tolist() == [0, 0]


def test_negative_margin_is_stricter_and_none_is_off():
    scores = torch.tensor([[0.5, 0.45, 0.9, 0.2]])

    def kept(margin):
        chosen = F.hardest_valid_negatives(scores, torch.tensor([0]), k=3, margin=margin).scores
        return [round(x, 2) for x in chosen[0].tolist() if x > -1]

    assert kept(-0.1) == [0.2]
    assert kept(0.1) == [0.45, 0.2]
    assert kept(None) == [0.9, 0.45, 0.2]


def test_k_is_capped_by_the_candidates_and_at_least_one():
    assert F.hardest_valid_negatives(torch.rand(2, 3), torch.tensor([0, 1]), k=9, margin=None).scores.shape == (2, 3)
    with pytest.raises(ValueError, match="None keeps all"):
        F.hardest_valid_negatives(torch.rand(2, 3), torch.tensor([0, 1]), k=0, margin=None)


@pytest.mark.parametrize("priority", [torch.tensor([[5, 1, 4, 2]]), torch.tensor([[0.5, 0.1, 0.4, 0.2]])])
def test_priority_replaces_hardness_but_not_the_filter(priority):
    scores = torch.tensor([[0.5, 0.4, 0.9, 0.2]])
    chosen = F.hardest_valid_negatives(scores, torch.tensor([0]), k=1, margin=0.1, priority=priority)
    torch.testing.assert_close(chosen.scores, torch.tensor([[0.2]]))  # the best priority left after 0.9 is filtered


@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_info_nce_closed_forms(temperature):
    assert F.info_nce(torch.zeros(2), torch.zeros(2, 5), temperature).tolist() == pytest.approx([math.log(6)] * 2)
    positive = torch.tensor([0.3], requires_grad=True)
    empty = F.info_nce(positive, torch.full((1, 4), -torch.inf), temperature)
    empty.sum().backward()
    assert empty.item() == 0
    assert positive.grad.item() == 0


def test_kl_gives_the_teacher_no_gradient_and_rejects_a_wrong_direction():
    student, teacher = torch.rand(3, 3, requires_grad=True), torch.rand(3, 3, requires_grad=True)
    options = {"student_temperature": 0.5, "teacher_temperature": 0.5}
    F.in_batch_kl(student, teacher, **options).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"'up'.*teacher_student"):
        F.in_batch_kl(student, teacher, direction="up", **options)


def test_kl_without_the_diagonal_ignores_it():
    student, teacher = torch.rand(4, 4, requires_grad=True), torch.rand(4, 4)
    options = {"student_temperature": 0.5, "teacher_temperature": 0.5, "diagonal": torch.arange(4)}
    value = F.in_batch_kl(student, teacher, **options)
    value.sum().backward()
    assert torch.equal(student.grad.diagonal(), torch.zeros(4))
    changed = F.in_batch_kl(student.detach() + 9 * torch.eye(4), teacher - 5 * torch.eye(4), **options)
    torch.testing.assert_close(changed, value.detach())


def test_shuffled_priority_is_a_function_of_row_and_seed_alone():
    whole = shuffled_priority(5, torch.arange(6), 40)
    assert torch.equal(shuffled_priority(torch.tensor(5), torch.arange(3, 6), 40), whole[3:])
    assert not torch.equal(shuffled_priority(6, torch.arange(6), 40), whole)
    assert whole.flatten().unique().numel() == 240
    assert len({tuple(order) for order in whole.argsort(dim=1).tolist()}) == 6


def test_mix64_has_no_collisions_among_near_numbers_and_spreads_every_bit():
    mixed = mix64(torch.arange(100_000))
    assert mixed.unique().numel() == 100_000
    for bit in range(64):
        assert 0.48 < ((mixed >> bit) & 1).float().mean() < 0.52


def test_by_rows_in_chunks_gives_the_same_values_and_gradients():
    queries, candidates = (torch.randn(rows, 5, dtype=torch.float64, requires_grad=True) for rows in (7, 11))

    def compute(some, numbers):
        scores = some @ candidates.T
        return scores.logsumexp(dim=1), scores.gather(1, numbers[:, None]).squeeze(1).detach()

    results = []
    for chunk in (None, 3):
        queries.grad = candidates.grad = None
        loss, picked = F.by_rows(compute, [queries, torch.arange(7)], chunk)
        loss.mean().backward()
        results.append((loss.detach(), picked, queries.grad, candidates.grad))
    assert results[0][3].abs().min() > 0
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_temperatures_that_are_none(temperature):
    scores = torch.eye(3)
    with pytest.raises((TypeError, ValueError), match="`temperature="):
        F.info_nce(torch.zeros(3), scores, temperature)
    for side in ("student", "teacher"):
        given = {"student_temperature": 0.1, "teacher_temperature": 0.1, f"{side}_temperature": temperature}
        with pytest.raises((TypeError, ValueError), match=f"`{side}_temperature="):
            F.in_batch_kl(scores, scores, **given)


@pytest.mark.parametrize(("k", "margin"), [(0, 0.1), (True, 0.1), (1.5, 0.1), (1, float("nan")), (1, float("inf"))])
def test_numbers_of_negatives_and_margins_that_are_none(k, margin):
    with pytest.raises((TypeError, ValueError), match=r"`k=|`margin="):
        F.hardest_valid_negatives(torch.eye(3), torch.arange(3), k, margin)
