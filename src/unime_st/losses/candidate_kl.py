"""Stage 2 of UniME-V2: learn a judge's scores of each query's own candidates, its soft labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st import functional
from unime_st.columns import NO_CANDIDATE
from unime_st.features import num_rows
from unime_st.functional import KLDirection
from unime_st.losses.checks import check_columns, check_scores
from unime_st.losses.in_batch import InBatchLoss
from unime_st.published import UNIME_V2_CITATION


class CandidateKLLoss(InBatchLoss):
    """KL divergence between a judge's and the student's softmax over each row's own candidates.

    A row's candidates are its positive and its negatives. Their cosines with the query, divided by the temperature,
    become a distribution, and so do the scores that a judge (a reranker, an MLLM asked for yes or no) gave them; see
    :func:`~unime_st.data.judge_negatives`. Other rows are not compared with. The loss is the mean over the rows of the
    global batch, without a factor of the squared temperature: each process averages its own rows, and the
    data-parallel wrapper averages over processes.

    Rows may have differing numbers of candidates: where a row has none, its score is -1, and the cell holds any input
    that trains, such as the row's positive again, which costs nothing: equal inputs are embedded once.

    Args:
        model: The model to train; None when only :meth:`compute_loss_from_embeddings` is used.
        temperature: Divides the cosines and, unless ``teacher_temperature`` is given, the scores, > 0.
        teacher_temperature: Divides the scores, in place of ``temperature``.
        direction: ``"symmetric"``, the mean of both, as in the published code; ``"teacher_student"`` is
            KL(judge ‖ student), the usual distillation; ``"student_teacher"`` is KL(student ‖ judge).
        gather_across_devices: Embed an input that several processes have on one of them (with GradCache); the loss
            is the same.
        mini_batch_size: Distinct inputs embedded at a time (GradCache); None embeds each column at once.
        mini_batch_num_tokens: Tokens embedded at a time, padding included, in place of a number of inputs; ``"auto"``
            chooses from the memory that is free, see :class:`~unime_st.losses.in_batch.InBatchLoss`.

    Attributes:
        last_metrics: Numbers of the last batch, as scalars on the device: ``judge_positive_probability`` and
            ``student_positive_probability`` (mean probability of the positive), ``best_candidate_agreement`` (share of
            rows whose best candidate is the same for both) and ``candidates_per_row`` (mean), over the local rows.
            :class:`~unime_st.losses.LossMetricsCallback` logs their means.

    Raises:
        ValueError: At construction on arguments out of range; on a batch when scores are missing, have another length
            than the candidates, are NaN or outside 0..1 (named by row and column), or when a positive has none.

    Inputs:
        +-------------------------------------------------+------------------------------------------------+
        | Columns                                         | Label                                          |
        +=================================================+================================================+
        | (anchor, positive, negative_1, ..., negative_n) | scores ``(B, 1 + n)`` in 0..1, the positive's  |
        |                                                 | first; -1 where a row has no candidate         |
        +-------------------------------------------------+------------------------------------------------+

    Relations:
        ``DistillKLDivLoss`` of sentence-transformers is the direction ``"teacher_student"`` with as many candidates in
        every row, times the squared temperature, and for dot products unless told otherwise.
        :class:`~unime_st.losses.HardNegativeInfoNCELoss` contrasts with the batch and knows no scores; rows without
        scores may train with it in the same run, as another data set: ``loss={"judged": ..., "pairs": ...}``.
        ``MatryoshkaLoss`` may wrap it; in plain mode, it cuts the label too when ``1 + n`` happens to equal the
        student's dimension, which a ``mini_batch_size`` avoids.

    References:
        UniME-V2, section 3.3: https://arxiv.org/abs/2510.13515. The paper speaks of the Jensen-Shannon divergence; its
        code is the symmetric KL divergence, and so is this, but for the 1e-8 that is added inside its logarithms.

    Example:
        >>> loss = CandidateKLLoss(None, temperature=0.5)
        >>> query, positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1]])
        >>> loss.compute_loss_from_embeddings([query, positive, negative], torch.tensor([[1.0, 0.0]]))
        tensor(0.)
    """

    compares_own_candidates = True
    metric_names = (
        "judge_positive_probability",
        "student_positive_probability",
        "best_candidate_agreement",
        "candidates_per_row",
    )

    def __init__(
        self,
        model: SentenceTransformer | None,
        *,
        temperature: float = 0.02,
        teacher_temperature: float | None = None,
        direction: KLDirection = "symmetric",
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
        if teacher_temperature is not None:
            functional.check_temperature("teacher_temperature", teacher_temperature)
        self.teacher_temperature = teacher_temperature
        self.direction = direction

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss."""
        columns = list(sentence_features)
        if len(columns) < 3:
            raise ValueError(
                f"{type(self).__name__} needs the columns (anchor, positive, negative_1, ...), got {len(columns)} "
                "column(s): over one candidate every softmax is 1. Judge mined negatives, e.g. by "
                "`unime_st.data.judge_negatives`."
            )
        # before the expensive part
        check_scores(labels, len(columns) - 1, num_rows(columns[0]), self.model, columns)
        return self.embed_and_compute(columns, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Compute the loss from embeddings and scores.

        Args:
            embeddings: One ``(B, D)`` tensor a column: queries, positives, negatives.
            labels: ``(B, 1 + n)`` scores, see the class.

        Returns:
            The mean loss over this process's rows, a scalar.

        Raises:
            ValueError: On columns or scores that do not fit (see the class).
        """
        check_columns(embeddings, 3, "Queries, positives and negatives")
        check_scores(labels, len(embeddings) - 1, len(embeddings[0]))
        return self.compute_loss(embeddings, labels)

    def compute_loss(self, embeddings: list[Tensor], targets: Tensor | None) -> Tensor:
        """Compute the loss from embeddings and scores that were checked."""
        student = functional.own_candidate_scores(embeddings[0], embeddings[1:])  # (B, 1 + n)
        judge = cast("Tensor", targets).detach().to(student)
        missing = judge == NO_CANDIDATE
        loss = functional.candidate_kl(
            student,
            judge,
            student_temperature=self.temperature,
            teacher_temperature=self.teacher_temperature or self.temperature,
            direction=self.direction,
            missing=missing,
        )
        self.record_metrics(self._told(student, judge, missing))
        return loss.mean()

    def nothing_to_learn(self, rows: int) -> str:
        """Why the last step had nothing to compare its rows with; empty where it had."""
        if float(self.last_metrics["candidates_per_row"]) > 1:
            return ""
        return f"its {rows} row(s) have a positive and no negative, and over one candidate every softmax is 1."

    @torch.no_grad()
    def _told(self, student: Tensor, judge: Tensor, missing: Tensor) -> dict[str, Tensor]:
        temperatures = self.teacher_temperature or self.temperature, self.temperature
        logits = [
            (scores / temperature).masked_fill(missing, -torch.inf)
            for scores, temperature in zip((judge, student), temperatures, strict=True)
        ]
        told = [scores.softmax(dim=1)[:, 0].mean() for scores in logits]
        agreement = (logits[0].argmax(dim=1) == logits[1].argmax(dim=1)).float().mean()
        told += [agreement, (~missing).sum(dim=1).float().mean()]
        return dict(zip(self.metric_names, told, strict=True))

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return UNIME_V2_CITATION
