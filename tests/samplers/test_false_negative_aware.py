import itertools
import logging
import pickle

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from unime_st.samplers import FalseNegativeAwareBatchSampler, SamplerEpochCallback

WORLD_SIZES = (1, 2, 4)


def table(rows=200, seed=0, targets=90, queries=150, labels=60):
    rng = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            "anchor": [f"query {number}" for number in rng.integers(0, queries, rows)],
            "positive": [f"target {number}" for number in rng.integers(0, targets, rows)],
            "negative_1": ["the same for all"] * rows,
            "label": rng.integers(0, labels, rows).tolist(),
        }
    )


def batches_of(dataset, world_size, batch_size=4, drop_last=True, epoch=0, **options):
    sampler = FalseNegativeAwareBatchSampler(
        dataset, batch_size, drop_last, ["label", "score"], seed=3, world_size=world_size, **options
    )
    sampler.set_epoch(epoch)
    return sampler, list(sampler)


def assert_sound(dataset, sampler, batches, world_size, columns=("anchor", "positive", "label")):
    assert len(batches) == len(sampler) > 0
    used = list(itertools.chain.from_iterable(batches))
    assert len(used) == len(set(used))
    assert sorted([*used, *sampler.unplaced.tolist()]) == list(range(len(dataset)))
    stored = {column: dataset[column][:] for column in columns}
    for start in range(0, len(batches), world_size):
        rows = list(itertools.chain.from_iterable(batches[start : start + world_size]))
        for column in columns:
            values = [stored[column][row] for row in rows]
            assert len(set(values)) == len(values), f"{column} repeats within a global batch"


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_no_false_negatives_within_a_global_batch(world_size, drop_last, seed):
    dataset = table(seed=seed)
    for epoch in range(3):
        sampler, batches = batches_of(dataset, world_size, drop_last=drop_last, epoch=epoch)
        assert_sound(dataset, sampler, batches, world_size)
        full = batches if drop_last else batches[: len(batches) // world_size * world_size - world_size]
        assert {len(batch) for batch in full} == {4}
        used = sum(map(len, batches))
        assert used > (170 if drop_last else 185)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_plain_sampler_would_fail_these_tests(world_size):
    dataset = table()
    order = np.random.default_rng(0).permutation(192).reshape(-1, 4 * world_size)
    clashes = sum(
        len({dataset[column][row] for row in rows}) < len(rows) for rows in order for column in ("positive", "label")
    )
    assert clashes > len(order) / 20


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_guides_false_negatives_are_kept_apart(world_size):
    rng = np.random.default_rng(0)
    rows, margin = 160, 0.1
    queries = rng.normal(size=(rows, 6)).astype(np.float32)
    targets = queries + rng.normal(size=(rows, 6)).astype(np.float32) * 0.6
    dataset = Dataset.from_dict({"q": [f"q{i}" for i in range(rows)], "t": [f"t{i}" for i in range(rows)]})
    sampler, batches = batches_of(dataset, world_size, guide_queries=queries, guide_targets=targets, margin=margin)
    assert_sound(dataset, sampler, batches, world_size, columns=("q", "t"))
    unit = [torch.nn.functional.normalize(torch.tensor(side), dim=1) for side in (queries, targets)]
    scores = unit[0] @ unit[1].T
    false = scores > scores.diagonal()[:, None] + margin
    assert int(false.sum()) > 300
    for start in range(0, len(batches), world_size):
        members = list(itertools.chain.from_iterable(batches[start : start + world_size]))
        assert not bool(false[members][:, members].any())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_hard_negatives_are_drawn_together_and_false_ones_still_apart(world_size):
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(20, 12))
    queries = topics[rng.integers(0, 20, 320)] + rng.normal(size=(320, 12)) * 0.3
    targets = queries + rng.normal(size=(320, 12)) * 0.1
    dataset = table(320, targets=250, queries=300, labels=200)
    guide = {"guide_queries": queries, "guide_targets": targets, "margin": 0.02}
    scores = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        targets / np.linalg.norm(targets, axis=1)[:, None]
    ).T
    hardness = []
    for together in (0, 3):
        sampler, batches = batches_of(dataset, world_size, **guide, hard_negatives_together=together)
        assert_sound(dataset, sampler, batches, world_size)
        assert batches != batches_of(dataset, world_size, epoch=1, **guide, hard_negatives_together=together)[1]
        hardest = []
        for start in range(0, len(batches), world_size):
            members = list(itertools.chain.from_iterable(batches[start : start + world_size]))
            block = scores[np.ix_(members, members)]
            assert not (block > block.diagonal()[:, None] + 0.02).any()
            hardest.append((block - 9 * np.eye(len(block))).max(axis=1).mean())
        hardness.append(np.mean(hardest))
    assert hardness[1] > hardness[0] + 0.05
    with pytest.raises(ValueError, match="to tell what is hard"):
        batches_of(dataset, world_size, hard_negatives_together=2)


