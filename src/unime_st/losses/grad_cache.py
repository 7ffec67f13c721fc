"""Embedding a batch: each distinct input once, in mini-batches whose activations do not add up (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Beside `has_static_embedding_input` the one use of sentence-transformers beyond its documented names.
from sentence_transformers.base.losses import RandContext
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unime_st import distributed
from unime_st.ahead import made_ahead
from unime_st.features import select_rows
from unime_st.losses.again import all_gradients_or_none
from unime_st.losses.mini_batches import MiniBatchPlan
from unime_st.placement import LATE, moved, read, sent
from unime_st.step_encoder import is_compiled, step_encoder, unwrapped

Outcome = Callable[[Any, dict[str, Any]], Tensor]
"""What is made of a model and the features of a batch."""


def embedded(model: Any, features: dict[str, Any]) -> Tensor:
    """Embeddings of a model, ``(B, D)``; an encoder that knows how to may leave out all else.

    A compiled model runs as it was compiled: packed sequences have another shape in every batch.
    """
    if is_compiled(model):
        return model(features)["sentence_embedding"]
    with step_encoder(model).embeddings_alone(last_token_only=_reads_last_token(model)):
        return model(features)["sentence_embedding"]


def _reads_last_token(model: Any) -> bool:
    """Whether embeddings are made of the state of each row's last token alone."""
    modules = unwrapped(model)
    pooling = modules[1] if isinstance(modules, nn.Sequential) and len(modules) > 1 else None
    return isinstance(pooling, Pooling) and pooling.pooling_mode == "lasttoken"


def embedded_together(model: Any, batches: Sequence[dict[str, Any]], outcome: Outcome | None = None) -> list[Tensor]:
    """What ``outcome`` makes of several batches of a step whose activations are kept, else embeddings ``(B, D)`` each.

    DistributedDataParallel is called once for all: it takes weights that its *last* call before the backward pass does
    not reach for unused, and fails when an earlier call has a gradient for them (the vision tower, where texts follow
    images).
    """
    outcome = outcome or embedded
    if not isinstance(model, DistributedDataParallel) or is_compiled(model) or "forward" in vars(model):
        return _images_last(
            model, batches, outcome
        )  # `MatryoshkaLoss` sets a forward of its own, which takes one batch
    inner = model.module
    own = vars(inner).get("forward")  # accelerate sets it, for autocast

    def restore() -> None:
        if own is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = own

    def one_by_one(several: Sequence[dict[str, Any]]) -> list[Tensor]:
        restore()
        return [outcome(inner, batch) for batch in several]

    inner.forward = one_by_one
    try:
        return list(model(list(batches)))
    finally:
        restore()


def _images_last(model: Any, batches: Sequence[dict[str, Any]], outcome: Outcome) -> list[Tensor]:
    """What ``outcome`` makes of several batches, by one call a batch; the last call reaches most weights."""
    order = list(range(len(batches)))
    if distributed.is_distributed():
        order.sort(key=lambda number: _shows_images(batches[number]))
    found = {number: outcome(model, batches[number]) for number in order}
    return [found[number] for number in range(len(batches))]


def _shows_images(features: dict[str, Any]) -> bool:
    count = read(features, "num_images_per_sample")
    return bool(count.any()) if count is not None else "pixel_values" in features


