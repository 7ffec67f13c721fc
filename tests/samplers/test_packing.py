import numpy as np
import pytest

from unime_st.samplers.planning.conflicts import find_conflicts
from unime_st.samplers.planning.packing import compatible, pack
from unime_st.samplers.planning.together import draw_together


def clash(identities, pairs, rows):
    """Oracle: whether any two of the rows conflict."""
    pairs = {frozenset(pair) for pair in np.asarray(pairs).reshape(-1, 2).tolist()}
    for i, first in enumerate(rows):
        for second in rows[:i]:
            if any(values[first] == values[second] for values in identities) or frozenset((first, second)) in pairs:
                return True
    return False


@pytest.mark.parametrize("seed", range(30))
def test_bins_hold_no_conflict_and_no_more_than_fits(seed):
    rng = np.random.default_rng(seed)
    rows, capacity = int(rng.integers(1, 60)), int(rng.integers(1, 7))
    identities = [rng.integers(0, rng.integers(1, 2 * rows + 1), rows) for _ in range(rng.integers(0, 4))]
    pairs = rng.integers(0, rows, (int(rng.integers(0, rows)), 2))
    conflicts = find_conflicts(identities, pairs, rows)
    num_bins = int(rng.integers(0, rows + 1))
    bins = pack(conflicts, num_bins, capacity, rng)
    assert bins.shape == (rows,)
    assert bins.max(initial=-1) < num_bins
    for number in range(num_bins):
        members = np.flatnonzero(bins == number).tolist()
        assert len(members) <= capacity
        assert not clash(identities, pairs, members)
    for row in np.flatnonzero(bins < 0).tolist():  # nobody is left out that has a place
        for number in range(num_bins):
            members = np.flatnonzero(bins == number).tolist()
            assert len(members) == capacity or clash(identities, pairs, [row, *members])
    chosen = compatible(conflicts, rng.permutation(rows), capacity)
    assert not clash(identities, pairs, chosen.tolist())
    assert len(set(chosen.tolist())) == len(chosen) <= capacity


@pytest.mark.parametrize("seed", range(20))
def test_one_kind_of_key_is_packed_exactly(seed):
    """Every bin is filled whenever that is possible at all: when sum(min(class size, bins)) covers the slots."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(rng.integers(2, 12), 80)
    sizes = np.bincount(labels)
    conflicts = find_conflicts([labels], None, len(labels))
    for capacity in range(1, 9):
        for num_bins in range(1, 80 // capacity + 1):
            if np.minimum(sizes, num_bins).sum() < num_bins * capacity:
                continue
            bins = pack(conflicts, num_bins, capacity, rng)
            assert np.bincount(bins[bins >= 0], minlength=num_bins).tolist() == [capacity] * num_bins


def test_degrees_count_the_rows_in_the_way():
    conflicts = find_conflicts([np.array([1, 1, 1, 2]), np.array([5, 6, 6, 7])], np.array([[3, 0], [0, 3]]), 4)
    assert conflicts.degrees().tolist() == [3, 3, 3, 1]
    assert conflicts.neighbours_of(0).tolist() == [3]
    assert conflicts.neighbours_of(3).tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_exchanges_keep_a_packing_valid(seed):
    rng = np.random.default_rng(seed)
    identities = [rng.integers(0, 30, 60), rng.integers(0, 40, 60)]
    pairs = rng.integers(0, 60, (20, 2))
    conflicts = find_conflicts(identities, pairs, 60)
    bins = pack(conflicts, 8, 6, rng)
    hardest = rng.integers(-1, 60, (60, 3))
    moved = draw_together(conflicts, bins, hardest, rng)
    assert np.bincount(moved + 1, minlength=9).tolist() == np.bincount(bins + 1, minlength=9).tolist()
    assert np.array_equal(moved < 0, bins < 0)
    for number in range(8):
        assert not clash(identities, pairs, np.flatnonzero(moved == number).tolist())

    def met(where):
        return sum(
            where[row] == where[other] >= 0 for row in range(60) for other in hardest[row] if other not in (row, -1)
        )

    assert met(moved) > met(bins)
