"""Pure tensor maths of the losses: tensors in, tensors out, no model, no process group.

Dimension letters used throughout the package:

====== =======================================================================================================
``B``  rows of the local batch
``N``  rows of the global batch (``B`` times ``W``)
``Q``  queries whose loss is computed here (the local rows)
``C``  candidates: the ``N`` positives first, in row order, then the explicit negatives, one column after another
``K``  negatives kept for a query
``D``  embedding dimension
``W``  processes
====== =======================================================================================================

Scores are a ``(Q, C)`` matrix, and everything else is a mask over it or a selection of its values: an ``(N, 1 + K, D)``
tensor of gathered negatives is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unime_st.arguments import require_number

SCORES_AT_ONCE = 2**22
"""Entries of the ``(Q, C)`` matrix of scores that exist at a time, see :func:`rows_at_once`."""

KLDirection = Literal["teacher_student", "student_teacher", "symmetric"]
KL_DIRECTIONS: tuple[KLDirection, ...] = ("teacher_student", "student_teacher", "symmetric")


class HardNegatives(NamedTuple):
    """The negatives chosen for each query, and what was left out on the way."""

    scores: Tensor  # (Q, K) similarity to the query; -inf where a row has fewer than K valid candidates
    columns: Tensor  # (Q, K) which candidates they are; meaningless where the score is -inf
    right: Tensor  # (Q, C) candidates that hold a right answer, or the query itself, see `identity_mask`
    filtered_by_identity: Tensor  # (Q,) how many those are, the row's own positive not counted
    filtered_by_margin: Tensor  # (Q,) further candidates whose score exceeds the positive's by more than the margin


def check_temperature(name: str, value: float) -> float:
    """Return the temperature, or say what is wrong with it.

    >>> check_temperature("temperature", 0)
    Traceback (most recent call last):
    ...
    ValueError: `temperature=0`, but a temperature must be a number above 0 (0.02 to 0.1 is usual).
    """
    require_number(name, value, whole=False)
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}={value}`, but a temperature must be a number above 0 (0.02 to 0.1 is usual).")
    return value


def check_margin(margin: float | None, *, optional: bool = True) -> None:
    """Refuse a margin that is no finite number: with NaN or infinity nothing would ever be filtered, or all.

    >>> check_margin(float("nan"))
    Traceback (most recent call last):
    ...
    ValueError: `margin=nan`, but it must be a finite number; None switches the filter off.
    """
    require_number("margin", margin, whole=False, optional=optional)
    if margin is not None and not abs(margin) < float("inf"):
        advice = "; None switches the filter off" if optional else ""
        raise ValueError(f"`margin={margin}`, but it must be a finite number{advice}.")


def check_direction(direction: str) -> None:
    """Refuse an unknown direction of a divergence."""
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"`direction={direction!r}`, but it must be one of {', '.join(KL_DIRECTIONS)}.")


def rows_at_once(num_candidates: int) -> int:
    """Queries to compare at a time with so many candidates.

    >>> rows_at_once(1024), rows_at_once(16384)
    (4096, 256)
    """
    return max(1, SCORES_AT_ONCE // max(1, num_candidates))


def by_rows(
    compute: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], chunk: int | None
) -> tuple[Tensor, ...]:
    """Compute something from rows ``(Q, ...)`` in chunks; intermediate tensors are made anew in the backward pass.

    A ``(Q, C)`` matrix of scores, its masks and their gradients then never exist as a whole.

    >>> by_rows(lambda x: (x.sum(dim=1), x[:, 0]), [torch.arange(6.0).view(3, 2)], chunk=2)
    (tensor([1., 5., 9.]), tensor([0., 2., 4.]))
    """
    if chunk is None or len(rows[0]) <= chunk:
        return compute(*rows)
    parts = [
        checkpoint(compute, *some, use_reentrant=False, preserve_rng_state=False)
        for some in zip(*(tensor.split(chunk) for tensor in rows), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def cosine_scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Cosines ``(Q, C)`` of queries ``(Q, D)`` and candidates ``(C, D)``, in float32 or better; zero vectors have 0.

    Autocast is off inside: bfloat16 scores divided by a temperature of 0.02 would be wrong by tenths of a logit.

    >>> cosine_scores(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[1., 0.]])
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, candidates.dtype), torch.float32)
    with torch.autocast(device_type=queries.device.type, enabled=False):
        return F.normalize(queries.to(dtype), dim=-1) @ F.normalize(candidates.to(dtype), dim=-1).T  # (Q, C)


def in_batch_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    direction: KLDirection = "teacher_student",
    diagonal: Tensor | None = None,
) -> Tensor:
    """KL divergence ``(Q,)`` between the teacher's and the student's softmax over the batch, scores being ``(Q, C)``.

    UniME (arXiv 2504.17432, section 3.2) compares the similarity of each text with every text of the batch. No factor
    of the squared temperature is applied. The teacher gets no gradient. ``"teacher_student"`` is KL(teacher ‖ student),
    ``"student_teacher"`` is KL(student ‖ teacher) as printed in the paper, ``"symmetric"`` their mean. ``diagonal``
    ``(Q,)`` is the column in which a row meets itself, left out of both distributions; None keeps every column. A row
    with no column left has 0, with gradient 0.

    >>> scores = torch.eye(3)
    >>> in_batch_kl(scores, scores, student_temperature=0.1, teacher_temperature=0.1)
    tensor([0., 0., 0.])
    """
    check_direction(direction)
    check_temperature("student_temperature", student_temperature)
    check_temperature("teacher_temperature", teacher_temperature)
    student = student_scores / student_temperature
    teacher = teacher_scores.detach() / teacher_temperature
    left_out = torch.zeros_like(student, dtype=torch.bool)
    if diagonal is not None:
        if student.shape[1] == 1:
            return student.sum(dim=1) * 0.0
        left_out = left_out.scatter(1, diagonal[:, None], value=True)
    return _divergence(student, teacher, left_out, direction)


def own_candidate_scores(queries: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """Cosines ``(B, n)`` of each query ``(B, D)`` with its own ``n`` candidates, one ``(B, D)`` tensor a column.

    In float32 or better, and autocast is off, as in :func:`cosine_scores`; zero vectors have 0.

    >>> own_candidate_scores(torch.tensor([[2.0, 0.0]]), [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])])
    tensor([[1., 0.]])
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(device_type=queries.device.type, enabled=False):
        unit = F.normalize(queries.to(dtype), dim=-1)
        return torch.stack([(unit * F.normalize(own.to(dtype), dim=-1)).sum(dim=1) for own in candidates], dim=1)


