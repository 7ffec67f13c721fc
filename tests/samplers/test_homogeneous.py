"""Global batches of one data set, and a cap of rows a data set."""

import itertools
import logging

import numpy as np
import pytest
from datasets import Dataset
from test_sampler_in_trainer import train

from unime_st.columns import Columns, training_columns, without_subset
from unime_st.identity.rows import row_identities
from unime_st.samplers import FalseNegativeAwareBatchSampler

SIZES = {"VQA": 150, "Retrieval": 90, "Classes": 60, "Tiny": 5}
WORLD_SIZES = (1, 2, 4)


def mixture(seed=0, targets=0.6):
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.repeat(list(SIZES), list(SIZES.values())))
    rows = len(names)
    columns = {
        "anchor": [f"query {number}" for number in rng.integers(0, 4 * rows, rows)],
        "positive": [f"target {number}" for number in rng.integers(0, int(rows * targets), rows)],
        "subset": names.tolist(),
    }
    return Dataset.from_dict(columns).with_transform(without_subset), names


def make(dataset, world_size, drop_last=True, **options):
    return FalseNegativeAwareBatchSampler(dataset, 8 // world_size, drop_last, seed=3, world_size=world_size, **options)


def global_batches(sampler, world_size):
    batches = list(sampler)
    assert len(batches) == len(sampler) > 0
    return [
        list(itertools.chain.from_iterable(batches[i : i + world_size])) for i in range(0, len(batches), world_size)
    ]


def assert_apart(dataset, rows):
    stored = dataset.with_format(None)
    for name in ("anchor", "positive"):
        assert len({stored[row][name] for row in rows}) == len(rows)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_global_batch_is_of_one_data_set(world_size, drop_last):
    dataset, names = mixture()
    sampler = make(dataset, world_size, drop_last, homogeneous=True)
    seen, lengths = [], []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = global_batches(sampler, world_size)
        rows = list(itertools.chain.from_iterable(batches))
        assert len(set(rows)) == len(rows)
        assert sorted([*rows, *sampler.unplaced.tolist()]) == list(range(len(names)))
        for batch in batches:
            assert len({names[row] for row in batch}) == 1
            assert_apart(dataset, batch)
        full = batches if drop_last else batches[:-1]
        assert {len(batch) for batch in full} == {8}
        kinds = [names[batch[0]] for batch in full]
        # As many batches of each as its rows fill, but for a few that conflict; mixed over the epoch.
        assert [kinds.count(name) for name in SIZES] == pytest.approx([18, 11, 7, 0], abs=1)
        assert sum(a != b for a, b in itertools.pairwise(kinds)) > 8
        lengths.append([len(batch) for batch in batches])
        seen.append(str(batches))
    assert len(set(seen)) == 4
    assert all(one == lengths[0] for one in lengths)
    if not drop_last:
        assert 0 < lengths[0][-1] < 8


def test_mixed_batches_are_mixed_with_the_column_there():
    dataset, names = mixture()
    batches = global_batches(make(dataset, 2), 2)
    assert sum(len({names[row] for row in batch}) > 1 for batch in batches) == len(batches)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_cap_takes_other_rows_each_epoch(world_size, homogeneous):
    dataset, names = mixture()
    sampler = make(dataset, world_size, homogeneous=homogeneous, max_rows_per_dataset=40)
    used, length = [], len(sampler)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        batches = global_batches(sampler, world_size)
        rows = list(itertools.chain.from_iterable(batches))
        assert len(set(rows)) == len(rows)
        assert len(list(sampler)) == length
        for batch in batches:
            assert_apart(dataset, batch)
        counts = {name: int((names[rows] == name).sum()) for name in SIZES}
        assert max(counts.values()) <= 40
        assert counts["VQA"] >= 32
        used.append(set(rows))
    assert len(set.union(*used)) > 200 > 4 * 40
    assert used[0] != used[1]


def test_resuming_needs_the_seed_and_the_epoch_only():
    dataset, _ = mixture()
    options = {"homogeneous": True, "max_rows_per_dataset": 60}
    sampler = make(dataset, 2, **options)
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for epoch in (3, 1, 0):
        other = make(dataset, 2, **options)
        other.set_epoch(epoch)
        assert list(other) == epochs[epoch]


def test_hard_negatives_meet_within_a_data_set():
    dataset, names = mixture(targets=5.0)
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(12, 16))
    queries = topics[rng.integers(0, 12, len(names))] + rng.normal(size=(len(names), 16)) * 0.4
    targets = queries + rng.normal(size=queries.shape) * 0.1
    unit = [side / np.linalg.norm(side, axis=1)[:, None] for side in (queries, targets)]
    scores, hardness = unit[0] @ unit[1].T, []
    for together in (0, 2):
        guide = {"guide_queries": queries, "guide_targets": targets, "margin": 0.02}
        sampler = make(dataset, 2, homogeneous=True, hard_negatives_together=together, **guide)
        hardest = []
        for batch in global_batches(sampler, 2):
            assert len({names[row] for row in batch}) == 1
            block = scores[np.ix_(batch, batch)]
            assert not (block > block.diagonal()[:, None] + 0.02 + 1e-6).any()
            hardest.append((block - 9 * np.eye(len(block))).max(axis=1).mean())
        hardness.append(np.mean(hardest))
    assert hardness[1] > hardness[0] + 0.05