class BatchEmbedder:
    """Embeds the inputs of one step by a plan, without keeping their activations; then sends gradients back.

    The passes are GradCache's (https://huggingface.co/papers/2101.06983): all mini-batches are embedded without
    gradients, the loss is computed from all embeddings, and each mini-batch is embedded again with gradients, but for
    the last and largest, which keeps its activations. With ``exchange`` the plan spans all processes, which exchange
    embeddings and gradients.
    """

    def __init__(
        self,
        model: Any,
        columns: Sequence[dict[str, Any]],
        plan: MiniBatchPlan,
        *,
        device: torch.device,
        exchange: bool = False,
    ) -> None:
        self.model = model
        self.columns = columns  # whole numbers at hand on the CPU
        self.plan = plan
        self.device = device
        self.exchange = exchange and distributed.is_distributed()
        self._encoder = step_encoder(model)
        self._ahead = self._encoder.mini_batches_ahead if any(LATE in column for column in columns) else 0
        self._states: list[RandContext | None] = []
        self._kept: Tensor | None = None
        self._sizes = [len(rows) for _, rows in plan.mini_batches]

    def embed(self) -> list[Tensor]:
        """Embed all mini-batches; a column gives a leaf ``(B, D)``, whose gradient :meth:`gradients` collects."""
        training = torch.is_grad_enabled()
        last = len(self.plan.mini_batches) - 1
        parts = []
        coming = made_ahead(range(last + 1), self._prepared, ahead=self._ahead)
        for number in range(last + 1):
            keep = training and number == last
            if keep:
                torch.clear_autocast_cache()  # in older torch weights that were cast without gradients stay so
            with nullcontext() if keep else torch.no_grad(), self._unsynchronised(keep and last > 0):
                features = moved(next(coming), self.device)
                self._states.append(RandContext(*features.values()) if training and not keep else None)
                embeddings = embedded(self.model, features)
            del features  # before the next are made
            self._kept = embeddings if keep else None
            parts.append(embeddings.detach())
        table = torch.cat(parts)
        if self.exchange:
            table = distributed.gather(_padded(table, self.plan.share))
        place = sent(torch.from_numpy(self.plan.place), table.device)
        return [table[rows].requires_grad_(training) for rows in place]

    def gradients(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Collect the columns' gradients into one for each mini-batch, summed over processes and repetitions."""
        share = self.plan.share
        rows = share * (distributed.world_size() if self.exchange else 1)
        dtype = torch.promote_types(embeddings[0].dtype, torch.float32)
        total = torch.zeros(rows, embeddings[0].shape[1], dtype=dtype, device=embeddings[0].device)
        for place, column in zip(self.plan.place, embeddings, strict=True):
            if column.grad is not None:
                total.index_add_(0, sent(torch.from_numpy(place), total.device), column.grad.to(dtype))
        if self.exchange:
            total = distributed.sum_over_processes(total, share)
        return list(total[: sum(self._sizes)].split(self._sizes))

    def backward(self, gradients: Sequence[Tensor], scale: Tensor) -> None:
        """Embed each mini-batch again with gradients, and send its gradient times ``scale`` back, in one sync."""
        torch.clear_autocast_cache()
        collected = _Collected(self.model) if _reduces_every_backward(self.model) else None
        last = len(gradients) - 1
        again: int | None = None
        synchronised = False
        # The one with activations first: they are what takes memory.
        order = (last, *range(last))
        coming = made_ahead(order, self._prepared_again, ahead=self._ahead)
        for number in order:
            final = number == max(last - 1, 0)
            with torch.enable_grad(), self._unsynchronised(not final):
                embeddings = self._embedded_again(number, next(coming))
                if embeddings.requires_grad:
                    again = number
                    self._send(embeddings, gradients[number] * scale, collected)
                    synchronised = final
        if again is not None and not synchronised and isinstance(self.model, DistributedDataParallel):
            # Nothing is trained in the final mini-batch (texts, while the vision tower alone is trained).
            with torch.enable_grad():
                embeddings = self._embedded_again(again, self._prepared(again))
                self._send(embeddings, torch.zeros_like(embeddings), collected)
        if collected is not None:
            collected.backward()

    def _prepared(self, number: int) -> dict[str, Any]:
        column, rows = self.plan.mini_batches[number]
        trims = self._encoder.relative_positions
        return self._encoder.with_media(select_rows(self.columns[column], rows.tolist(), trim_leading=trims))

    def _prepared_again(self, number: int) -> dict[str, Any]:
        return {} if self._keeps(number) else self._prepared(number)

    def _keeps(self, number: int) -> bool:
        return number == len(self._sizes) - 1 and self._kept is not None

    def _embedded_again(self, number: int, features: dict[str, Any]) -> Tensor:
        if self._kept is not None and self._keeps(number):
            kept, self._kept = self._kept, None
            return kept
        state = self._states[number]
        with state if state is not None else nullcontext():
            return embedded(self.model, moved(features, self.device))

    def _unsynchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        ddp = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if ddp and wanted else nullcontext()

    @staticmethod
    def _send(embeddings: Tensor, gradient: Tensor, collected: _Collected | None) -> None:
        gradient = gradient.to(embeddings.dtype)
        if collected is None:
            embeddings.backward(gradient)
        else:
            collected.add(embeddings, gradient)


class _Collected:
    """Gradients of several backward passes, handed to the parameters in one: DeepSpeed reduces each once a step."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(self, embeddings: Tensor, gradient: Tensor) -> None:
        found = torch.autograd.grad(embeddings, self.parameters, gradient, allow_unused=True)
        for number, new in enumerate(found):
            if new is not None:
                old = self.sums[number]
                self.sums[number] = new if old is None else old + new

    def backward(self) -> None:
        pairs = [pair for pair in zip(self.parameters, self.sums, strict=True) if pair[1] is not None]
        torch.autograd.backward([parameter for parameter, _ in pairs], [total for _, total in pairs])


def _reduces_every_backward(model: Any) -> bool:
    """Whether a wrapper sends a parameter's gradient off as soon as a backward pass has made it (DeepSpeed ZeRO)."""
    return type(model).__module__.startswith("deepspeed.")


def _padded(table: Tensor, rows: int) -> Tensor:
    """The table with rows of zeros behind it, so that all processes send as much."""
    if len(table) == rows:
        return table
    return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])


class GradientSender:
    """Sends the embeddings' gradients on to the model; with ``again`` as often as it takes to fit into memory."""

    def __init__(self, embedder: BatchEmbedder, gradients: list[Tensor]) -> None:
        self.embedder, self.gradients = embedder, gradients
        self.again: Callable[[MiniBatchPlan], tuple[BatchEmbedder, list[Tensor]]] | None = None
        self.learn: Callable[[int], None] = lambda _: None  # of the tokens of the largest mini-batch, at the end

    def __call__(self, scale: Tensor) -> None:
        """Send them, times a scale."""
        if self.again is None:
            self.embedder.backward(self.gradients, scale)
            return
        model: nn.Module = self.embedder.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        while True:
            plan = self.embedder.plan
            try:
                with all_gradients_or_none(trained):
                    self.embedder.backward(self.gradients, scale)
                self.learn(plan.tokens)
            except torch.OutOfMemoryError:
                if plan.rows <= 1:
                    raise
            else:
                return
            del self.embedder, self.gradients  # with the activations that it keeps
            self.embedder, self.gradients = self.again(plan)


def cached_backward(loss: Tensor, send: Callable[[Tensor], None], finish: Callable[[], None]) -> Tensor:
    """A loss whose backward pass calls ``send`` with its gradient, and ``finish`` at its end."""

    def sent(scale: Tensor) -> None:
        try:
            send(scale)
        finally:
            finish()

    loss = loss.detach().requires_grad_().clone()  # DeepSpeed takes a leaf for no loss
    loss.register_hook(sent)
    return loss
