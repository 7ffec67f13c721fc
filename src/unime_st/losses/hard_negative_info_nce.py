"""Stage 2 of UniME: contrast each query with its hardest negatives, false negatives left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st import distributed, functional
from unime_st.features import num_rows
from unime_st.identity.features import batch_identities, equal_to_nothing
from unime_st.losses.checks import (
    all_left_out,
    check_at_least_one,
    check_columns,
    check_content_ids,
    check_directions,
    check_hard_negatives_warmup,
    check_hardness,
    check_labels,
    check_negative_selection,
    check_offered,
    few_of_a_small_batch,
    require_step,
)
from unime_st.losses.cone import ConeWatch
from unime_st.losses.contrast import Contrast, means
from unime_st.losses.in_batch import InBatchLoss

logger = logging.getLogger(__name__)

Direction = Literal["query_to_doc", "doc_to_query"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


class Targets(NamedTuple):
    """What is known of the rows of a batch beside their embeddings."""

    labels: Tensor | None  # (B,) integer identity of each row's target
    content_ids: Tensor | None  # (B, n) integers that are equal for equal contents, one column each


class HardNegativeInfoNCELoss(InBatchLoss):
    """InfoNCE over the positive and the ``k`` hardest in-batch negatives, after false negatives are dropped.

    Candidates are all positives and all explicit negatives of the batch, of every process's batch with
    ``gather_across_devices``. For each query, these are left out:

    * by margin: candidates with cos(query, candidate) > cos(query, positive) + ``margin``;
    * by identity: candidates with the content of a right answer or of the query itself, where right answers are the
      row's own positive and those of rows with the same ``label`` or the same query content;
    * repetitions: equal candidates count once, or a popular target would fill several of the ``k`` places.

    Of the rest, the ``num_hard_negatives`` most similar are kept; a row with fewer contrasts with those it has, and a
    row with none has loss 0 and is counted in ``rows_without_negatives``. The loss is the mean over rows of the global
    batch: each process averages its own rows, and the data-parallel wrapper averages over processes.

    Contents are known through ``content_id``, which :class:`~unime_st.modules.MultimodalEncoder` adds to the features;
    with stock modules, text is told apart by its tokens, and images need a ``label``.

    Args:
        model: The model to train; None when only :meth:`compute_loss_from_embeddings` is used.
        temperature: Divides the cosine similarities, > 0.
        margin: See above; may be negative. None switches the filter by score off.
        num_hard_negatives: ``k``, >= 1; None keeps all valid candidates. The paper keeps 8 of 1,024. A few of a small
            batch make embeddings alike (``benchmarks/ablation.py`` measures it): with more than an eighth of the first
            batch's candidates, and fewer than all, a warning says so.
        hard_negatives_warmup_steps: Training steps that compare with all valid candidates before ``num_hard_negatives``
            are kept; 0 for none. The hardest alone do not open the cone that embeddings start in after stage 1, where
            all inputs are alike, and all negatives do within a few steps. What counts are the Trainer's optimizer
            steps, told by :class:`~unime_st.losses.LossMetricsCallback`, which this needs: the same on all processes,
            however a step is split, and resumed with checkpoints. Evaluation always keeps ``num_hard_negatives``.
        negative_selection: ``"hardest"``, or ``"random"`` to draw ``k`` among the valid ones: the baseline that shows
            what hardness is worth. Draws come from torch's CPU generator, so the Trainer seeds and resumes them.
        filter_explicit_negatives: Whether the margin applies to a row's own explicit negatives too. False trusts them,
            which pays when they are certain and close, such as captions with one attribute swapped: those that the
            model confuses most are otherwise the ones it never learns from.
        directions: ``("query_to_doc",)``, or with ``"doc_to_query"`` too: each positive is then also contrasted with
            the queries of other rows, by the same rules, and the loss is the mean of both. Explicit negatives and
            metrics belong to the first direction only.
        hardness_mode: Which negatives that are kept weigh more the harder they are: ``"in_batch_negatives"`` (other
            rows' positives and explicit negatives, as in LLaVE), ``"hard_negatives"`` (a row's own explicit negatives
            and what equals one, as in EmbeddingGemma), ``"all_negatives"``; None for none. In the direction
            ``"doc_to_query"`` all negatives are other rows', so ``"hard_negatives"`` weights none of them.
        hardness_strength: Alpha, >= 0: ``hardness_strength * cos``, without gradient and not divided by the
            temperature, is added to the logit. LLaVE has 9, EmbeddingGemma 5.
        gather_across_devices: Take candidates from all processes.
        mini_batch_size: Distinct inputs embedded at a time (GradCache); None embeds each column at once.
        mini_batch_num_tokens: Tokens embedded at a time, padding included, in place of a number of inputs; ``"auto"``
            chooses from the memory that is free, see :class:`~unime_st.losses.in_batch.InBatchLoss`.

    Attributes:
        last_metrics: Numbers of the last batch, as scalars on the device: ``positive_similarity`` and
            ``hard_negative_similarity`` (mean cosines with the positive and with the negatives kept),
            ``negative_similarity`` (mean cosine with the positives of other rows, kept or not, that are no right answer
            by identity: near 1, different inputs are all alike), ``false_negatives_filtered`` (candidates a row lost to
            either filter, mean) with its parts ``false_negatives_by_margin`` and ``false_negatives_by_identity``,
            ``rows_without_negatives`` (a count), all over the local rows.
            :class:`~unime_st.losses.LossMetricsCallback` logs their means.

    Raises:
        ValueError: At construction on arguments out of range; on a batch when ``num_hard_negatives`` exceeds what the
            *first* training batch offers (later batches may be smaller, as an epoch's last one is, and keep what they
            have), when columns or labels do not fit, or when a warm-up is asked for and nobody tells the step.

    Inputs:
        +-------------------------------------------------+------------------------------------------+
        | Columns                                         | Label                                    |
        +=================================================+==========================================+
        | (anchor, positive), each text, image or both    | none, or an integer identity of positive |
        +-------------------------------------------------+------------------------------------------+
        | (anchor, positive, negative_1, ..., negative_n) | the same                                 |
        +-------------------------------------------------+------------------------------------------+

    Relations:
        With ``margin=None``, ``num_hard_negatives=None`` and no repeated content it equals
        ``MultipleNegativesRankingLoss(scale=1 / temperature)``, or its cached form with a mini-batch given.
        ``GISTEmbedLoss`` also drops false negatives, but by a guide model, and keeps all the others.
        ``directions``, ``hardness_mode`` and ``hardness_strength`` are the ranking loss's, with its
        ``partition_mode="per_direction"`` for two directions. That weights the first direction alone; here, as in
        LLaVE, both are weighted.
        ``MatryoshkaLoss`` may wrap it.

    References:
        UniME, section 3.3: https://arxiv.org/abs/2504.17432. The margin is the paper's, as ``num_hard_negatives=8``
        is; the temperature is the published code's. The filter by identity and the count of repetitions go beyond it:
        a copy of the positive is as similar as the positive and passes every margin >= 0. Weighting by hardness: LLaVE,
        equation 5, https://arxiv.org/abs/2503.04812; EmbeddingGemma, https://arxiv.org/abs/2509.20354.

    Example:
        >>> loss = HardNegativeInfoNCELoss(None, margin=0.1, num_hard_negatives=2)
        >>> queries, targets = torch.eye(4), torch.eye(4) + 0.5
        >>> round(loss.compute_loss_from_embeddings([queries, targets]).item(), 4)
        0.0
        >>> float(loss.last_metrics["rows_without_negatives"])
        0.0
    """

    metric_names = (
        "positive_similarity",
        "hard_negative_similarity",
        "negative_similarity",
        "false_negatives_filtered",
        "false_negatives_by_margin",
        "false_negatives_by_identity",
        "rows_without_negatives",
    )

    def __init__(
        self,
        model: SentenceTransformer | None,
        *,
        temperature: float = 0.02,
        margin: float | None = 0.1,
        num_hard_negatives: int | None = None,
        hard_negatives_warmup_steps: int = 0,
        negative_selection: Literal["hardest", "random"] = "hardest",
        filter_explicit_negatives: bool = True,
        directions: Sequence[Direction] = ("query_to_doc",),
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
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
        check_at_least_one("num_hard_negatives", num_hard_negatives, "keeps all")
        check_hard_negatives_warmup(hard_negatives_warmup_steps, num_hard_negatives)
        check_hardness(hardness_mode, hardness_strength)
        functional.check_margin(margin)
        check_negative_selection(negative_selection, num_hard_negatives)
        self.temperature = functional.check_temperature("temperature", temperature)
        self.margin = margin
        self.num_hard_negatives = num_hard_negatives
        self.hard_negatives_warmup_steps = hard_negatives_warmup_steps
        self.negative_selection = negative_selection
        self.filter_explicit_negatives = filter_explicit_negatives
        self.directions = check_directions(directions)
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self._checked_first_batch = False
        self._warned_unknown = False
        self._offered = 0
        self._cone: ConeWatch | None = ConeWatch()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"{type(self).__name__} needs the columns (anchor, positive[, negative_1, ...]), got {len(columns)} "
                "column(s). Add the missing one to the data set, or select the right columns."
            )
        ids, unknown = batch_identities(columns)
        if unknown and labels is None and not self._warned_unknown:
            self._warned_unknown = True
            logger.warning(
                "Column(s) %s hold images, or packed text, without `content_id`, so equal contents there cannot be "
                "recognised: their false negatives are found by margin only. Load the model with "
                "`unime_st.load_encoder`, or give an integer `label` column that identifies the target.",
                unknown,
            )
        if labels is not None:
            check_labels(labels, num_rows(columns[0]))
        return self.embed_and_compute(columns, Targets(labels, ids))

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None, content_ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Compute the loss from embeddings.

        Args:
            embeddings: One ``(B, D)`` tensor a column: queries, positives, then any explicit negatives.
            labels: ``(B,)`` integer identity of each row's target, or None.
            content_ids: One ``(B,)`` integer tensor a column, identifying equal contents, or None.

        Returns:
            The mean loss over this process's rows, a scalar.

        Raises:
            ValueError: On columns or labels of the wrong shape or type, or too few candidates (see the class).
        """
        check_columns(embeddings, 2, "Queries, positives and explicit negatives")
        batch = len(embeddings[0])
        if labels is not None:
            check_labels(labels, batch)
        if content_ids is not None:
            check_content_ids(content_ids, len(embeddings), batch)
        ids = None if content_ids is None else torch.stack(list(content_ids), dim=1)
        return self.compute_loss(embeddings, Targets(labels, ids))

    def compute_loss(self, embeddings: list[Tensor], targets: Targets) -> Tensor:
        """Compute the loss from one ``(B, D)`` tensor a column and what is known of the rows."""
        labels, ids = targets
        labels = None if labels is None else labels.long()
        queries, positives, documents = embeddings[0], embeddings[1], embeddings[1:]
        all_queries = queries
        both = "doc_to_query" in self.directions
        batch = len(queries)
        first_row = 0
        if self.gather_across_devices:
            first_row = distributed.rank() * batch
            if both:
                all_queries, *documents = distributed.gather_columns(embeddings)
            else:
                documents = distributed.gather_columns(documents)
            if ids is None and distributed.is_distributed():  # another process may know its rows and gather them
                ids = equal_to_nothing(batch, len(embeddings), queries.device)
            labels, ids = (None if known is None else distributed.gather(known) for known in (labels, ids))
        rows = torch.arange(batch, device=queries.device) + first_row  # (Q,) also the columns of the positives
        candidates = torch.cat(documents)  # (C, D)
        self._check_number_of_candidates(len(candidates))
        k = self._negatives_to_keep()
        contrast = self._contrast(labels, ids, len(documents[0]), k, rows.device)

        def by_row(some_queries: Tensor, some_positives: Tensor, some_rows: Tensor) -> tuple[Tensor, ...]:
            loss, *told = contrast.query_to_doc(functional.cosine_scores(some_queries, candidates), some_rows)
            if both:
                scores = functional.cosine_scores(some_positives, all_queries)  # (q, N)
                loss = (loss + contrast.doc_to_query(scores, some_rows)) / 2
            return loss, *told

        at_once = functional.rows_at_once(len(candidates) + both * len(all_queries))
        loss, *told = functional.by_rows(by_row, [queries, positives, rows], at_once)
        metrics = means(told)
        self.record_metrics(metrics)
        warming_up = k != self.num_hard_negatives
        rising = self.global_step is not None and self.global_step < self.rising_steps  # little is learned until then
        if self._cone is not None and not (warming_up or rising) and self.counts:
            self._cone.record(metrics["positive_similarity"], metrics["negative_similarity"], self.global_step)
        return loss.mean()

    def _contrast(
        self, labels: Tensor | None, ids: Tensor | None, num_rows: int, k: int | None, device: torch.device
    ) -> Contrast:
        """The rules of this pass over a global batch with ``labels`` ``(N,)`` and contents ``ids`` ``(N, n)``."""
        shuffled = self.negative_selection == "random" and k is not None
        return Contrast(
            num_rows=num_rows,
            labels=labels,
            query_ids=None if ids is None else ids[:, 0],
            candidate_ids=None if ids is None else ids[:, 1:].T.flatten(),
            k=k,
            margin=self.margin,
            temperature=self.temperature,
            trust_explicit=not self.filter_explicit_negatives,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            seed=distributed.shared_seed(device) if shuffled else None,
        )

    def _negatives_to_keep(self) -> int | None:
        """The number of negatives that this pass keeps; None, all, while training warms up."""
        if not (self.hard_negatives_warmup_steps and self.training and torch.is_grad_enabled()):
            return self.num_hard_negatives
        step = require_step(self.hard_negatives_warmup_steps, self.global_step)
        return None if step < self.hard_negatives_warmup_steps else self.num_hard_negatives

    def _check_number_of_candidates(self, num_candidates: int) -> None:
        """Refuse a `num_hard_negatives` the first training batch cannot meet; by shapes alone, so no sync."""
        offered = self._offered = num_candidates - 1
        if self._checked_first_batch or not (self.training and torch.is_grad_enabled()):
            return
        self._checked_first_batch = True
        advice = "" if self.hard_negatives_warmup_steps else few_of_a_small_batch(self.num_hard_negatives, offered)
        if advice and distributed.rank() == 0:
            logger.warning(advice)
        check_offered(self.num_hard_negatives, offered, gathers=self.gather_across_devices)

    def look_back(self) -> None:
        """Say once that embeddings stay in a cone."""
        if self._cone is None:
            return
        if advice := self._cone.advice(self.num_hard_negatives, self.hard_negatives_warmup_steps):
            self._cone = None
            if distributed.rank() == 0:
                logger.warning("%s This is said once.", advice)

    def nothing_to_learn(self, rows: int) -> str:
        """Why the last step had nothing to compare its rows with; empty where it had."""
        if int(self.last_metrics["rows_without_negatives"]) < rows:
            return ""
        lost = (float(self.last_metrics[f"false_negatives_by_{by}"]) for by in ("margin", "identity"))
        return all_left_out(rows, self._offered, self.margin, *lost)
