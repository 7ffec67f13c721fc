"""Exporting an encoder as a stock sentence-transformers folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from unime_st.folders import new_folder
from unime_st.modules.adapters import check_merged, merged_adapters
from unime_st.modules.card_data import EncoderCardData, rows_hidden
from unime_st.modules.sharded import is_sharded

logger = logging.getLogger(__name__)


def export_encoder(
    model: SentenceTransformer, path: str | Path, merge_adapters: bool = True, *, widget_images: bool | None = None
) -> Path:
    """Write an encoder as a stock sentence-transformers folder; the model in memory stays as it is.

    The folder appears only when complete; one that it replaces is there until then. An architecture that transformers
    lacks (phi3_v) loads in stock sentence-transformers only after ``import unime_st``; the folder's card says so.

    Args:
        model: the encoder.
        path: the folder to make.
        merge_adapters: merge LoRA weights into the backbone; False saves adapters alone, which then need the backbone.
        widget_images: show rows of the training set, images (copied into ``assets/``) and texts, in the card, as stock
            code does. None follows ``model.model_card_data.widget_images``, which is False at first.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and is no saved encoder.
        ValueError: the weights are split over processes, or a stock model loaded with adapters was to be merged.
    """
    if not isinstance(model, SentenceTransformer):
        raise TypeError(f"`model` is a {type(model).__name__}, but an encoder of `build_encoder` is needed.")
    if is_sharded(model):
        raise ValueError(
            "The weights of this model are split over processes. Save it on all of them (`trainer.save_model()`, or a "
            "checkpoint), load that in one process with `load_encoder`, and export it there."
        )
    target = Path(path)
    if target.exists() and any(target.iterdir()) and not (target / "modules.json").is_file():
        raise FileExistsError(f"{target} exists and holds something other than a saved encoder. Give another `path`.")
    shown = _card_shows_rows(model, widget_images)
    with shown, new_folder(target) as scratch, merged_adapters(model) if merge_adapters else nullcontext():
        model.save_pretrained(str(scratch))
        if merge_adapters:
            check_merged(scratch)
    logger.info("Saved the encoder in %s", target)
    return target


@contextmanager
def _card_shows_rows(model: SentenceTransformer, asked: bool | None) -> Iterator[None]:
    """Within this context the model's card shows rows of data sets if that is asked for, and else does not."""
    card: Any = model.model_card_data
    before = getattr(card, "widget_images", False)
    wanted = before if asked is None else asked
    if not isinstance(card, EncoderCardData):  # stock card data always show them
        with nullcontext() if wanted else rows_hidden(card):
            yield
        return
    card.widget_images = wanted
    try:
        yield
    finally:
        card.widget_images = before
