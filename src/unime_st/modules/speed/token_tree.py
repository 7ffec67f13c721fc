"""Rows that begin alike as a tree of tokens, in one sequence or several, where each shared beginning appears once.

With causal attention a token's state depends only on the tokens before it, so rows that begin alike (the same image,
the same instruction, the turn marker) share the states of that beginning exactly. Dimension letters: B rows, T tokens
of the padded rows, P packed sequences, L their length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np

PREFIX_KEY = "prefix_key"
"""The name of the feature that identifies each token."""

_EACH_COUNT_TO = 16  # each number of sequences up to this is tried, above it only steps
_QUANTILES = (0.25, 0.5, 0.75)  # of the lengths shared by neighbours, at which rows may be parted
_LONGEST_SEQUENCE = 4096  # its mask takes memory with the square of it
_GAIN_WANTED = 0.97  # as a share of the plain cost; a plan that saves less is not worth its overhead


@dataclass(frozen=True)
class PackedTree:
    """Where each token of B padded rows goes in P sequences of length L."""

    source: np.ndarray  # (P, L) the flat place in the rows (row * T + column) of each place's token
    allowed: np.ndarray | None  # (P, L, L) a place attends to itself and those before it in its row; None with branches
    depth: np.ndarray  # (P, L) the number of tokens before it in its own row
    used: np.ndarray  # (P, L) which places hold a token, the others being padding
    place: np.ndarray  # (B, T) the flat place in the sequences (sequence * L + place) of each token; 0 for padding
    mask: np.ndarray  # (B, T) which of the rows' places are tokens
    # Of one sequence, per row: the first place of its own tokens, one past the last, and the places of its beginning.
    branches: tuple[tuple[int, int, np.ndarray], ...] = ()
    end: np.ndarray | None = None  # (L,) of one sequence: one past the last place that attends to each place


def flatten_tree(
    keys: np.ndarray, mask: np.ndarray, padded_length: Callable[[int], int] = lambda length: length
) -> PackedTree | None:
    """Put all tokens in one sequence without padding, or return None where nothing is shared or padded.

    See :func:`pack_tree`; ``padded_length`` gives the sequence's length for a number of tokens, for kernels.
    """
    order, starts, lengths, shared = _sorted(keys, mask)
    if int((lengths - shared).sum()) == mask.size:
        return None
    return _laid_out(mask, order, starts, lengths, shared, [range(len(order))], padded_length)


def pack_tree(keys: np.ndarray, mask: np.ndarray, *, hidden_size: int, training: bool = False) -> PackedTree | None:
    """Plan the sequences with the least work, or return None where padded rows would do as well.

    ``keys`` (B, T), int64 and padded on the left, identify each token, so that equal beginnings have equal states;
    ``mask`` (B, T) tells tokens from padding, with at least one token per row.

    Work is counted as linear layers do it, plus attention's share: about P * L * (1 + L / (4 * hidden_size)), as
    measured on the demo's miniature (D = 576). A training step of adapters takes no gradients of the linear layers' own
    weights, so attention's share is about twice that.
    """
    order, starts, lengths, shared = _sorted(keys, mask)

    def cost(count: int, length: int) -> float:
        return count * length * (1 + length / ((2 if training else 4) * hidden_size))

    best: tuple[float, list[list[int]]] | None = None
    for least in sorted({0, *np.quantile(shared, _QUANTILES, method="lower").tolist()}):
        groups = _groups(lengths, shared, least)
        for count in _counts(len(groups)):
            bins = _deal(groups, count)
            longest = max(int(_fresh(lengths, shared, members).sum()) for members in bins)
            work = cost(len(bins), longest)
            if longest <= _LONGEST_SEQUENCE and (best is None or work < best[0]):
                best = work, bins
    if best is None or best[0] > _GAIN_WANTED * cost(*mask.shape):
        return None
    return _laid_out(mask, order, starts, lengths, shared, best[1])


def _sorted(keys: np.ndarray, mask: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Rows in an order that puts equal beginnings side by side, and the column where each row's tokens start.

    In that order, too: the rows' lengths, and how many tokens each shares at its beginning with the row before.
    """
    starts = mask.shape[1] - mask.sum(axis=1)
    rows = [keys[row, start:] for row, start in enumerate(starts)]
    order = sorted(range(len(rows)), key=lambda row: rows[row].astype(">i8").tobytes())
    lengths = np.array([len(rows[row]) for row in order])
    shared = np.array([0, *(common_beginning(rows[a], rows[b]) for a, b in pairwise(order))])
    return order, starts, lengths, shared


