import numpy as np
import pytest
import torch

from unime_st.embedding.approximate import NearestTargets
from unime_st.embedding.neighbors import DEPTH, Forbidden, approximate_nearest, exact_nearest

TOTAL, QUERIES, KEEP = 3000, 120, 8


@pytest.fixture(scope="module")
def vectors():
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(TOTAL // 20, 32, generator=draw)
    points = centres[torch.randint(len(centres), (TOTAL,), generator=draw)]
    targets = torch.nn.functional.normalize(points + 0.5 * torch.randn(TOTAL, 32, generator=draw), dim=1)
    queries = targets[:QUERIES] + 0.1 * torch.randn(QUERIES, 32, generator=draw)
    return torch.nn.functional.normalize(queries, dim=1), targets


def found_both_ways(vectors, margin, broken=()):
    queries, targets = vectors
    usable = torch.ones(TOTAL, dtype=torch.bool)
    usable[list(broken)] = False
    own = (queries * targets[:QUERIES]).sum(dim=1)
    pairs = Forbidden(
        np.repeat(np.arange(QUERIES), 2), np.stack([np.arange(QUERIES), np.arange(QUERIES) + 7], 1).ravel()
    )
    options = {"forbidden": pairs, "margin": margin, "keep": KEEP}
    told = targets.masked_fill(~usable[:, None], torch.nan)
    exact = exact_nearest(queries, own, num_candidates=TOTAL, read=lambda numbers: told[numbers], **options)
    index = NearestTargets(targets.clone(), "")
    return exact, approximate_nearest(index, queries, own, usable=usable, **options), own, pairs


@pytest.mark.parametrize("margin", [0.1, -0.2, None])
def test_the_index_finds_nearly_what_comparing_everything_finds(vectors, margin):
    assert TOTAL > 5 * DEPTH  # or all would be scored exactly
    exact, found, own, pairs = found_both_ways(vectors, margin)
    shares = [len({*one} & {*other}) / KEEP for one, other in zip(exact.candidates, found.candidates, strict=True)]
    assert np.mean(shares) > 0.95
    np.testing.assert_allclose(found.scores[:, 0], exact.scores[:, 0], atol=0.05)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    codes = np.arange(QUERIES)[:, None] * TOTAL + found.candidates
    assert not np.isin(codes, pairs.rows * TOTAL + pairs.candidates).any()
    if margin is not None:
        assert (found.scores <= own.numpy()[:, None] + margin + 1e-6).all()
        assert (exact.scores[:, 0] < own.numpy() + margin).all()
        assert np.isfinite(found.scores).all()


def test_targets_that_cannot_be_read_are_found_neither_way(vectors):
    exact, _, _, _ = found_both_ways(vectors, None)
    gone = np.unique(exact.candidates[:, :4]).tolist()
    again, found, _, _ = found_both_ways(vectors, None, gone)
    assert not np.isin(again.candidates, gone).any()
    assert not np.isin(found.candidates, gone).any()
    assert (
        np.mean([len({*one} & {*other}) / KEEP for one, other in zip(again.candidates, found.candidates, strict=True)])
        > 0.9
    )


def test_rows_with_few_valid_ones_are_compared_with_everything(vectors):
    """With so strict a margin an index gives too few, and what it does not give is looked for."""
    exact, found, _, _ = found_both_ways(vectors, -1.3)
    few = (exact.scores > -np.inf).sum(axis=1)
    assert few.min() < KEEP
    np.testing.assert_array_equal((found.scores > -np.inf).sum(axis=1), few)
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5)
