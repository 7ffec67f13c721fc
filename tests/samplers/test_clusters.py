"""Batches of B3: the rank graph against loops, exact clusters, and what they keep of the sampler's other rules."""

import itertools
import logging
import sys

import numpy as np
import pytest
from datasets import Dataset
from test_homogeneous import assert_apart, global_batches

from two_processes import run_two
from unime_st.columns import without_subset
from unime_st.samplers import FalseNegativeAwareBatchSampler
from unime_st.samplers.guide.clusters import RankGraph, exact_parts, find_clusters, rank_graph
from unime_st.samplers.guide.embeddings import GuideEmbeddings
from unime_st.samplers.guide.neighbors import find_neighbors
from unime_st.samplers.planning.conflicts import both_ways, find_conflicts

WORLD_SIZES = (1, 2, 4)


def planted(groups, size, dim=32, seed=0, noise=0.05):
    """Guide embeddings of groups of rows that lie together, in random order, and the group of each row."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(groups), size))
    centres = rng.normal(size=(groups, dim))[group]
    queries, targets = (centres + noise * rng.normal(size=centres.shape) for _ in range(2))
    return queries, targets, group


def ranked(queries, targets, first, last, margin=9.0):
    sides = (GuideEmbeddings("q", queries, len(queries)), GuideEmbeddings("t", targets, len(targets)))
    found = find_neighbors(*sides, margin=margin, num_hardest=last)
    return found.hardest[:, first:], found.twins


def apart(rows, pairs=()):
    return find_conflicts([], np.array(pairs, dtype=np.int64).reshape(-1, 2), rows)


def pairs_of(graph):
    return set(zip(graph.owners.tolist(), graph.neighbours.tolist(), strict=True))


def dataset_of(rows, seed=0, names=None, repeats=1.0):
    rng = np.random.default_rng(seed)
    columns = {
        "anchor": [f"query {number}" for number in rng.permutation(rows)],
        "positive": [f"target {number}" for number in rng.permutation(rows) % max(1, int(rows * repeats))],
    }
    if names is None:
        return Dataset.from_dict(columns)
    return Dataset.from_dict({**columns, "subset": list(names)}).with_transform(without_subset)


def make(dataset, guide, world_size=2, size=8, **options):
    options = {"cluster_size": 4, "range_min": 0, "range_max": 6, **options}
    sides = dict(zip(("guide_queries", "guide_targets"), guide, strict=True))
    return FalseNegativeAwareBatchSampler(
        dataset, size // world_size, True, seed=3, world_size=world_size, margin=9.0, **sides, **options
    )


@pytest.mark.parametrize(("first", "last", "margin"), [(0, 5, 9.0), (3, 10, 9.0), (2, 9, 0.05)])
def test_edges_go_both_ways_and_between_the_ranks(first, last, margin):
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(60, 8))
    targets = queries + 0.7 * rng.normal(size=(60, 8))
    graph = rank_graph(*ranked(queries, targets, first, last, margin))
    unit = [side / np.linalg.norm(side, axis=1)[:, None] for side in (queries, targets)]
    scores = unit[0] @ unit[1].T
    kept = []
    for i in range(60):
        may = [j for j in range(60) if j != i and scores[i, j] <= scores[i, i] + margin]
        kept.append(set(sorted(may, key=lambda j: -scores[i, j])[first:last]))
    one_way = {(i, j) for i in range(60) for j in kept[i]}
    both = {(i, j) for i, j in one_way if (j, i) in one_way}
    assert 20 < len(both) < len(one_way)
    assert pairs_of(graph) == both
    assert len(graph.neighbours) == len(both)


def test_rows_of_one_target_are_joined_to_those_of_another_one_to_one():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 12, 80)
    points = rng.normal(size=(12, 6))
    queries = points[target] + 0.6 * rng.normal(size=(80, 6))
    wanted, twins = ranked(queries, points[target], 0, 4)
    graph = rank_graph(wanted, twins)
    expected = set()
    for a, b in itertools.combinations(range(12), 2):
        there = [i for i in range(80) if target[i] == a and b in target[wanted[i][wanted[i] >= 0]]]
        back = [i for i in range(80) if target[i] == b and a in target[wanted[i][wanted[i] >= 0]]]
        if there and back:
            for k in range(max(len(there), len(back))):
                i, j = there[k % len(there)], back[k % len(back)]
                expected |= {(i, j), (j, i)}
    assert len(expected) > 60
    assert pairs_of(graph) == expected
    assert all(target[i] != target[j] for i, j in expected)


def test_the_repair_makes_exact_parts_and_keeps_the_rows_with_most_edges():
    # Rows 0 to 5 in part 0, where 5 has no edge; 6 to 8 in part 1; 4 has most of its edges there.
    edges = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 3), (4, 6), (4, 7), (4, 0), (6, 7), (7, 8)]
    graph = RankGraph(*both_ways(np.array(edges), 9))
    parts = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1], dtype=np.int32)
    assert exact_parts(graph, parts, apart(9), 4).tolist() == [0, 0, 0, 0, 1, -1, 1, 1, 1]
    # Row 3 may not meet row 0: row 4, with an edge in part 0 too, keeps its place there, and 3 fills what is left.
    assert exact_parts(graph, parts, apart(9, [(0, 3)]), 4).tolist() == [0, 0, 0, 1, 0, -1, 1, 1, 1]


@pytest.mark.parametrize("rows", [4, 40, 41, 43])
@pytest.mark.parametrize("seed", range(3))
def test_any_parts_become_exact(rows, seed):
    rng = np.random.default_rng(seed)
    graph = RankGraph(*both_ways(rng.integers(0, rows, (3 * rows, 2)), rows))
    parts = np.minimum(rng.geometric(0.5, rows) - 1, rows // 4 - 1).astype(np.int32)  # very uneven, many empty
    conflicts = find_conflicts([rng.integers(0, rows, rows)], rng.integers(0, rows, (rows, 2)), rows)
    exact = exact_parts(graph, parts, conflicts, 4)
    assert np.bincount(exact[exact >= 0], minlength=rows // 4).tolist() == [4] * (rows // 4)
    assert (exact < 0).sum() == rows % 4


def test_planted_clusters_are_found_and_batches_are_made_of_them(caplog):
    queries, targets, group = planted(30, 4)
    sampler = make(dataset_of(120), (queries, targets), size=12, range_max=3)
    clusters = sampler.clusters
    assert len({*zip(clusters.tolist(), group.tolist(), strict=True)}) == 30
    assert np.bincount(clusters).tolist() == [4] * 30
    together = []
    with caplog.at_level(logging.INFO):
        for epoch in range(3):
            sampler.set_epoch(epoch)
            batches = global_batches(sampler, 2)
            assert len(batches) == 10
            assert all(np.unique(clusters[batch], return_counts=True)[1].tolist() == [4, 4, 4] for batch in batches)
            together.append({frozenset(clusters[batch].tolist()) for batch in batches})
    assert "100.0 % of an epoch's rows are in a batch with their whole cluster" in caplog.text
    assert not together[0] & together[1] & together[2]  # other clusters meet in each epoch


def test_clusters_of_a_process_batch_are_whole_too():
    sampler = make(dataset_of(120), planted(30, 4)[:2], size=24)
    for batch in sampler:
        assert np.unique(sampler.clusters[batch], return_counts=True)[1].tolist() == [4, 4, 4]


def test_metis_keeps_more_edges_in_batches_than_chance():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(640, 8))
    targets = queries + 0.3 * rng.normal(size=queries.shape)
    wanted, twins = ranked(queries, targets, 5, 25)
    graph = rank_graph(wanted, twins)
    shares = []
    for options in ({"cluster_size": 16, "range_min": 5, "range_max": 25}, {"cluster_size": None}):
        sampler = make(dataset_of(640), (queries, targets), size=64, **options)
        batch = np.full(640, -1)
        for number, rows in enumerate(global_batches(sampler, 2)):
            batch[rows] = number
        shares.append(graph.within(batch).mean())
    assert shares[0] > 3 * shares[1] > 0.2


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_false_negatives_meet_and_clusters_are_broken_for_it(world_size, homogeneous, caplog):
    names = np.random.default_rng(0).permutation(np.repeat(["a", "b"], [150, 90]))
    dataset = dataset_of(240, names=names, repeats=0.15)
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(40, 16))[rng.integers(0, 40, 240)]
    queries, targets = (centres + 0.3 * rng.normal(size=centres.shape) for _ in range(2))
    with caplog.at_level(logging.INFO):
        sampler = make(dataset, (queries, targets), world_size, homogeneous=homogeneous)
        clusters, plans = sampler.clusters, []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            batches = global_batches(sampler, world_size)
            rows = list(itertools.chain.from_iterable(batches))
            assert sorted([*rows, *sampler.unplaced.tolist()]) == list(range(240))
            for batch in batches:
                assert len(batch) == 8
                assert_apart(dataset, batch)
                assert len({names[row] for row in batch}) == 1 or not homogeneous
            plans.append(batches)
    whole = sum((np.unique(clusters[batch], return_counts=True)[1] == 4).sum() for batch in plans[0])
    assert 0.3 * len(clusters) / 4 < whole < len(clusters) / 4
    assert f"{100 * whole * 4 / np.size(plans[0]):.1f} % of an epoch's rows are in a batch with their" in caplog.text
    if homogeneous:
        assert all(len({*names[clusters == number]}) == 1 for number in range(clusters.max() + 1))
    assert len({str(plan) for plan in plans}) == 3


def test_plans_hang_on_seed_and_epoch_only():
    dataset, guide = dataset_of(200, repeats=0.8), planted(40, 5)[:2]
    sampler = make(dataset, guide)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for epoch in (2, 0, 1):
        other = make(dataset, guide)
        other.set_epoch(epoch)
        assert np.array_equal(other.clusters, sampler.clusters)
        assert list(other) == epochs[epoch]
    on_one = make(dataset, guide, world_size=1)
    assert global_batches(on_one, 1) == [[*a, *b] for a, b in zip(epochs[0][::2], epochs[0][1::2], strict=True)]


def plan_on(rank):
    """Each process sees another guide: what rank 0 found must count on both."""
    sampler = make(dataset_of(80), planted(20, 4, seed=rank)[:2])
    return {"clusters": sampler.clusters.tolist(), "batches": list(sampler)}


def test_all_processes_have_the_clusters_of_the_first(tmp_path):
    first, second = run_two(plan_on, tmp_path)
    assert first == second
    assert first["clusters"] == make(dataset_of(80), planted(20, 4)[:2]).clusters.tolist()


def test_a_cap_takes_whole_clusters():
    names = ["a"] * 80 + ["b"] * 16
    sampler = make(dataset_of(96, names=names), planted(24, 4)[:2], homogeneous=True, max_rows_per_dataset=32)
    used = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = global_batches(sampler, 2)
        assert len(batches) == 6
        counts = [np.unique(sampler.clusters[batch], return_counts=True)[1] for batch in batches]
        assert all(count.tolist() == [4, 4] for count in counts)
        used.append(frozenset(itertools.chain.from_iterable(batches)))
    assert len(set(used)) == 4


@pytest.mark.parametrize("rows", [3, 7, 8, 9, 13, 39, 41])
@pytest.mark.parametrize("drop_last", [True, False])
def test_odd_numbers_of_rows(rows, drop_last):
    queries, targets, _ = planted(rows, 1)
    options = {"cluster_size": 4, "range_min": 0, "range_max": 30, "margin": 9.0, "world_size": 1}
    guide = {"guide_queries": queries, "guide_targets": targets}
    sampler = FalseNegativeAwareBatchSampler(dataset_of(rows), 8, drop_last, **guide, **options)
    clusters = sampler.clusters
    assert np.bincount(clusters[clusters >= 0], minlength=rows // 4).tolist() == [4] * (rows // 4)
    drawn = set()
    for epoch in range(12):
        sampler.set_epoch(epoch)
        lengths = [len(batch) for batch in sampler]
        assert lengths == [8] * (rows // 8) + ([rows % 8] if rows % 8 and not drop_last else [])
        full = list(sampler)[: rows // 8]
        broken = [b for b in full if np.unique(clusters[b], return_counts=True)[1].tolist() != [4, 4]]
        assert len(broken) <= 1  # the one with the rows in no cluster, which come together
        assert all((clusters[batch] < 0).sum() == rows % 4 for batch in broken)
        drawn |= {*itertools.chain.from_iterable(full)}
    assert len(drawn) == (rows if rows >= 8 else 0)  # the rows in no cluster among them


def test_data_sets_without_clusters_are_named_and_meet_by_chance(caplog):
    names = ["big"] * 40 + ["few targets"] * 24 + ["tiny"] * 3
    queries, targets, _ = planted(67, 1)
    targets[40:64] = targets[np.arange(24) % 2 + 40]
    with caplog.at_level(logging.WARNING):
        sampler = make(dataset_of(67, names=names), (queries, targets), homogeneous=True, range_min=2, range_max=20)
        batches = global_batches(sampler, 2)
    assert "The data sets ['few targets', 'tiny'] have no clusters, so their rows meet by chance" in caplog.text
    assert (sampler.clusters[40:] == -1).all()
    assert len(batches) == 8


def test_nothing_to_cluster_is_refused():
    queries, targets, _ = planted(20, 2)
    with pytest.raises(ValueError, match=r"No two rows have each other's target among the 6 ranks.*Lower `range_min`"):
        make(dataset_of(40), (queries, np.ones_like(targets)))  # every row has the same target
    with pytest.raises(ValueError, match="No two rows have each other's target among the 100 ranks"):
        make(dataset_of(40), (queries, targets), range_min=40, range_max=140)
    alone = np.full((8, 3), -1)
    assert find_clusters(alone, np.arange(8), apart(8), 9).tolist() == [-1] * 8  # fewer rows than a cluster


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"cluster_size": 3}, ValueError, r"`cluster_size=3` must divide the global batch, 8 rows \(2 x 4\)"),
        ({"cluster_size": 1}, ValueError, "`cluster_size=1`, but it must be at least 2, or None"),
        ({"cluster_size": 4.0}, TypeError, "`cluster_size=4.0`"),
        ({"hard_negatives_together": 2}, ValueError, "either `cluster_size=4` or `hard_negatives_together=2`"),
        ({"range_min": 6}, ValueError, "`range_min=6` and `range_max=6` leave no ranks"),
        ({"range_min": -1}, ValueError, "`range_min=-1`"),
        ({"range_max": None}, TypeError, "`range_max=None`"),
    ],
)
def test_options_that_cannot_be_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        make(dataset_of(40), planted(10, 4)[:2], **options)


def test_a_guide_and_metis_are_needed(monkeypatch):
    with pytest.raises(ValueError, match="`cluster_size=4` needs `guide_queries` and `guide_targets`"):
        FalseNegativeAwareBatchSampler(dataset_of(40), 4, True, cluster_size=4)
    monkeypatch.setitem(sys.modules, "pymetis", None)
    make(dataset_of(40), planted(10, 4)[:2], cluster_size=None)  # without clusters nothing is missing
    with pytest.raises(ImportError, match=r'`cluster_size` needs METIS: `pip install "unime_st\[b3\]"`'):
        make(dataset_of(40), planted(10, 4)[:2])