def candidate_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    direction: KLDirection = "symmetric",
    missing: Tensor | None = None,
) -> Tensor:
    """KL divergence ``(B,)`` between two softmaxes over each row's own ``n`` candidates, scores being ``(B, n)``.

    UniME-V2 (arXiv 2510.13515) compares a judge's scores with the cosines so; ``direction`` is that of
    :func:`in_batch_kl`, and the teacher gets no gradient. ``missing`` ``(B, n)`` marks the places in which a row has no
    candidate, left out of both distributions; a row with one candidate has 0, with gradient 0.

    >>> candidate_kl(torch.zeros(1, 3), torch.zeros(1, 3), student_temperature=0.02, teacher_temperature=0.02)
    tensor([0.])
    """
    check_direction(direction)
    check_temperature("student_temperature", student_temperature)
    check_temperature("teacher_temperature", teacher_temperature)
    student = student_scores / student_temperature
    teacher = teacher_scores.detach() / teacher_temperature
    left_out = torch.zeros_like(student, dtype=torch.bool) if missing is None else missing
    return _divergence(student, teacher, left_out, direction)


def _divergence(student: Tensor, teacher: Tensor, left_out: Tensor, direction: KLDirection) -> Tensor:
    """KL divergence ``(Q,)`` between the softmaxes of logits ``(Q, C)``; each row has a column that is not left out."""
    # Left-out columns have log-probability -inf, which the mask turns into a term of exactly 0 on both sides.
    student_log = F.log_softmax(student.masked_fill(left_out, -torch.inf), dim=1).masked_fill(left_out, 0.0)
    teacher_log = F.log_softmax(teacher.masked_fill(left_out, -torch.inf), dim=1).masked_fill(left_out, 0.0)
    difference = teacher_log - student_log  # (Q, C), 0 where left out
    teacher_student = (teacher_log.exp() * difference).sum(dim=1)
    if direction == "teacher_student":
        return teacher_student
    student_teacher = (student_log.exp() * -difference).sum(dim=1)
    return student_teacher if direction == "student_teacher" else (teacher_student + student_teacher) / 2


