"""Stage 1 of UniME: learn a text teacher's similarities within the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st import distributed, functional
from unime_st.features import num_rows
from unime_st.functional import KLDirection
from unime_st.losses.checks import MORE_ROWS, check_columns, check_teacher
from unime_st.losses.in_batch import InBatchLoss

logger = logging.getLogger(__name__)

_ALL_SELF = 0.99  # mean self-probability of the teacher above which there is next to nothing to learn
_HALF_SELF = 0.5


class DistillKLLoss(InBatchLoss):
    """KL divergence between the teacher's and the student's softmax over the similarities within the batch.

    Each text is compared with all texts of the batch (of every process's batch with ``gather_across_devices``), once by
    the student's embeddings and once by the teacher's; the two rows of cosine similarities, divided by the
    temperatures, become distributions. Only similarities are compared, so the two may differ in dimension. The loss is
    the mean over the rows of the global batch, without a factor of the squared temperature: each process averages its
    own rows, and the data-parallel wrapper averages over processes.

    Texts from several columns form one batch: with two columns of 8 rows, 16 texts are compared with 16.

    Args:
        model: The student; None when only :meth:`compute_loss_from_embeddings` is used.
        temperature: Divides both sides' similarities, > 0. The paper gives none; E5-V, its closest relative, uses 0.05.
        student_temperature: In place of ``temperature`` on the student's side.
        teacher_temperature: In place of ``temperature`` on the teacher's side.
        direction: ``"teacher_student"`` is KL(teacher ‖ student), the usual distillation; ``"student_teacher"`` is
            KL(student ‖ teacher) as printed in the paper; ``"symmetric"`` is their mean.
        include_diagonal: Whether a text is compared with itself too, as in the paper. At a low temperature the teacher
            then puts all of its probability there, so the student learns to tell texts apart and little else
            (``benchmarks/stage1_sweep.py`` measures it): the first batch is measured, and a warning
            says so.
        gather_across_devices: Compare with the texts of all processes.
        mini_batch_size: Distinct texts embedded at a time (GradCache); None embeds each column at once.
        mini_batch_num_tokens: Tokens embedded at a time, padding included, in place of a number of texts; ``"auto"``
            chooses from the memory that is free, see :class:`~unime_st.losses.in_batch.InBatchLoss`.

    Attributes:
        last_metrics: Numbers of the last batch, as scalars on the device: ``teacher_self_probability`` and
            ``student_self_probability`` (mean probability of a text itself, 0 without the diagonal) and
            ``nearest_neighbor_agreement`` (share of texts whose most similar other text is the same for both), over the
            local rows. :class:`~unime_st.losses.LossMetricsCallback` logs their means.

    Raises:
        ValueError: At construction on arguments out of range; on a batch when the teacher's embeddings are missing,
            have the wrong shape, hold a number that is not finite, or nothing but zeros.

    Inputs:
        +----------------------+--------------------------------------------------------------------+
        | Columns              | Label                                                              |
        +======================+====================================================================+
        | one text column      | the teacher's embeddings, ``(B, Dt)`` or ``(B, 1, Dt)``            |
        +----------------------+--------------------------------------------------------------------+
        | n text columns       | the teacher's embeddings, ``(B, n, Dt)``, in the columns' order    |
        +----------------------+--------------------------------------------------------------------+

        A flat ``(B, n * Dt)`` is refused: it cannot be told from ``(B, Dt)`` of one column alone.

    Relations:
        ``DistillKLDivLoss`` compares a query with its own few candidates, given the teacher's scores; this loss
        compares all with all, given embeddings. ``EmbedDistillLoss`` pulls each embedding onto the teacher's, so needs
        one dimension. ``MatryoshkaLoss`` may wrap it; in plain mode, it cuts the label too when ``Dt`` happens to
        equal the student's dimension, which a ``mini_batch_size`` avoids.

    References:
        UniME, section 3.2: https://arxiv.org/abs/2504.17432

    Example:
        >>> loss = DistillKLLoss(None, temperature=0.5)
        >>> teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
        >>> loss.compute_loss_from_embeddings([teacher[:, :2]], teacher)  # the same angles in two dimensions
        tensor(0.)
    """

    metric_names = ("teacher_self_probability", "student_self_probability", "nearest_neighbor_agreement")

    def __init__(
        self,
        model: SentenceTransformer | None,
        *,
        temperature: float,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        direction: KLDirection = "teacher_student",
        include_diagonal: bool = True,
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | Literal["auto"] | None = None,
    ) -> None:
        super().__init__(
            model,
            gather_across_devices=gather_across_devices,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
        )
        functional.check_direction(direction)
        self.temperature = functional.check_temperature("temperature", temperature)
        for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
            if value is not None:
                functional.check_temperature(name, value)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.direction = direction
        self.include_diagonal = include_diagonal
        self._checked_first_batch = False
        self._compared = 0

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss."""
        columns = list(sentence_features)
        check_teacher(labels, len(columns), num_rows(columns[0]), self.model, columns)  # before the expensive part
        return self.embed_and_compute(columns, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Compute the loss from the student's and the teacher's embeddings.

        Args:
            embeddings: One ``(B, D)`` tensor a column.
            labels: The teacher's: ``(B, Dt)`` for one column, ``(B, n, Dt)`` for ``n``.

        Returns:
            The mean loss over this process's rows, a scalar.

        Raises:
            ValueError: On a teacher that does not fit, or an embedding of it that is not finite or zero.
        """
        check_columns(embeddings, 1, "The texts")
        check_teacher(labels, len(embeddings), len(embeddings[0]))
        return self.compute_loss(embeddings, labels)

    def compute_loss(self, embeddings: list[Tensor], targets: Tensor | None) -> Tensor:
        """Compute the loss from embeddings and a teacher that was checked."""
        students, targets = embeddings, cast("Tensor", targets)
        batch, columns = len(students[0]), len(students)
        teachers = list(targets.detach().reshape(batch, columns, -1).unbind(1))  # n times (B, Dt)
        student, teacher = torch.cat(students), torch.cat(teachers)  # (Q, D), (Q, Dt), Q = n * B
        rows = torch.arange(batch, device=student.device)
        total = batch
        if self.gather_across_devices:
            rows, total = rows + distributed.rank() * batch, batch * distributed.world_size()
            students, teachers = distributed.gather_columns(students), distributed.gather_columns(teachers)
        diagonal = torch.cat([rows + column * total for column in range(columns)])  # (Q,)
        all_students, all_teachers = torch.cat(students), torch.cat(teachers)  # (C, D), (C, Dt), C = n * N
        self._compared = len(all_students)
        self._warn_when_saturated(teacher, all_teachers, diagonal)

        def by_row(some_students: Tensor, some_teachers: Tensor, own: Tensor) -> tuple[Tensor, ...]:
            student_scores = functional.cosine_scores(some_students, all_students)  # (q, C)
            teacher_scores = functional.cosine_scores(some_teachers, all_teachers).to(student_scores.dtype)
            loss = functional.in_batch_kl(
                student_scores,
                teacher_scores,
                student_temperature=self.student_temperature or self.temperature,
                teacher_temperature=self.teacher_temperature or self.temperature,
                direction=self.direction,
                diagonal=None if self.include_diagonal else own,
            )
            return loss, *self._told(student_scores, teacher_scores, own[:, None])

        loss, *told = functional.by_rows(
            by_row, [student, teacher, diagonal], functional.rows_at_once(len(all_students))
        )
        self.record_metrics({name: values.mean() for name, values in zip(self.metric_names, told, strict=True)})
        return loss.mean()

    def nothing_to_learn(self, rows: int) -> str:
        """Why the last step had nothing to compare its rows with; empty where it had."""
        if self._compared > 1:
            return ""
        return f"it has {rows} text, which is compared with itself alone. {MORE_ROWS}"

    @torch.no_grad()
    def _told(self, student_scores: Tensor, teacher_scores: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        """Metrics of each row, ``(q,)``, in the order of ``metric_names``."""
        if self.include_diagonal:
            teacher_self = _self_probability(teacher_scores, own, self.teacher_temperature or self.temperature)
            student_self = _self_probability(student_scores, own, self.student_temperature or self.temperature)
        else:
            teacher_self = student_self = student_scores.new_zeros(len(own))
        nearest = [scores.scatter(1, own, -torch.inf).argmax(dim=1) for scores in (student_scores, teacher_scores)]
        return teacher_self, student_self, (nearest[0] == nearest[1]).float()

    @torch.no_grad()
    def _warn_when_saturated(self, teacher: Tensor, all_teachers: Tensor, diagonal: Tensor) -> None:
        """Measure the first batch: a teacher that sees only the text itself has nothing to teach."""
        if not self.include_diagonal or self._checked_first_batch or len(all_teachers) < 2:
            return
        self._checked_first_batch = True
        temperature = self.teacher_temperature or self.temperature
        some = slice(None, functional.rows_at_once(len(all_teachers)))
        scores, own = functional.cosine_scores(teacher[some], all_teachers), diagonal[some, None]  # (q, C), (q, 1)
        measured = _self_probability(scores, own, temperature).mean().item()
        if measured <= _ALL_SELF:
            return
        low, high = temperature, temperature * 1e4
        for _ in range(40):  # bisection: self-probability falls as the temperature rises
            middle = (low * high) ** 0.5
            share = _self_probability(scores, own, middle).mean()
            low, high = (middle, high) if share > _HALF_SELF else (low, middle)
        logger.warning(
            "At teacher_temperature=%g the teacher gives %.4f of its probability to the text itself and %.2g to all %d "
            "others together: the student learns to tell texts apart rather than the teacher's similarities, and then "
            "the gradient vanishes. Set `include_diagonal=False`, or raise `teacher_temperature` (on this batch it is "
            "one half at %.2g).",
            temperature,
            measured,
            1 - measured,
            len(all_teachers) - 1,
            high,
        )


def _self_probability(scores: Tensor, own: Tensor, temperature: float) -> Tensor:
    return (scores / temperature).softmax(dim=1).gather(1, own).squeeze(1)
