"""The order in which inputs are encoded: each distinct one once, and those that begin alike side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unime_st.ahead import made_ahead
from unime_st.features import num_rows, select_rows, token_counts
from unime_st.identity.content import Content
from unime_st.modules.inputs import contents_of
from unime_st.modules.speed.token_tree import PREFIX_KEY, common_beginning
from unime_st.token_budget import TokenBudget


@dataclass(frozen=True)
class EncodingOrder:
    """Which inputs are encoded, and how they are batched."""

    distinct: np.ndarray  # (U,) the number of the first input of each content
    index: np.ndarray  # (N,) the place of each input in `distinct`
    batches: list[np.ndarray]  # places in `distinct`, most work first, so that too large a batch size shows at once
    contents: list[Content]  # of the distinct inputs


class NumberedInputs(list[Any]):
    """Inputs that know the caller's number of their first row, also when they are cut into chunks.

    >>> NumberedInputs(["a", "b", "c"])[1:].first_row
    1
    """

    def __init__(self, inputs: Iterable[Any] = (), first_row: int = 0) -> None:
        super().__init__(inputs)
        self.first_row = first_row

    def __getitem__(self, place: Any) -> Any:
        """One input, or a chunk."""
        found = super().__getitem__(place)
        return (
            NumberedInputs(found, self.first_row + place.indices(len(self))[0]) if isinstance(place, slice) else found
        )


def encoding_order(
    inputs: Sequence[Any], batch_size: int, *, by_beginning: bool, videos_of: Callable[[Content], Any] | None = None
) -> EncodingOrder:
    """Plan batches of distinct inputs; inputs with videos get batches of their own.

    ``videos_of`` tells what the videos of a batch must have in common, such as their number of frames.

    ``by_beginning`` puts inputs with the same media or the same first words side by side; otherwise like lengths are.
    """
    start = getattr(inputs, "first_row", 0)
    contents = contents_of(inputs, range(start, start + len(inputs)))
    first: dict[str, int] = {}
    index = np.array([first.setdefault(content.fingerprint, len(first)) for content in contents], dtype=np.int64)
    distinct = np.unique(index, return_index=True)[1]
    kept = [contents[number] for number in distinct]
    sizes = [(content.pixels, len(content.text)) for content in kept]
    beginnings = [(bool(content.media), content.media, content.text) for content in kept]
    order = sorted(range(len(kept)), key=(beginnings if by_beginning else sizes).__getitem__)
    parts: dict[Any, list[int]] = {}
    for place in order:  # videos apart: not every family can tell whose the frames are
        shown = kept[place].shows_video
        parts.setdefault((shown, videos_of(kept[place]) if shown and videos_of else None), []).append(place)
    batches = [
        np.array(part[at : at + batch_size]) for part in parts.values() for at in range(0, len(part), batch_size)
    ]
    batches.sort(key=lambda batch: tuple(np.sum([sizes[place] for place in batch], axis=0)), reverse=True)
    return EncodingOrder(distinct, index, batches, kept)


def passes(
    features: dict[str, Any], num_tokens: int | None, *, padded: bool
) -> Iterator[tuple[np.ndarray, dict[str, Any], int]]:
    """Yield rows, features and tokens of each pass of a prepared batch, under a budget, similar lengths together.

    An input over the budget is alone; one with more than half of ``num_tokens`` also takes those that stay with it and
    add no more than the budget. None makes one pass. With ``padded`` the padding counts, because the model computes it.
    Without it tokens shared with the input before count once, and inputs that share half of theirs or more stay
    together.
    """
    counts = token_counts(features)
    if num_tokens is None or counts is None or len(counts) == 1:
        yield np.arange(num_rows(features)), features, 0 if counts is None else int(counts.sum())
        return
    tokens = counts.cpu().numpy()
    shared = np.zeros_like(tokens) if padded else _shared_tokens(features, tokens)
    order = _by_length(tokens, shared)
    start = 0
    while start < len(order):
        rest = order[start:]
        if padded:
            used = tokens[rest[0]] * np.arange(1, len(rest) + 1)
        else:
            follows = rest[1:] == rest[:-1] + 1  # else its shared tokens are in another pass, or far away
            used = np.cumsum(tokens[rest] - np.concatenate([[0], np.where(follows, shared[rest[1:]], 0)]))
        count = max(1, int(np.searchsorted(used, num_tokens, side="right")))
        if not padded and 2 * used[0] > num_tokens:  # else every few of them compute it again
            stay = follows & (2 * shared[rest[1:]] >= tokens[rest[1:]])
            group = int(np.append(stay, False).argmin()) + 1
            count = max(count, int(np.searchsorted(used[:group] - used[0], num_tokens, side="right")))
        if count == len(tokens):
            yield np.arange(count), features, int(used[-1])
            return
        rows = rest[:count]
        start += count
        yield rows, select_rows(features, rows.tolist(), trim_leading=True), int(used[count - 1])


def fitted(
    features: dict[str, Any], budget: TokenBudget, run: Callable[[dict[str, Any]], Tensor], *, padded: bool
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the rows and the outcome of each pass of a prepared batch, under a budget that passes may change.

    Rows of a pass that runs out of memory are cut into passes anew, under half of its tokens.
    """
    left = np.arange(num_rows(features))
    while len(left):
        some = features if len(left) == num_rows(features) else select_rows(features, left.tolist(), trim_leading=True)
        asked, done = budget.tokens, np.zeros(len(left), dtype=bool)
        for rows, part, tokens in passes(some, asked, padded=padded):
            found = budget.tried(partial(run, part), tokens, several=len(rows) > 1)
            if found is None:
                break
            done[rows] = True
            yield left[rows], found
            if budget.tokens != asked:
                break
        left = left[~done]


