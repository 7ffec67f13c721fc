"""Which inputs of a batch a process embeds, and in which mini-batches: each distinct input once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MiniBatchPlan:
    """What a process embeds of a batch of ``n`` columns of ``B`` rows.

    Embeddings of all processes stand in one table, each having an equal share of it, in the order of its mini-batches.
    Some may repeat rows of others, so that all processes have as many; the one with most tokens is last.
    """

    mini_batches: list[tuple[int, np.ndarray]]  # a column, and rows of it, for each mini-batch of this process
    place: np.ndarray  # (n, B) where in the table the embedding of each of this process's inputs is
    share: int  # entries of the table that each process has
    distinct: int  # inputs that all processes embed
    tokens: int = 0  # of this process's largest mini-batch, padding included
    rows: int = 0  # of this process's mini-batch with most of them


def plan_mini_batches(
    keys: np.ndarray,
    tokens: np.ndarray,
    batch: int,
    *,
    rank: int = 0,
    size: int | None = None,
    num_tokens: int | None = None,
    least: int = 1,
) -> MiniBatchPlan:
    """Give each distinct input to one process that has it, and cut each process's inputs into mini-batches.

    All processes compute the same plan from the same ``keys`` and ``tokens``, ``(W, n * B)``, one column after the
    other: equal keys are equal inputs. Of several processes the one with the fewest tokens so far gets an input. Within
    a column, inputs are sorted by length, so that mini-batches hold little padding. A mini-batch has at most ``size``
    inputs, or ``num_tokens`` tokens with padding, where a longer input is alone; with neither there is one a column.
    Each process has ``least`` or more.
    """
    owned, chosen = _owners(keys, tokens)
    cut = [_cut(own, row, batch, size, num_tokens) for own, row in zip(owned, tokens, strict=True)]
    least = max(least, *(len(mini_batches) for mini_batches in cut))
    filled = [_largest_last(_at_least(part, least), row) for part, row in zip(cut, tokens, strict=True)]
    share = max(sum(len(part) for part in mini_batches) for mini_batches in filled)
    place_of = np.empty(keys.shape, dtype=np.int64)  # in the table, of inputs that are embedded
    for process, mini_batches in enumerate(filled):
        order = np.concatenate(mini_batches)
        place_of[process, order[::-1]] = process * share + np.arange(len(order))[::-1]  # the first of repetitions wins
    _, inverse = np.unique(keys, return_inverse=True)
    place = place_of.ravel()[chosen[inverse.reshape(keys.shape)[rank]]]
    own = [(int(part[0]) // batch, part % batch) for part in filled[rank]]
    largest = len(filled[rank][-1]) * int(tokens[rank][filled[rank][-1]].max())
    return MiniBatchPlan(own, place.reshape(-1, batch), share, len(chosen), largest, max(map(len, filled[rank])))


def _owners(keys: np.ndarray, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Inputs that each process embeds, and the flat place of the input chosen for each distinct key, both ascending.

    A process all of whose inputs went to others still embeds its first, for a wrapper that waits for all processes.
    """
    processes, inputs = keys.shape
    distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if processes == 1:
        return [np.sort(first)], first
    inverse = inverse.reshape(keys.shape)
    has = np.full((processes, len(distinct)), -1, dtype=np.int64)
    for process in range(processes):
        backwards = inverse[process, ::-1]
        has[process, backwards] = np.arange(inputs)[::-1]  # the first occurrence stays
    holders = (has >= 0).sum(axis=0)
    length = tokens.ravel()[first]
    load = np.zeros(processes, dtype=np.int64)
    owner = (has >= 0).argmax(axis=0)
    np.add.at(load, owner[holders == 1], length[holders == 1])
    several = np.flatnonzero(holders > 1)
    for key in several[np.argsort(-length[several], kind="stable")].tolist():
        candidates = np.flatnonzero(has[:, key] >= 0)
        owner[key] = candidates[load[candidates].argmin()]
        load[owner[key]] += length[key]
    chosen = owner * inputs + has[owner, np.arange(len(distinct))]
    owned = [np.sort(chosen[owner == process] % inputs) for process in range(processes)]
    return [own if len(own) else np.zeros(1, dtype=np.int64) for own in owned], chosen


def _cut(own: np.ndarray, tokens: np.ndarray, batch: int, size: int | None, num_tokens: int | None) -> list[np.ndarray]:
    """Cut a process's inputs into mini-batches of one column each, the longest inputs first."""
    mini_batches = []
    for column in np.unique(own // batch):
        members = own[own // batch == column]
        longest = int(tokens[members].max())
        room = size or len(members) if num_tokens is None else num_tokens // max(1, longest)
        if room >= len(members):  # in their own order
            mini_batches.append(members)
            continue
        members = members[np.argsort(-tokens[members], kind="stable")]
        start = 0
        while start < len(members):
            count = size or len(members)
            if num_tokens is not None:
                count = max(1, num_tokens // max(1, int(tokens[members[start]])))
            mini_batches.append(members[start : start + count])
            start += count
    return mini_batches


def _largest_last(mini_batches: list[np.ndarray], tokens: np.ndarray) -> list[np.ndarray]:
    """Put the mini-batch with most tokens, padding included, last: it is the one that is embedded only once."""
    padded = [len(part) * int(tokens[part].max()) for part in mini_batches]
    largest = max(range(len(padded)), key=lambda number: padded[number])
    return [*mini_batches[:largest], *mini_batches[largest + 1 :], mini_batches[largest]]


def _at_least(mini_batches: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Halve the largest until there are enough; when all are single, repeat the last."""
    parts = list(mini_batches)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda number: len(parts[number]))
        whole = parts[largest]
        if len(whole) == 1:
            parts.append(parts[-1])
        else:
            parts[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return parts
