"""The nearest candidates of each query that are not false negatives, among more of them than fit in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unime_st.embedding.approximate import NearestTargets
from unime_st.functional import above_margin

_BLOCK = 16384
DEPTH = 512
"""The number of candidates of an index that are scored exactly; a set of at most this size needs no index."""
_PROBED = 2  # one cell of so many is looked at; with fewer, recall@8 fell from .99 to .87 at 200,000 candidates


class Forbidden(NamedTuple):
    """Pairs of a query and a candidate that answers it, or is the query itself."""

    rows: np.ndarray  # (P,) queries
    candidates: np.ndarray  # (P,)


class Nearest(NamedTuple):
    """The nearest valid candidates of each query, nearest first."""

    scores: np.ndarray  # (Q, m) cosines; -inf where a query has fewer
    candidates: np.ndarray  # (Q, m) their numbers; any where the score is -inf


def exact_nearest(
    queries: Tensor,
    positive_scores: Tensor,
    *,
    num_candidates: int,
    read: Callable[[np.ndarray], Tensor],
    forbidden: Forbidden,
    margin: float | None,
    keep: int,
) -> Nearest:
    """Compare queries ``(Q, D)`` with all ``C`` candidates, a block at a time; all vectors are of length 1.

    The rule is that of :func:`~unime_st.functional.hardest_valid_negatives`: a candidate above the positive's score
    ``(Q,)`` plus the margin is a false negative, and so is a forbidden one. ``read`` gives candidates ``(n, D)`` by
    their numbers, NaN for one that cannot be used.

    >>> points = torch.eye(3) + 0.0
    >>> none = Forbidden(np.array([0]), np.array([0]))
    >>> options = {"num_candidates": 3, "forbidden": none, "margin": 0.1, "keep": 1}
    >>> exact_nearest(points[:1], torch.ones(1), read=lambda numbers: points[numbers], **options).scores.tolist()
    [[0.0]]
    """
    order = np.argsort(forbidden.candidates, kind="stable")
    rows, candidates = forbidden.rows[order], forbidden.candidates[order]
    best = torch.full((len(queries), 0), -torch.inf, device=queries.device)
    numbers = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
    for start in range(0, num_candidates, _BLOCK):
        end = min(start + _BLOCK, num_candidates)
        scores = queries @ read(np.arange(start, end)).to(queries.device).T  # (Q, block)
        scores.masked_fill_(above_margin(scores, positive_scores[:, None], margin) | scores.isnan(), -torch.inf)
        first, last = np.searchsorted(candidates, [start, end])
        scores[torch.from_numpy(rows[first:last]), torch.from_numpy(candidates[first:last] - start)] = -torch.inf
        top = scores.topk(min(keep, end - start), dim=1)
        both = torch.cat([best, top.values], dim=1)
        best, places = both.topk(min(keep, both.shape[1]), dim=1)
        numbers = torch.cat([numbers, top.indices + start], dim=1).gather(1, places)
    return Nearest(best.cpu().numpy(), numbers.cpu().numpy())


def approximate_nearest(
    index: NearestTargets,
    queries: Tensor,
    positive_scores: Tensor,
    *,
    usable: Tensor,
    forbidden: Forbidden,
    margin: float | None,
    keep: int,
) -> Nearest:
    """As :func:`exact_nearest`, in an index of ``usable`` ``(C,)`` candidates; where too few are valid, in all."""
    depth, total = max(DEPTH, 2 * keep), len(index.targets)
    scores, numbers = index.search(queries.cpu(), depth, -(-index.index.nlist // _PROBED))  # (Q, depth)
    codes = torch.arange(len(numbers))[:, None] * total + numbers
    barred = torch.isin(codes, torch.from_numpy(forbidden.rows * total + forbidden.candidates))
    barred |= above_margin(scores, positive_scores.cpu()[:, None], margin) | ~usable[numbers]
    best = scores.masked_fill_(barred, -torch.inf).topk(min(keep, scores.shape[1]), dim=1)
    found = Nearest(best.values.numpy(), numbers.gather(1, best.indices).numpy())
    short = np.flatnonzero((found.scores == -np.inf).any(axis=1))
    if not len(short):
        return found
    place = np.full(len(queries), -1)
    place[short] = np.arange(len(short))
    theirs = place[forbidden.rows] >= 0
    every = torch.from_numpy(index.targets)
    again = exact_nearest(
        queries[short],
        positive_scores[short],
        num_candidates=total,
        read=lambda numbers: every[numbers].masked_fill(~usable[numbers, None], torch.nan),
        forbidden=Forbidden(place[forbidden.rows[theirs]], forbidden.candidates[theirs]),
        margin=margin,
        keep=keep,
    )
    found.scores[short], found.candidates[short] = again
    return found