def test_the_guide_may_be_files(tmp_path):
    dataset = Dataset.from_dict({"q": list("abcd"), "t": list("wxyz")})
    queries = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    for name, array in (("q", queries), ("t", queries[[1, 0, 2, 3]])):
        np.save(tmp_path / f"{name}.npy", array)
    options = {"guide_queries": tmp_path / "q.npy", "guide_targets": str(tmp_path / "t.npy"), "margin": 0.001}
    make = FalseNegativeAwareBatchSampler.configured(**options)
    sampler = pickle.loads(pickle.dumps(make))(dataset, batch_size=2, drop_last=True)
    assert all(sorted(batch) != [0, 1] for epoch in range(20) for batch in (sampler.set_epoch(epoch), *sampler)[1:])


@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_differ_and_keep_their_length(drop_last):
    dataset = table()
    sampler, first = batches_of(dataset, 2, drop_last=drop_last)
    seen = [first]
    for epoch in range(1, 12):
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert_sound(dataset, sampler, seen[-1], 2)
        assert [len(batch) for batch in seen[-1]] == [len(batch) for batch in first]
    assert len({str(batches) for batches in seen}) == len(seen)


def test_an_epoch_depends_on_the_seed_and_its_number_only():
    dataset = table()
    sampler, first = batches_of(dataset, 2, epoch=5)
    torch.rand(3)
    np.random.seed(9)  # noqa: NPY002 the global generators must not matter
    for epoch in (5, 2, 5, 5):
        sampler.set_epoch(epoch)
    assert list(sampler) == list(sampler) == batches_of(dataset, 2, epoch=5)[1] == first
    partial = iter(sampler)
    next(partial)
    assert list(sampler) == first
    assert [*list(partial)] == first[1:]


