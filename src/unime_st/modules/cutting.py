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

    Of several candidates the longest texts are cut, to one length.

    The attention mask is ``(B, T)``; errors name the caller's ``rows``. A text loses as many tokens as the row has too
    many, but may still be tokenised into more than were left: call again with the mask of the shorter row.
    """
    if mask.shape[1] <= limit:
        return 0
    lengths = mask.sum(dim=1).tolist()
    over = [row for row, length in enumerate(lengths) if length > limit]
    for row in over:
        parts = [
            (message["role"], part)
            for message in messages[row]
            if message["role"] not in ("system", "answer")
            for part in message["content"]
            if part["type"] == "text" and part["text"]
        ]
        if not parts:
            raise ValueError(
                f"Row {rows[row]} needs {int(lengths[row])} tokens for its media and instruction alone, but the "
                f"limit is {limit}. Raise `max_seq_length`, or give smaller or fewer images."
            )
        candidates = [part for role, part in parts if role == "document"]
        _cut(candidates or [parts[-1][1]], int(lengths[row]) - limit, tokenizer)
    return len(over)


def _cut(parts: Sequence[dict[str, Any]], excess: int, tokenizer: Any) -> None:
    """Take tokens from the end of the longest texts, which are all left with as many."""
    offsets = [tokenizer(part["text"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
               for part in parts]  # fmt: skip
    kept = [len(own) for own in offsets]
    for _ in range(min(excess, sum(kept))):
        kept[kept.index(max(kept))] -= 1
    for part, own, count in zip(parts, offsets, kept, strict=True):
        if count < len(own):
            part["text"] = part["text"][: own[count][0]].rstrip()
