"""What a training step may ask of the module that turns inputs into states, and how that module is found in a model.

A loss asks for nothing else of an encoder than what :class:`StepEncoder` says. A :class:`PlainEncoder` stands for
encoders that know nothing of it, such as the stock ``Transformer``, so that a loss treats all models alike.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class StepEncoder(Protocol):
    """The first module of a SentenceTransformer, as losses and callbacks of the Trainer see it."""

    relative_positions: bool  # whether padding before a row changes nothing, so that a mini-batch may leave it out

    mini_batches_ahead: int  # whose media are prepared in a thread, where media were left

    def with_media(self, features: dict[str, Any]) -> dict[str, Any]:
        """Features of some rows with their media, if these were left until the rows are embedded."""

    def keeping_features(self) -> AbstractContextManager[None]:
        """Within this context, a training step, features are kept that its second pass would compute again."""

    def embeddings_alone(self, *, last_token_only: bool) -> AbstractContextManager[None]:
        """Within this context only embeddings are asked for, perhaps those of each row's last token alone."""

    def forget_features(self) -> None:
        """Forget what is kept between steps."""


class PlainEncoder:
    """Stands for an encoder that keeps nothing and leaves nothing out."""

    relative_positions = False
    mini_batches_ahead = 0

    def with_media(self, features: dict[str, Any]) -> dict[str, Any]:
        """Change nothing: all media are there."""
        return features

    def keeping_features(self) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()

    def embeddings_alone(self, *, last_token_only: bool) -> AbstractContextManager[None]:  # noqa: ARG002 the protocol's
        """Change nothing."""
        return nullcontext()

    def forget_features(self) -> None:
        """Do nothing: there is nothing to forget."""


def unwrapped(model: Any) -> Any:
    """The model inside what accelerate and torch.compile put around it."""
    while hasattr(model, "_orig_mod") or isinstance(getattr(model, "module", None), nn.Module):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def is_compiled(model: Any) -> bool:
    """Whether a model is compiled, beneath a wrapper of accelerate or not."""
    while not hasattr(model, "_orig_mod") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def first_module(model: Any) -> Any:
    """The module that turns inputs into states, the first of a SentenceTransformer; None where there are no modules."""
    inner = unwrapped(model)
    return inner[0] if isinstance(inner, nn.Sequential) and len(inner) else None


def step_encoder(model: Any) -> StepEncoder:
    """The encoder of a model, wrapped or not; a :class:`PlainEncoder` for any model whose encoder is not one."""
    found = first_module(model)
    return found if isinstance(found, StepEncoder) else PlainEncoder()