def test_tight_rows_fall_back_on_the_first_plan(monkeypatch, caplog):
    """When an epoch's draw cannot fill what the first plan filled, its batches come again in another order."""
    dataset = table()
    sampler, first = batches_of(dataset, 2, drop_last=False)
    monkeypatch.setattr("unime_st.samplers.planning.plan._EPOCH_TRIES", 0)
    with caplog.at_level(logging.INFO):
        sampler.set_epoch(1)
        again = list(sampler)
    assert_sound(dataset, sampler, again, 2)
    assert "repeats the first plan's batches" in caplog.text
    sampler.set_epoch(2)
    assert list(sampler) != again
    assert len(again) == len(first)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_that_do_not_fit_are_reported(world_size, caplog):
    """4 classes at 4 rows a global batch: as many batches as the smallest class has rows."""
    sizes = (40, 30, 20, 10)
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    dataset = Dataset.from_dict(
        {"q": [f"{i}" for i in range(100)], "t": [f"t{i}" for i in range(100)], "label": labels}
    )
    with caplog.at_level(logging.WARNING):
        sampler, batches = batches_of(dataset, world_size, batch_size=4 // world_size)
    assert_sound(dataset, sampler, batches, world_size, columns=("label",))
    assert len(sampler) == 10 * world_size
    assert np.bincount(np.asarray(labels)[sampler.unplaced]).tolist() == [30, 20, 10]
    assert "60 of 100 rows (60.0 %) are left out of each epoch" in caplog.text
    before = set(sampler.unplaced.tolist())
    sampler.set_epoch(1)
    assert set(sampler.unplaced.tolist()) != before  # others every time


def test_impossible_batches_are_refused_with_advice():
    dataset = Dataset.from_dict({"q": list("abcdef"), "t": ["yes", "no"] * 3})
    with pytest.raises(ValueError, match=r"Not one global batch of 4 rows \(2 x 2\).*Lower the batch size"):
        len(FalseNegativeAwareBatchSampler(dataset, 2, True, world_size=2))
    assert len(FalseNegativeAwareBatchSampler(dataset, 1, True, world_size=2)) == 6
    assert len(FalseNegativeAwareBatchSampler(dataset, 8, True)) == 0  # fewer rows than a batch: as everywhere
    assert list(FalseNegativeAwareBatchSampler(dataset, 8, False)) != []
    with pytest.raises(TypeError, match=r"datasets\.Dataset of known length"):
        FalseNegativeAwareBatchSampler(["a"], 2, True)
    with pytest.raises(ValueError, match="both `guide_queries` and `guide_targets`"):
        FalseNegativeAwareBatchSampler(dataset, 2, True, guide_queries=np.eye(6))
    with pytest.raises(ValueError, match=r"shape \(5, 6\), but one embedding a row is needed: \(6, D\)"):
        len(FalseNegativeAwareBatchSampler(dataset, 2, True, guide_queries=np.eye(6)[:5], guide_targets=np.eye(6)))
    with pytest.raises(ValueError, match="at least one process"):
        FalseNegativeAwareBatchSampler(dataset, 2, True, world_size=0)


def test_scores_and_embeddings_are_no_identity_and_a_missing_label_equals_none():
    rows = {"q": list("abcd"), "t": list("wxyz")}
    for label in ([0.5] * 4, [[1.0, 2.0]] * 4, [None, None, None, 3]):
        dataset = Dataset.from_dict({**rows, "label": label})
        assert len(FalseNegativeAwareBatchSampler(dataset, 4, True)) == 1
    dataset = Dataset.from_dict({**rows, "label": [True, True, False, False]})
    assert len(FalseNegativeAwareBatchSampler(dataset, 2, True)) == 2


def test_stored_cells_are_compared_beneath_a_transform_and_never_decoded(tmp_path):
    """Paths that do not exist, and a transform that fails, are never touched."""

    def explode(batch):
        raise AssertionError("the transform was called")

    cells = [{"image": f"{number % 5}.png", "text": "same"} for number in range(10)]
    dataset = Dataset.from_dict({"anchor": [f"{i}" for i in range(10)], "positive": cells}).with_transform(explode)
    sampler = FalseNegativeAwareBatchSampler(dataset, 5, True)
    assert all(len({row % 5 for row in batch}) == 5 for batch in sampler)
    chosen = dataset.select([0, 5, 1, 6])  # rows in another order than the table's
    assert all({row // 2 for row in batch} == {0, 1} for batch in FalseNegativeAwareBatchSampler(chosen, 2, True))

    for name, colour in (("a", "red"), ("b", "blue")):
        PILImage.new("RGB", (2, 2), colour).save(tmp_path / f"{name}.png")
    images = [PILImage.open(tmp_path / f"{name}.png") for name in "aabb"]
    dataset = Dataset.from_dict({"q": list("wxyz"), "t": images}).cast_column("t", Image())
    assert all({row // 2 for row in batch} == {0, 1} for batch in FalseNegativeAwareBatchSampler(dataset, 2, True))


def test_fifty_thousand_rows_are_quick():
    rng = np.random.default_rng(0)
    conflicts_of = table(50_000, targets=30_000, queries=45_000, labels=2_000)
    sampler = FalseNegativeAwareBatchSampler(conflicts_of, 32, True, ["label"], world_size=4)
    batches = np.asarray(list(sampler))
    labels = np.asarray(conflicts_of["label"])[batches].reshape(-1, 128)
    assert len(batches) > 1550
    assert all(len(set(row)) == 128 for row in labels[rng.choice(len(labels), 50)])


def shards(dataset, world_size):
    """What accelerate gives each of several processes."""
    loaders = []
    for rank in range(world_size):
        sampler = FalseNegativeAwareBatchSampler(dataset, 4, True, ["label"], seed=3, world_size=world_size)
        loader = DataLoader(range(len(dataset)), batch_sampler=sampler, collate_fn=list)
        loaders.append(
            prepare_data_loader(
                loader, num_processes=world_size, process_index=rank, put_on_device=False, even_batches=False
            )
        )
    return loaders


@pytest.mark.parametrize("world_size", [2, 4])
def test_accelerate_deals_global_batches_and_resumes_them(world_size):
    dataset = table()
    _, batches = batches_of(dataset, world_size, epoch=2)
    expected = [batches[rank::world_size] for rank in range(world_size)]
    for rank, loader in enumerate(shards(dataset, world_size)):
        callback, state = SamplerEpochCallback(), type("State", (), {"epoch": 2.4})
        resumed = skip_first_batches(loader, 3)
        callback.on_epoch_begin(None, state, None, train_dataloader=loader)
        assert list(resumed) == expected[rank][3:]
        assert len(resumed) == len(expected[rank]) - 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "3"}, "seed='3'"),
        ({"world_size": -2}, "at least one process"),
        ({"world_size": 1.5}, "world_size=1.5"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"margin": float("-inf")}, "margin=-inf"),
        ({"margin": "0.1"}, "margin='0.1'"),
        ({"hard_negatives_together": -1}, "hard_negatives_together=-1"),
        ({"hard_negatives_together": True}, "hard_negatives_together=True"),
        ({"max_rows_per_dataset": 0}, "would leave no rows"),
        ({"max_rows_per_dataset": 2.5}, "max_rows_per_dataset=2.5"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    rows = Dataset.from_dict({"q": list("abcd"), "t": list("wxyz"), "subset": ["s"] * 4})
    with pytest.raises((TypeError, ValueError), match=message):
        FalseNegativeAwareBatchSampler(rows, **{"batch_size": 2, "drop_last": False, **options})
