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
    """Refuse what stock code does with streams: cut each batch's tensors by rows, and send them to the processes.

    The patches of a batch's images stand in one tensor that has no rows, so that cut at the number of rows most of them
    are lost, on one process too; on several, it fails at what is no tensor.

    Args:
        settings: All training arguments.

    Raises:
        ValueError: with the argument that prevents it.
    """
    if (settings.get("accelerator_config") or {}).get("dispatch_batches") is not False:
        raise ValueError(
            "The training data are a stream (`IterableDataset`) with images, whose batches accelerate cuts by rows, "
            "images or not. Pass `accelerator_config={'dispatch_batches': False}` in the training arguments: each "
            "process then makes its own batches."
        )