def _by_length(tokens: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Rows from the longest to the shortest; one that shares half of its tokens with the row before follows it."""
    group = np.cumsum(2 * shared < tokens) - 1
    longest = np.zeros(group[-1] + 1, dtype=tokens.dtype)
    np.maximum.at(longest, group, tokens)
    return np.lexsort((np.arange(len(tokens)), group, -longest[group]))


def _shared_tokens(features: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """The number of tokens at the beginning of each row that the row before has too, (B,)."""
    keys = features.get(PREFIX_KEY)
    if keys is None:
        return np.zeros_like(tokens)
    rows = [row[len(row) - count :] for row, count in zip(keys.cpu().numpy(), tokens, strict=True)]
    return np.array([0, *(common_beginning(one, other) for one, other in pairwise(rows))])


def prepared(
    batches: Sequence[Any], prepare: Callable[[Any], Any], *, ahead: bool, num_workers: int = 0
) -> Iterator[Any]:
    """Yield the features that ``prepare`` makes of each batch, in order; its errors are raised at their batch.

    ``ahead`` prepares a batch in a thread while the one before is used: on the CPU that takes cores from the model,
    which costs more than it brings (a sixth, on two cores). ``num_workers`` processes do not share Python's lock with
    the model; with ``ahead`` their features lie in memory that a GPU copies from directly.
    """
    if num_workers and len(batches) > 1:
        yield from _by_workers(batches, prepare, min(num_workers, len(batches)), pin_memory=ahead)
    else:
        yield from made_ahead(batches, prepare, ahead=int(ahead))


class _Prepared(Dataset):
    """The features of each batch, or the error of preparing it."""

    def __init__(self, batches: Sequence[Any], prepare: Callable[[Any], Any]) -> None:
        self.batches, self.prepare = batches, prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.prepare(self.batches[number])
        except Exception as error:  # noqa: BLE001 (raised where the batch is used)
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _by_workers(
    batches: Sequence[Any], prepare: Callable[[Any], Any], num_workers: int, *, pin_memory: bool
) -> Iterator[Any]:
    loader = DataLoader(
        _Prepared(batches, prepare),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context="fork",  # so that inputs and processor need not be sent
    )
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield found
