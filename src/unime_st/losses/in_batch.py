"""What both losses share: plain or GradCache embedding, gathering, and the numbers of a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from sentence_transformers import SentenceTransformer

# The one use of sentence-transformers beyond its documented names (exported by `sentence_transformers.base.losses`, and
# what its own cached losses are made of).
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from torch import Tensor, nn

UNIME_CITATION = """
@article{gu2025unime,
    title={Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs},
    author={Gu, Tiancheng and Yang, Kaicheng and Feng, Ziyong and Wang, Xingjun and Zhang, Yanzhao and Long, Dingkun
        and Chen, Yingda and Cai, Weidong and Deng, Jiankang},
    journal={arXiv preprint arXiv:2504.17432},
    year={2025}
}
"""


class InBatchLoss(CachedLossMixin, nn.Module):
    """Base of the losses that compare a whole batch with itself; plain and GradCache in one class.

    A subclass implements :meth:`compute_loss`. With ``mini_batch_size`` or ``mini_batch_num_tokens`` given, the batch
    is embedded in mini-batches, twice (GradCache, https://huggingface.co/papers/2101.06983), so that memory no longer
    grows with the batch; loss and gradients are the same. The comparison itself runs once, on the whole batch.

    Args:
        model: The model to train; None when only ``compute_loss_from_embeddings`` is used.
        gather_across_devices: Compare with the rows of all processes.
        mini_batch_size: Rows embedded at a time, >= 1; None embeds each column at once.
        mini_batch_num_tokens: Tokens embedded at a time, >= 1, in place of a number of rows.

    Attributes:
        metric_names: What every step of a subclass records, so that processes agree on it.

    Raises:
        ValueError: On a mini-batch below 1, or when the model's inputs cannot be split into mini-batches.
    """

    metric_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: SentenceTransformer | None,
        *,
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}`, but at least 1 is needed; None embeds the batch at once.")
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]  # None where the mixin is not used
        self.mini_batch_num_tokens = mini_batch_num_tokens
        # sentence-transformers asks each instance, e.g. in MatryoshkaLoss.
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        stock = isinstance(model, SentenceTransformer)
        if self.uses_gradient_cache and stock and has_static_embedding_input(model):
            raise ValueError(
                f"{type(self).__name__} cannot split the inputs of a StaticEmbedding into mini-batches. "
                "Leave `mini_batch_size` and `mini_batch_num_tokens` at None."
            )
        self.last_metrics: dict[str, Tensor] = {}
        self._metric_sums: dict[str, Tensor] = {}
        self._metric_steps = 0

    def compute_loss(self, embeddings: list[Tensor], targets: Tensor | None) -> Tensor:
        """Compute the loss of this process's rows from one ``(B, D)`` tensor a column."""
        raise NotImplementedError

    def embed_and_compute(self, columns: Iterable[dict[str, Tensor]], targets: Tensor | None) -> Tensor:
        """Embed each column, in mini-batches if asked to, and compute the loss."""
        if self.model is None:
            raise ValueError(
                f"{type(self).__name__} was made with `model=None`, so it cannot embed. "
                "Call `compute_loss_from_embeddings`, or give it a model."
            )
        if self.uses_gradient_cache:
            return self.forward_cached(columns, targets)
        return self.compute_loss([self.model(features)["sentence_embedding"] for features in columns], targets)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss from mini-batches of embeddings: the hook of the GradCache mixin, with a single backward."""
        loss = self.compute_loss([torch.cat(mini_batches) for mini_batches in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def record_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Keep the numbers of a step, and add them to the running means when it is a training step.

        Nothing is read off the device here.
        """
        self.last_metrics = {name: value.detach() for name, value in metrics.items()}
        if self.training and torch.is_grad_enabled():
            for name, value in self.last_metrics.items():
                self._metric_sums[name] = self._metric_sums[name] + value if name in self._metric_sums else value
            self._metric_steps += 1

    def pop_mean_metrics(self) -> dict[str, Tensor]:
        """Return the means over the training steps since the last call, and start anew."""
        means = {name: total / self._metric_steps for name, total in self._metric_sums.items()}
        self._metric_sums, self._metric_steps = {}, 0
        return means

    def get_config_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments, for the model card."""
        return {
            "gather_across_devices": self.gather_across_devices,
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return UNIME_CITATION


def check_temperature(name: str, value: float) -> float:
    """Return the temperature, or say what is wrong with it."""
    if not value > 0 or value == float("inf"):
        raise ValueError(f"`{name}={value}`, but a temperature must be a number above 0 (0.02 to 0.1 is usual).")
    return value
