"""The rules by which some rows of a batch are contrasted, in either direction, and the numbers told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unime_st import functional
from unime_st.identity.features import mix64


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What is known of a global batch, and the settings of ``HardNegativeInfoNCELoss`` for this step."""

    num_rows: int  # N
    labels: Tensor | None  # (N,) integer identity of each row's target
    query_ids: Tensor | None  # (N,) integer identity of each query's content
    candidate_ids: Tensor | None  # (C,) integer identity of each candidate's content
    k: int | None  # negatives to keep; None keeps all
    margin: float | None
    temperature: float
    trust_explicit: bool  # whether a row's own explicit negatives pass the margin
    hardness_mode: str | None
    hardness_strength: float
    seed: Tensor | None  # of the random choice of negatives; None chooses the hardest

    def query_to_doc(self, scores: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Loss of some queries, ``(q,)``, from their scores ``(q, C)``, and what :func:`means` makes metrics of."""
        own = None
        if self.trust_explicit or (self._weights and self.hardness_mode != "all_negatives"):
            own = functional.own_explicit_negatives(rows, self.num_rows, scores.shape[1], self.candidate_ids)
        negatives = functional.hardest_valid_negatives(
            scores,
            rows,
            self.k,
            self.margin,
            candidate_ids=self.candidate_ids,
            query_ids=self.query_ids,
            labels=self.labels,
            trusted=own if self.trust_explicit else None,
            priority=self._priority(rows, scores.shape[1]),
        )
        weighted = None  # all
        if own is not None and self.hardness_mode in ("hard_negatives", "in_batch_negatives"):
            weighted = (own if self.hardness_mode == "hard_negatives" else ~own).gather(1, negatives.columns)
        loss, positive = self._info_nce(scores, rows, negatives, weighted)
        others = functional.similarity_to_others(scores.detach(), negatives.right, self.num_rows)
        return loss, positive.detach(), *_summed(negatives), others

    def doc_to_query(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Loss of some rows' positives, ``(q,)``, from their scores with all queries, ``(q, N)``."""
        negatives = functional.hardest_valid_negatives(
            scores,
            rows,
            self.k,
            self.margin,
            candidate_ids=self.query_ids,
            query_ids=None if self.candidate_ids is None else self.candidate_ids[: self.num_rows],
            labels=self.labels,
            priority=self._priority(rows + self.num_rows, scores.shape[1]),  # an order of its own
        )
        weighted = None
        if self.hardness_mode == "hard_negatives":
            weighted = torch.zeros_like(negatives.columns, dtype=torch.bool)
        return self._info_nce(scores, rows, negatives, weighted)[0]

    @property
    def _weights(self) -> bool:
        return self.hardness_mode is not None and self.hardness_strength > 0

    def _priority(self, rows: Tensor, num_candidates: int) -> Tensor | None:
        return None if self.seed is None else shuffled_priority(self.seed, rows, num_candidates)

    def _info_nce(
        self, scores: Tensor, rows: Tensor, negatives: functional.HardNegatives, weighted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss and score of the positive of each row, ``(q,)``."""
        penalties = None
        if self._weights:
            penalties = functional.hardness_penalties(negatives.scores, self.hardness_strength, weighted)
        positive = scores.gather(1, rows[:, None]).squeeze(1)  # (q,)
        return functional.info_nce(positive, negatives.scores, self.temperature, penalties), positive


def shuffled_priority(seed: int | Tensor, rows: Tensor, num_candidates: int) -> Tensor:
    """Random order ``(Q, C)`` of the candidates for rows ``(Q,)``, the same on whatever process a row is computed."""
    columns = torch.arange(num_candidates, device=rows.device)
    return mix64(mix64(mix64(rows) + seed)[:, None] + columns[None, :])  # (Q, C)


@torch.no_grad()
def _summed(negatives: functional.HardNegatives) -> tuple[Tensor, ...]:
    """Sum each row's similarities to its negatives; count those kept, dropped by margin and by identity, ``(q,)``."""
    kept = negatives.scores > -torch.inf  # (q, K)
    total = negatives.scores.masked_fill(~kept, 0.0).sum(dim=1)
    return total, kept.sum(dim=1, dtype=torch.int32), negatives.filtered_by_margin, negatives.filtered_by_identity


@torch.no_grad()
def means(told: Sequence[Tensor]) -> dict[str, Tensor]:
    """Metrics of a batch, scalars, from what :meth:`Contrast.query_to_doc` tells of each of its rows, ``(Q,)`` each."""
    positive, total, kept, by_margin, by_identity, others = told
    margin, identity = by_margin.float().mean(), by_identity.float().mean()
    return {
        "positive_similarity": positive.mean(),
        "hard_negative_similarity": total.sum() / kept.sum().clamp(min=1),
        "negative_similarity": others.nanmean().nan_to_num(0.0),
        "false_negatives_filtered": margin + identity,
        "false_negatives_by_margin": margin,
        "false_negatives_by_identity": identity,
        "rows_without_negatives": (kept == 0).sum().float(),
    }