def first_occurrence(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Group equal integers ``(C,)``, without a shape that depends on the data (which would stall a GPU).

    Gives the group of each entry, in [0, C), and True where an entry is the first of its group, both ``(C,)``.

    >>> first_occurrence(torch.tensor([7, 5, 7]))
    (tensor([1, 0, 1]), tensor([ True,  True, False]))
    """
    ordered, order = torch.sort(ids, stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = torch.empty_like(order).scatter_(0, order, starts.cumsum(0) - 1)
    return group, torch.empty_like(starts).scatter_(0, order, starts)


def _spread_over_equals(mask: Tensor, candidate_ids: Tensor) -> Tensor:
    """Mark a candidate of ``(Q, C)`` when any candidate of the same content is marked."""
    group = first_occurrence(candidate_ids)[0]  # (C,)
    marked = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device).index_add_(1, group, mask.int())
    return marked[:, group] > 0


def identity_mask(
    positive: Tensor,
    num_candidates: int,
    *,
    candidate_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Mark candidates ``(Q, C)`` that are right answers to a query because of what they *are*, whatever their score.

    A row answers a query when it is the query's own row, has the same label, or the same query content. A candidate is
    marked when it is the positive of such a row or, given ``candidate_ids``, has the content of one; and when it has
    the content of the query itself.

    Args:
        positive: ``(Q,)`` column of each query's own positive, and its row in ``query_ids`` and ``labels``.
        num_candidates: ``C``.
        candidate_ids: ``(C,)`` integer identity of each candidate's content.
        query_ids: ``(N,)`` integer identity of each query's content, in the same numbering.
        labels: ``(N,)`` integer identity of each row's target.

    Example:
        >>> identity_mask(torch.tensor([0]), 3, candidate_ids=torch.tensor([4, 9, 4]))
        tensor([[ True, False,  True]])
    """
    own = positive[:, None]  # (Q, 1)
    mask = torch.zeros(len(positive), num_candidates, dtype=torch.bool, device=positive.device)
    mask = mask.scatter(1, own, value=True)
    for identity in (labels, query_ids):
        if identity is not None:
            mask[:, : len(identity)] |= identity[positive][:, None] == identity[None, :]
    if candidate_ids is None:
        return mask
    mask = _spread_over_equals(mask, candidate_ids)
    if query_ids is not None:
        mask = mask | (candidate_ids[None, :] == query_ids[positive][:, None])
    return mask


def above_margin(scores: Tensor, positive_scores: Tensor, margin: float | None) -> Tensor:
    """Whether a score ``(Q, C)`` is a false negative's: above the positive's ``(Q, 1)`` plus the margin; None: never.

    UniME, arXiv 2504.17432, section 3.3.

    >>> above_margin(torch.tensor([[0.4, 0.7]]), torch.tensor([[0.5]]), 0.1)
    tensor([[False,  True]])
    """
    if margin is None:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores > positive_scores + margin


def hardest_valid_negatives(
    scores: Tensor,
    positive: Tensor,
    k: int | None,
    margin: float | None,
    *,
    candidate_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    labels: Tensor | None = None,
    trusted: Tensor | None = None,
    priority: Tensor | None = None,
) -> HardNegatives:
    """Choose each query's negatives: drop false negatives, count equal candidates once, keep the ``k`` most similar.

    UniME (arXiv 2504.17432, section 3.3): a candidate scoring above ``score(positive) + margin`` is taken for a false
    negative. Beyond the paper, right answers known by identity are dropped too (see :func:`identity_mask`): a copy of
    the positive scores exactly as the positive does and would pass any margin >= 0. Candidates of equal content count
    once, by their first occurrence, or one popular target would fill several of the ``k`` places.

    What is kept is the *values*, with ``-inf`` for the places a row cannot fill, so that a dropped candidate never
    comes back by its index. No gradient flows into the choice, and full gradient into the chosen values.

    Args:
        scores: ``(Q, C)`` similarities, positives first.
        positive: See :func:`identity_mask`, as the other identities.
        k: Negatives to keep, at most, most preferred first; None keeps all that are valid (and ``K`` is then ``C``).
        margin: May be negative (a stricter filter); None switches the filter by score off.
        candidate_ids: See :func:`identity_mask`.
        query_ids: See :func:`identity_mask`.
        labels: See :func:`identity_mask`.
        trusted: ``(Q, C)`` True where a candidate is known to be a negative, whatever its score, so that the margin
            does not apply to it nor to its equals; identity still does.
        priority: ``(Q, C)`` take the largest of these in place of the highest scores, e.g. a random order.

    Example:
        >>> scores = torch.tensor([[0.5, 0.9, 0.4, 0.1]])
        >>> hardest_valid_negatives(scores, torch.tensor([0]), k=2, margin=0.1).scores
        tensor([[0.4000, 0.1000]])
    """
    require_number("k", k, optional=True)
    if k is not None and k < 1:
        raise ValueError(f"`k={k}`, but at least 1 negative must be kept; None keeps all of them.")
    check_margin(margin)
    own = positive[:, None]  # (Q, 1)
    by_identity = identity_mask(
        positive, scores.shape[1], candidate_ids=candidate_ids, query_ids=query_ids, labels=labels
    )
    by_margin = torch.zeros_like(by_identity)
    if margin is not None:
        with torch.no_grad():
            by_margin = above_margin(scores, scores.gather(1, own), margin) & ~by_identity
            if trusted is not None:
                by_margin &= ~(trusted if candidate_ids is None else _spread_over_equals(trusted, candidate_ids))
    invalid = by_identity | by_margin  # (Q, C)
    if candidate_ids is not None:
        invalid = invalid | ~first_occurrence(candidate_ids)[1]
    negatives = scores.masked_fill(invalid, -torch.inf)
    columns = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    if k is not None:
        k = min(k, scores.shape[1])
        if priority is None:
            negatives, columns = negatives.topk(k, dim=1)
        else:
            lowest = (
                torch.finfo(priority.dtype).min if priority.is_floating_point() else torch.iinfo(priority.dtype).min
            )
            columns = priority.masked_fill(invalid, lowest).topk(k, dim=1).indices
            negatives = negatives.gather(1, columns)
    return HardNegatives(negatives, columns, by_identity, _count(by_identity) - 1, _count(by_margin))


def _count(mask: Tensor) -> Tensor:
    """How many of each row are marked; a CPU takes eight times as long to sum booleans as 64-bit integers."""
    return mask.sum(dim=1, dtype=torch.int32)


def own_explicit_negatives(
    rows: Tensor, num_rows: int, num_candidates: int, candidate_ids: Tensor | None = None
) -> Tensor:
    """Mark the explicit negatives of rows ``(Q,)`` of the global batch, and what equals one, ``(Q, C)``.

    ``candidate_ids`` ``(C,)`` are the candidates' contents; None takes all for different.

    >>> own_explicit_negatives(torch.tensor([1]), 2, 4)  # two positives, then two explicit negatives
    tensor([[False, False, False,  True]])
    """
    columns = torch.arange(num_candidates, device=rows.device)
    own = (columns[None, :] % num_rows == rows[:, None]) & (columns[None, :] >= num_rows)
    return own if candidate_ids is None else _spread_over_equals(own, candidate_ids)


@torch.no_grad()
def similarity_to_others(scores: Tensor, right: Tensor, num_rows: int) -> Tensor:
    """Mean similarity ``(Q,)`` of each query to the positives of other rows that are no right answer to it.

    ``scores`` and ``right``, the mask of right answers, are ``(Q, C)``, the ``num_rows`` positives first. Near 1,
    different inputs all point one way. No gradient; NaN where a query has no such positive.

    >>> similarity_to_others(torch.tensor([[0.9, 0.5, 0.25]]), torch.tensor([[True, False, False]]), 3)
    tensor([0.3750])
    """
    right = right[:, :num_rows]
    return scores[:, :num_rows].masked_fill(right, 0.0).sum(dim=1) / _count(~right)


def hardness_penalties(negative_scores: Tensor, strength: float, where: Tensor | None = None) -> Tensor:
    """What is added to negatives' logits ``(Q, K)`` so that hard ones weigh more: ``strength`` times their similarity.

    LLaVE (arXiv 2503.04812, equation 5): a negative then counts ``exp(strength * similarity)`` times in the softmax. No
    gradient flows through this factor, and the temperature does not divide it. ``-inf`` marks an empty place; ``where``
    ``(Q, K)`` marks the negatives to weight, None all.

    >>> hardness_penalties(torch.tensor([[0.5, -torch.inf]]), strength=9.0)
    tensor([[4.5000, 0.0000]])
    """
    scores = negative_scores.detach()
    left_out = scores == -torch.inf
    if where is not None:
        left_out = left_out | ~where
    return strength * scores.masked_fill(left_out, 0.0)


def info_nce(
    positive_scores: Tensor, negative_scores: Tensor, temperature: float, penalties: Tensor | None = None
) -> Tensor:
    """Cross-entropy ``(Q,)`` of picking the positive ``(Q,)`` among itself and the negatives ``(Q, K)``.

    ``-inf`` marks an empty place; a row of nothing else has loss 0, with gradient 0. ``penalties`` ``(Q, K)`` are added
    to the negatives' logits.

    >>> info_nce(torch.zeros(1), torch.zeros(1, 3), temperature=0.02)  # log 4
    tensor([1.3863])
    """
    check_temperature("temperature", temperature)
    logits = torch.cat([positive_scores[:, None], negative_scores], dim=1) / temperature  # (Q, 1 + K)
    if penalties is not None:
        logits = logits + F.pad(penalties, (1, 0))
    return -F.log_softmax(logits, dim=1)[:, 0]
