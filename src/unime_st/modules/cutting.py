"""Cutting rows that are too long: a user's text loses its last words, a medium or an instruction nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unime_st.modules.inputs import Message


def cut_long_rows(
    messages: Sequence[Sequence[Message]], mask: Tensor, limit: int, rows: Sequence[int], tokenizer: Any
) -> int:
    """Cut the last text of every row with more than ``limit`` tokens, never an instruction, and count those rows.

    The attention mask is ``(B, T)``; errors name the caller's ``rows``. A text loses as many tokens as the row has too
    many, but may still be tokenised into more than were left: call again with the mask of the shorter row.
    """
    if mask.shape[1] <= limit:
        return 0
    lengths = mask.sum(dim=1).tolist()
    over = [row for row, length in enumerate(lengths) if length > limit]
    for row in over:
        parts = [
            part
            for message in messages[row]
            if message["role"] != "system"
            for part in message["content"]
            if part["type"] == "text" and part["text"]
        ]
        if not parts:
            raise ValueError(
                f"Row {rows[row]} needs {int(lengths[row])} tokens for its media and instruction alone, but the "
                f"limit is {limit}. Raise `max_seq_length`, or give smaller or fewer images."
            )
        parts[-1]["text"] = _without_last_tokens(parts[-1]["text"], int(lengths[row]) - limit, tokenizer)
    return len(over)


def _without_last_tokens(text: str, excess: int, tokenizer: Any) -> str:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[-excess][0]].rstrip() if excess < len(offsets) else ""
