"""Training on streams of images, which accelerate would cut to pieces unless told not to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import IterableDataset, Value


def streams_media(dataset: Any) -> bool:
    """Whether rows come as a stream and hold more than texts and numbers."""
    return isinstance(dataset, IterableDataset) and any(
        not isinstance(feature, Value) for feature in (dataset.features or {}).values()
    )


def refuse_dispatched_media(settings: Mapping[str, Any]) -> None:
    """Refuse training arguments by which accelerate cuts each batch's tensors by rows, for streams of images.

    The patches of a batch's images stand in one tensor without rows, and most would be lost, on one process too.
    """
    if (settings.get("accelerator_config") or {}).get("dispatch_batches") is not False:
        raise ValueError(
            "The training data are a stream (`IterableDataset`) with images, whose batches accelerate cuts by rows, "
            "images or not. Pass `accelerator_config={'dispatch_batches': False}` in the training arguments: each "
            "process then makes its own batches."
        )