def common_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the beginning that two rows share."""
    short = min(len(a), len(b))
    differ = a[:short] != b[:short]
    return int(differ.argmax()) if differ.any() else short


def _counts(most: int) -> list[int]:
    """Numbers of sequences to try: each up to 16, then steps of a quarter.

    >>> _counts(40)[-5:]
    [16, 20, 25, 31, 38]
    """
    counts = list(range(1, min(most, _EACH_COUNT_TO) + 1))
    while counts[-1] * 5 // 4 <= most and counts[-1] >= _EACH_COUNT_TO:
        counts.append(counts[-1] * 5 // 4)
    return counts


def _fresh(lengths: np.ndarray, shared: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """The tokens that each member adds to a sequence: those not shared with the member before; all of the first."""
    at = np.array(members)
    fresh = lengths[at]
    if len(at) > 1:  # two rows share the least that neighbours between them share
        fresh[1:] -= np.minimum.reduceat(shared[: at[-1] + 1], at[:-1] + 1)
    return fresh


def _groups(lengths: np.ndarray, shared: np.ndarray, least: int) -> list[tuple[int, list[int]]]:
    """Neighbours that share more than ``least`` tokens, with the tokens each group adds, the longest group first."""
    groups: list[list[int]] = []
    for at in range(len(lengths)):
        if at == 0 or shared[at] <= least:
            groups.append([])
        groups[-1].append(at)
    sized = [(int((lengths[own] - shared[own]).sum()), own) for own in groups]
    return sorted(sized, key=lambda group: -group[0])


def _deal(groups: Sequence[tuple[int, list[int]]], count: int) -> list[list[int]]:
    """Deal each group to the sequence with the fewest tokens, and put each sequence's rows in order."""
    heap: list[tuple[int, int]] = [(0, number) for number in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for size, own in groups:
        used, number = heappop(heap)
        bins[number] += own
        heappush(heap, (used + size, number))
    return [sorted(members) for members in bins if members]


def _laid_out(  # noqa: PLR0917
    mask: np.ndarray,
    order: Sequence[int],
    starts: np.ndarray,
    lengths: np.ndarray,
    shared: np.ndarray,
    bins: Sequence[Sequence[int]],
    padded_length: Callable[[int], int] | None = None,
) -> PackedTree:
    """Lay out one sequence per bin of rows; with ``padded_length`` one sequence with its branches and ends."""
    width = mask.shape[1]
    sizes = [_fresh(lengths, shared, members).tolist() for members in bins]
    longest = max(map(sum, sizes))
    shape = len(bins), longest if padded_length is None else padded_length(longest)
    source, depth = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    branches: list[tuple[int, int, np.ndarray]] = []
    allowed = None
    end = np.arange(1, shape[1] + 1)
    if padded_length is None:
        allowed = np.zeros((*shape, shape[1]), dtype=bool)
        allowed[:, np.arange(shape[1]), np.arange(shape[1])] = True  # padding sees itself, for no row may be empty
    place = np.zeros(mask.shape, dtype=np.int64)
    for number, members in enumerate(bins):
        used = 0
        path = np.zeros(0, dtype=np.int64)  # places of the last row's tokens
        for at, fresh in zip(members, sizes[number], strict=True):
            row, own = order[at], slice(used, used + fresh)
            first = int(lengths[at]) - fresh  # the number of tokens shared with the row before
            end[path[first:]] = used  # nothing from here on attends to the others of that row
            path = np.concatenate([path[:first], np.arange(used, used + fresh)])
            depth[number, own] = first + np.arange(fresh)
            source[number, own] = row * width + starts[row] + depth[number, own]
            if allowed is None:
                branches += [(used, used + fresh, path[:first])] if fresh else []
            else:
                allowed[number, own][:, path[:first]] = True
                allowed[number, own, own] = np.tri(fresh, dtype=bool)
            place[row, starts[row] :] = number * shape[1] + path
            used += fresh
        end[path] = used
        source[number, used:] = source[number, 0]
    filled = np.arange(shape[1]) < np.array([sum(own) for own in sizes])[:, None]
    return PackedTree(
        source, allowed, depth, filled, place, mask, tuple(branches), None if padded_length is None else end
    )