def test_a_data_set_too_small_and_a_missing_or_visible_column_are_named(caplog):
    dataset, _ = mixture()
    with caplog.at_level(logging.WARNING):
        len(make(dataset, 2, homogeneous=True))
    assert "['Tiny'] do not fill one global batch of 8 rows" in caplog.text
    plain = Dataset.from_dict({"anchor": list("abcd"), "positive": list("wxyz")})
    for options in ({"homogeneous": True}, {"max_rows_per_dataset": 2}):
        with pytest.raises(ValueError, match=r"'subset'.*load_mmeb_train\(\.\.\., subset_column=True\)"):
            make(plain, 1, **options)
    with pytest.raises(ValueError, match=r"explicit negatives\. Hide it: `dataset\.with_transform"):
        make(dataset.with_format(None), 1, homogeneous=True)
    with pytest.raises(ValueError, match="would leave no rows"):
        make(dataset, 1, max_rows_per_dataset=0)
    few = plain.add_column("subset", list("aabb")).with_transform(without_subset)
    with pytest.raises(ValueError, match="from one data set and without false negatives"):
        len(FalseNegativeAwareBatchSampler(few, 3, True, world_size=1, homogeneous=True))


def test_the_column_is_no_content_in_the_trainer(tmp_path):
    rows = {"anchor": [f"q{i}" for i in range(24)], "positive": [f"t{i}" for i in range(24)], "subset": list("ab") * 12}
    dataset = Dataset.from_dict(rows).with_transform(without_subset)
    collated = []
    seen = train(dataset, str(tmp_path), options={"homogeneous": True}, collated=collated)
    assert len(seen) == len(collated) == 18
    parity = [{int(query[1:]) % 2 for query, _ in batch} for batch in seen]
    assert all(len(one) == 1 for one in parity)
    assert {0} in parity
    assert {1} in parity
    assert {name.split("_")[0] for batch in collated for name in batch} == {"anchor", "positive"}
    assert training_columns(dataset.column_names) == Columns("anchor", "positive")


def test_the_trainer_refuses_a_stored_dataset_name(tmp_path):
    """Why the column is not called as the Trainer calls its own."""
    rows = {"anchor": list("abcd"), "positive": list("wxyz"), "dataset_name": list("aabb")}
    with pytest.raises(ValueError, match="dataset_name"):
        train(Dataset.from_dict(rows), str(tmp_path))


def test_quick_identities_tell_the_same_rows_apart_as_content_hashes():
    from unime_st.fingerprint import content_id

    rng = np.random.default_rng(0)
    texts, images = ["", None, "a", "b", "a b"], [None, "a.png", "b.png", ""]
    cells = [
        {"image": images[i], "text": texts[t]}
        for i, t in zip(rng.integers(0, 4, 200), rng.integers(0, 5, 200), strict=True)
    ]
    plain = [texts[t] for t in rng.integers(0, 5, 200)]
    chats = [
        [{"role": role, "content": text or "c"}]
        for role, text in zip(rng.choice(["user", "system"], 200), plain, strict=True)
    ]
    for anchor in (cells, plain, chats):
        dataset = Dataset.from_dict({"anchor": anchor, "positive": plain})
        found = next(iter(row_identities(dataset)))
        stored = dataset["anchor"][:]
        expected = np.array([content_id(value, read_files=False) for value in stored])
        assert len(set(expected)) > 2
        assert ((found[:, None] == found) == (expected[:, None] == expected)).all()
