"""What the losses share: embedding each distinct input once, plain or with GradCache, and the numbers of a step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import has_static_embedding_input
from torch import Tensor, nn

from unime_st import distributed
from unime_st.features import num_rows, select_rows, token_counts
from unime_st.identity.features import input_keys
from unime_st.losses.again import Randomness
from unime_st.losses.checks import check_at_least_one
from unime_st.losses.finite import refuse_non_finite
from unime_st.losses.grad_cache import BatchEmbedder, GradientSender, cached_backward, embedded_together
from unime_st.losses.mini_batches import MiniBatchPlan, plan_mini_batches
from unime_st.placement import device_of, moved, sent, with_numbers_at_hand
from unime_st.step_encoder import step_encoder
from unime_st.token_budget import AUTO, TokenBudget, require_tokens

logger = logging.getLogger(__name__)

UNIME_CITATION = """
@article{gu2025unime,
    title={Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs},
    author={Gu, Tiancheng and Yang, Kaicheng and Feng, Ziyong and Wang, Xingjun and Zhang, Yanzhao and Long, Dingkun
        and Chen, Yingda and Cai, Weidong and Deng, Jiankang},
    journal={arXiv preprint arXiv:2504.17432},
    year={2025}
}
"""


class InBatchLoss(nn.Module):
    """Base of the losses, most of which compare a whole batch with itself; plain and GradCache in one class.

    A subclass implements :meth:`compute_loss` and :meth:`nothing_to_learn`, and names its ``metric_names``, which every
    step records, so that processes agree on them. Inputs that are equal, in whatever row, column or (with GradCache and
    ``gather_across_devices``) process, are embedded once, and their gradients summed. With ``mini_batch_size`` or
    ``mini_batch_num_tokens`` given, they are embedded in mini-batches of like length, each twice (GradCache,
    https://huggingface.co/papers/2101.06983) but for the last, so that memory no longer grows with the batch. Loss and
    gradients are the same. ``mini_batch_num_tokens="auto"`` chooses on a CUDA device, from what the first steps take of
    the free memory; a step that runs out of it is done again with half, as if nothing had been (a loss that was given
    back before, and its metrics, stay those of the first try). On the CPU it is 1,024. It is for one process without a
    process group.

    Attributes:
        global_step: Optimizer steps that training has made, as :class:`~unime_st.losses.LossMetricsCallback` tells at
            the beginning of each; None where nobody tells. A training loop of one's own sets it.
        last_plan: What the last step embedded; its ``distinct`` counts inputs.
    """

    metric_names: ClassVar[tuple[str, ...]] = ()
    compares_own_candidates: ClassVar[bool] = False
    """Whether a row is compared with its own candidates alone, and with no other row's."""

    def __init__(
        self,
        model: SentenceTransformer | None,
        *,
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | Literal["auto"] | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one("mini_batch_size", mini_batch_size, "embeds the batch at once")
        if isinstance(mini_batch_num_tokens, str):
            require_tokens("mini_batch_num_tokens", mini_batch_num_tokens)
        else:
            check_at_least_one("mini_batch_num_tokens", mini_batch_num_tokens, "embeds the batch at once")
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        # sentence-transformers asks each instance, e.g. in MatryoshkaLoss.
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        stock = isinstance(model, SentenceTransformer)
        if self.uses_gradient_cache and stock and has_static_embedding_input(model):
            raise ValueError(
                f"{type(self).__name__} cannot split the inputs of a StaticEmbedding into mini-batches. "
                "Leave `mini_batch_size` and `mini_batch_num_tokens` at None."
            )
        self.global_step: int | None = None
        self.rising_steps = 0  # of the learning rate, as the callback says
        self.last_plan: MiniBatchPlan | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self._metric_sums: dict[str, Tensor] = {}
        self._metric_steps = 0
        self._told_of_nothing = False
        self._budget: TokenBudget | None = None  # with "auto"
        self._is_again = False  # whether a step is done again, whose metrics are known

    def compute_loss(self, embeddings: list[Tensor], targets: Any) -> Tensor:
        """Compute the loss of this process's rows from one ``(B, D)`` tensor a column, and what ``forward`` knows."""
        raise NotImplementedError

    def embed_and_compute(self, columns: Iterable[dict[str, Tensor]], targets: Any) -> Tensor:
        """Embed each column, in mini-batches if asked to, and compute the loss."""
        if self.model is None:
            raise ValueError(
                f"{type(self).__name__} was made with `model=None`, so it cannot embed. "
                "Call `compute_loss_from_embeddings`, or give it a model."
            )
        features = list(columns)
        if self.uses_gradient_cache:
            return self._cached_step(features, targets)
        return self._plain_step(features, targets)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """Compute the loss from embeddings and, if asked to, their gradients: what ``MatryoshkaLoss`` hooks into."""
        loss = self.compute_loss([torch.cat(parts) for parts in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _plain_step(self, columns: list[dict[str, Any]], targets: Any) -> Tensor:
        """Embed each column's distinct inputs at once, and keep all activations."""
        batch, device = num_rows(columns[0]), device_of(columns)
        columns = [with_numbers_at_hand(column) for column in columns]
        keys = input_keys(columns)[:, :batch].flatten()
        tokens = torch.ones_like(keys)
        # A data-parallel wrapper wants as many passes of each process, so as many as there are columns.
        plan = plan_mini_batches(keys.numpy()[None], tokens.numpy()[None], batch, least=len(columns))
        self.last_plan = plan
        parts = [
            columns[column] if len(rows) == batch else select_rows(columns[column], rows.tolist())
            for column, rows in plan.mini_batches
        ]
        table = torch.cat(embedded_together(self.model, [moved(part, device) for part in parts]))
        place = sent(torch.from_numpy(plan.place), table.device)
        embeddings = list(table[place].unbind())
        loss = self.compute_loss(embeddings, targets)
        self._check(loss, columns, embeddings)
        return loss

    def _cached_step(self, columns: list[dict[str, Any]], targets: Any) -> Tensor:
        """Embed in mini-batches without keeping activations, and again in the backward pass."""
        training = torch.is_grad_enabled()
        device = device_of(columns)
        columns = [with_numbers_at_hand(column) for column in columns]
        budget = self._budget = self._budget_of(device)
        randomness = Randomness(device) if budget is not None else None
        with ExitStack() as step:
            step.enter_context(step_encoder(self.model).keeping_features())
            embedder, embeddings = self._embedded(columns, device, randomness, training=training)
            loss = self.calculate_loss([[column] for column in embeddings], targets, with_backward=training)
            if not training:
                return loss
            self._check(loss, columns, embeddings)
            send = GradientSender(embedder, embedder.gradients(embeddings))
            if budget is not None and randomness is not None:
                send.again = partial(self._again, columns, device, targets, randomness)
                send.learn = budget.learn
            return cached_backward(loss, send, step.pop_all().close)

    def _budget_of(self, device: torch.device) -> TokenBudget | None:
        """The budget of mini-batches that is chosen as training goes on; None where numbers are given."""
        if self.mini_batch_num_tokens != AUTO:
            return None
        if distributed.has_process_group():
            raise ValueError(
                '`mini_batch_num_tokens="auto"` chooses for one process by itself, while those of a process group must '
                "take the same steps. Give the number that a run on one process logs."
            )
        budget = self._budget
        return budget if budget is not None and budget.device == device else TokenBudget(device, "a mini-batch")

    def _embedded(
        self, columns: list[dict[str, Any]], device: torch.device, randomness: Randomness | None, *, training: bool
    ) -> tuple[BatchEmbedder, list[Tensor]]:
        """What embeds the columns, and their embeddings; with a budget as often as it takes to fit into memory."""
        while True:
            budget = self._budget
            if budget is not None:
                budget.start()
            plan = self.last_plan = self._plan(columns, device, training=training)
            embedder = BatchEmbedder(self.model, columns, plan, device=device, exchange=self.gather_across_devices)
            if budget is None or randomness is None:
                return embedder, embedder.embed()
            try:
                return embedder, embedder.embed()
            except torch.OutOfMemoryError:
                if plan.rows <= 1:
                    raise
            del embedder
            self._halve(budget, plan, randomness)

    def _halve(self, budget: TokenBudget, plan: MiniBatchPlan, randomness: Randomness) -> None:
        """Be as before the step, which ran out of memory, but with half of the tokens a mini-batch."""
        step_encoder(self.model).forget_features()
        budget.halve(plan.tokens)
        randomness.restore()

    def _again(
        self,
        columns: list[dict[str, Any]],
        device: torch.device,
        targets: Any,
        randomness: Randomness,
        plan: MiniBatchPlan,
    ) -> tuple[BatchEmbedder, list[Tensor]]:
        """Do a step again whose backward pass ran out of memory: what embeds, and gradients of its mini-batches."""
        assert self._budget is not None
        self._halve(self._budget, plan, randomness)
        self._is_again = True
        try:
            with torch.enable_grad():
                embedder, embeddings = self._embedded(columns, device, randomness, training=True)
                self.calculate_loss([[column] for column in embeddings], targets, with_backward=True)
            return embedder, embedder.gradients(embeddings)
        finally:
            self._is_again = False

    def _plan(self, columns: Sequence[dict[str, Any]], device: torch.device, *, training: bool) -> MiniBatchPlan:
        """Decide who embeds what, the same on every process."""
        batch = num_rows(columns[0])
        keys = input_keys(columns).flatten()
        counts = [token_counts(features) for features in columns]
        if self.mini_batch_num_tokens is not None and any(count is None for count in counts):
            raise ValueError(
                "`mini_batch_num_tokens` needs an attention mask to count tokens by, but these features have none. Use "
                "`mini_batch_size`."
            )
        tokens = torch.cat([keys.new_ones(batch) if count is None else count.to(keys) for count in counts])
        spans = self.gather_across_devices and distributed.is_distributed()
        told = torch.stack([keys, tokens])[None]
        table = (distributed.gather(told.to(device)) if spans else told).cpu().numpy()  # (W, 2, n * B)

        num_tokens: Any = self.mini_batch_num_tokens if self._budget is None else self._budget.tokens

        def planned(least: int) -> MiniBatchPlan:
            return plan_mini_batches(
                table[:, 0],
                table[:, 1],
                batch,
                rank=distributed.rank() if spans else 0,
                size=self.mini_batch_size,
                num_tokens=num_tokens,
                least=least,
            )

        plan = planned(1)
        if training and not spans:  # sharded weights are gathered by all processes, as often on each
            least = distributed.max_over_processes(len(plan.mini_batches), device)
            plan = plan if least == len(plan.mini_batches) else planned(least)
        return plan

    def nothing_to_learn(self, rows: int) -> str:
        """Why the last step, whose loss is 0, had nothing to compare its rows with; empty where it had."""
        raise NotImplementedError

    def _check(self, loss: Tensor, columns: Sequence[dict[str, Any]], embeddings: Sequence[Tensor]) -> None:
        """Refuse a training step's loss that is not finite, and say once when there is nothing to learn."""
        if not (self.training and torch.is_grad_enabled()):
            return
        value = loss.item()
        refuse_non_finite(value, self.model, columns, embeddings)
        self.look_back()
        if value == 0 and not self._told_of_nothing and (reason := self.nothing_to_learn(len(embeddings[0]))):
            self._told_of_nothing = True
            logger.warning("Nothing is learned from a batch: %s This is said once.", reason)

    def look_back(self) -> None:
        """Judge the training steps so far; called in each, once its loss has been read off the device."""

    @property
    def counts(self) -> bool:
        """Whether what is computed now is a training step, and not one that is done again."""
        return self.training and torch.is_grad_enabled() and not self._is_again

    def record_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Keep the numbers of a step on the device, and add them to the running means when it is a training step."""
        self.last_metrics = {name: value.detach() for name, value in metrics.items()}
        if self.counts:
            for name, value in self.last_metrics.items():
                self._metric_sums[name] = self._metric_sums[name] + value if name in self._metric_sums else value
            self._metric_steps += 1

    def pop_mean_metrics(self) -> dict[str, Tensor]:
        """Return the means over the training steps since the last call, and start anew."""
        means = {name: total / self._metric_steps for name, total in self._metric_sums.items()}
        self._metric_sums, self._metric_steps = {}, 0
        return means

    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments, kept under their names, for the model card."""
        kinds = (kind for kind in type(self).__mro__ if issubclass(kind, InBatchLoss))
        names = (name for kind in kinds for name in inspect.signature(kind).parameters if name != "model")
        return {name: vars(self)[name] for name in names if name in vars(self)}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return UNIME_CITATION
