"""Rows that begin alike as a tree of tokens, in one sequence or several: each shared beginning appears once.

With causal attention a token's state depends on what stands before it alone, so rows that begin alike (the same image,
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
"""Name of the feature that says what each token is."""

_EACH_COUNT_TO = 16  # of sequences; more are tried in steps
_QUANTILES = (0.25, 0.5, 0.75)  # of the lengths shared by neighbours: where rows may be parted
_LONGEST_SEQUENCE = 4096  # its mask takes the square of it
_GAIN_WANTED = 0.97  # of the plain cost: a plan that saves less is not worth its overhead


@dataclass(frozen=True)
class PackedTree:
    """Where each token of B padded rows goes in P sequences of length L.

    Attributes:
        source: Flat place in the rows (row * T + column) of the token at each place of the sequences, shape (P, L).
        allowed: Which places a place attends to: those before it in its own row, and itself, shape (P, L, L); None
            where there are branches.
        depth: Number of tokens before it in its own row, shape (P, L).
        used: Which places hold a token, the rest being padding, shape (P, L).
        place: Flat place in the sequences (sequence * L + place) of each token; 0 for padding, shape (B, T).
        mask: Which of the rows' places are tokens, shape (B, T).
        branches: Of one sequence: the places of a row's own tokens, first and one past the last, and those of the
            beginning it shares, in order.
        end: Of one sequence: one past the last place that attends to each place, shape (L,).
    """

    source: np.ndarray
    allowed: np.ndarray | None
    depth: np.ndarray
    used: np.ndarray
    place: np.ndarray
    mask: np.ndarray
    branches: tuple[tuple[int, int, np.ndarray], ...] = ()
    end: np.ndarray | None = None


def flatten_tree(
    keys: np.ndarray, mask: np.ndarray, padded_length: Callable[[int], int] = lambda length: length
) -> PackedTree | None:
    """Put all tokens in one sequence without padding, for attention that goes row by row or over the tree.

    Args:
        keys: As in :func:`pack_tree`.
        mask: As there.
        padded_length: From the number of tokens to the length of the sequence, for kernels that want certain ones.

    Returns:
        The sequence with its branches, None where nothing is shared or padded.

    Example:
        >>> keys = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [0, 1, 2, 6]])
        >>> tree = flatten_tree(keys, keys > 0)
        >>> [(start, end, before.tolist()) for start, end, before in tree.branches]
        [(0, 4, []), (4, 5, [0, 1, 2]), (5, 6, [0, 1])]
        >>> tree.end.tolist()
        [6, 6, 5, 4, 5, 6]
    """
    order, starts, lengths, shared = _sorted(keys, mask)
    if int((lengths - shared).sum()) == mask.size:
        return None
    return _laid_out(mask, order, starts, lengths, shared, [range(len(order))], padded_length)


def pack_tree(keys: np.ndarray, mask: np.ndarray, *, hidden_size: int, training: bool = False) -> PackedTree | None:
    """Plan the sequences with the least work.

    Work is counted as linear layers do it, plus attention's share, which grows with the length: about
    P * L * (1 + L / (4 * hidden_size)), as measured on the demo's miniature (D = 576). A training step of adapters
    takes no gradients of the linear layers' own weights, so attention's share is about twice that.

    Args:
        keys: What each token is, so that equal beginnings have equal states: int64, shape (B, T), padded on the left.
        mask: Which are tokens and not padding, booleans, shape (B, T); at least one a row.
        hidden_size: Of the language model.
        training: Whether a backward pass follows.

    Returns:
        The plan, None where padded rows would do as well.

    Example:
        >>> keys = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [0, 1, 2, 6]])
        >>> tree = pack_tree(keys, keys > 0, hidden_size=64)
        >>> tree.source.tolist(), tree.depth.tolist()
        ([[0, 1, 2, 3, 7, 11]], [[0, 1, 2, 3, 3, 2]])
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
    """Rows in an order that puts equal beginnings side by side, and where each row's tokens start in it.

    With them, in that order: the rows' lengths, and how many tokens at its beginning each shares with the row before.
    """
    starts = mask.shape[1] - mask.sum(axis=1)
    rows = [keys[row, start:] for row, start in enumerate(starts)]
    order = sorted(range(len(rows)), key=lambda row: rows[row].astype(">i8").tobytes())
    lengths = np.array([len(rows[row]) for row in order])
    shared = np.array([0, *(common_beginning(rows[a], rows[b]) for a, b in pairwise(order))])
    return order, starts, lengths, shared


def common_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the beginning that two rows share."""
    short = min(len(a), len(b))
    differ = a[:short] != b[:short]
    return int(differ.argmax()) if differ.any() else short


def _counts(most: int) -> list[int]:
    """Numbers of sequences to try: each up to 16, then every quarter more.

    >>> _counts(40)[-5:]
    [16, 20, 25, 31, 38]
    """
    counts = list(range(1, min(most, _EACH_COUNT_TO) + 1))
    while counts[-1] * 5 // 4 <= most and counts[-1] >= _EACH_COUNT_TO:
        counts.append(counts[-1] * 5 // 4)
    return counts


def _fresh(lengths: np.ndarray, shared: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Tokens each member of a sequence adds to it: those not shared with the member before, the first all."""
    at = np.array(members)
    fresh = lengths[at]
    if len(at) > 1:  # what two rows share is the least that neighbours between them do
        fresh[1:] -= np.minimum.reduceat(shared[: at[-1] + 1], at[:-1] + 1)
    return fresh


def _groups(lengths: np.ndarray, shared: np.ndarray, least: int) -> list[tuple[int, list[int]]]:
    """Neighbours that share more than so many tokens, with what each group adds to a sequence, the longest first."""
    groups: list[list[int]] = []
    for at in range(len(lengths)):
        if at == 0 or shared[at] <= least:
            groups.append([])
        groups[-1].append(at)
    sized = [(int((lengths[own] - shared[own]).sum()), own) for own in groups]
    return sorted(sized, key=lambda group: -group[0])


def _deal(groups: Sequence[tuple[int, list[int]]], count: int) -> list[list[int]]:
    """Deal groups out to sequences, each to the one with fewest tokens, and put each sequence's rows in order."""
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
    """Sequences of so many groups of rows; with a length to pad to one sequence, with its branches and ends."""
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
        allowed[:, np.arange(shape[1]), np.arange(shape[1])] = True  # padding attends to itself: no row may be empty
    place = np.zeros(mask.shape, dtype=np.int64)
    for number, members in enumerate(bins):
        used = 0
        path = np.zeros(0, dtype=np.int64)  # places of the last row's tokens
        for at, fresh in zip(members, sizes[number], strict=True):
            row, own = order[at], slice(used, used + fresh)
            first = int(lengths[at]) - fresh  # tokens shared with the row before
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
