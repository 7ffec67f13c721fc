"""Rows of a batch in words, for errors."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from torch import Tensor

from unime_st.step_encoder import first_module


def described(model: Any, features: Mapping[str, Any], row: int) -> str:
    """Say what a row holds: its text, the number of its images, and its content's identity, to find it in the data."""
    tokenizer = getattr(first_module(model), "tokenizer", None)
    tokens, content = features.get("input_ids"), features.get("content_id")
    parts = []
    if tokenizer is not None and isinstance(tokens, Tensor):
        mask = features.get("attention_mask")
        kept = tokens[row] if mask is None else tokens[row][mask[row].bool()]
        parts.append(repr(shorten(tokenizer.decode(kept, skip_special_tokens=True), 80)))
    images = features.get("num_images_per_sample")
    if isinstance(images, Tensor) and int(images[row]):
        parts.append(f"{int(images[row])} image(s)")
    if isinstance(content, Tensor):
        parts.append(f"content_id {int(content[row])}")
    return ", ".join(parts) or "no text"
