"""Each data set has its share of the steps, all processes the same set in a step, and every epoch repeats itself."""

import itertools
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset, RandomSampler

from unime_st.samplers import FalseNegativeAwareBatchSampler, WeightedBatchSampler

SIZES = (40, 16, 9)


def make(weights, world_size=1, batch_size=2, drop_last=True, seed=3):
    sets = [
        Dataset.from_dict(
            {"q": [f"{number}, {row}" for row in range(size)], "t": [f"t {number} {row}" for row in range(size)]}
        )
        for number, size in enumerate(SIZES)
    ]
    samplers = [
        FalseNegativeAwareBatchSampler(rows, batch_size, drop_last, seed=seed, world_size=world_size) for rows in sets
    ]
    return WeightedBatchSampler(ConcatDataset(sets), samplers, seed=seed, weights=weights, world_size=world_size)


def set_of(row):
    return next(number for number, end in enumerate(itertools.accumulate(SIZES)) if row < end)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 1), (0.5, 10, 0.1)])
def test_shares_are_those_of_the_weights(weights, world_size):
    sampler = make(weights, world_size)
    batches = list(sampler)
    assert len(batches) == len(sampler) == world_size * sum(size // (2 * world_size) for size in SIZES)
    steps = [batches[start : start + world_size] for start in range(0, len(batches), world_size)]
    drawn = Counter()
    for step in steps:
        (number,) = {set_of(row) for batch in step for row in batch}
        rows = [row for batch in step for row in batch]
        assert len(set(rows)) == len(rows) == 2 * world_size
        drawn[number] += 1
    for number, weight in enumerate(weights):
        assert abs(drawn[number] - weight / sum(weights) * len(steps)) < 1


def test_a_small_set_starts_anew_in_another_order_and_a_large_one_changes():
    sampler = make((1, 1, 18))
    passes = -(-sampler.counts[2] // 4)
    assert passes > 3
    small = [row for batch in sampler for row in batch if set_of(row) == 2]
    rounds = [small[start : start + 8] for start in range(0, len(small) - 7, 8)]
    assert all(len(set(rows)) == 8 for rows in rounds)
    assert len(set(map(tuple, rounds))) == len(rounds)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert seen[-1] == list(sampler)  # as a resumed run draws it again
    assert seen[0] != seen[1] != seen[2]
    large = [{row for batch in epoch for row in batch if set_of(row) == 0} for epoch in seen]
    assert large[0] != large[1]
    small = [tuple(row for batch in epoch for row in batch if set_of(row) == 2) for epoch in seen]
    assert len(set(small)) == 3


def test_stock_samplers_of_a_set_will_do():
    sets = ConcatDataset([list(range(6)), list(range(3))])
    samplers = [BatchSampler(range(6), 2, drop_last=False), BatchSampler(range(3), 2, drop_last=False)]
    batches = list(WeightedBatchSampler(sets, samplers, weights=[1, 1]))
    assert sorted(map(len, batches)) == [1, 2, 2, 2, 2]
    assert {row for batch in batches for row in batch} >= {6, 7, 8}


def with_stock(world_size=1, seed=3):
    """As the Trainer makes them without `batch_sampler`: one generator for the rows of all sets."""
    sets, generator = [range(11), range(15)], torch.Generator().manual_seed(seed)
    samplers = [
        DefaultBatchSampler(RandomSampler(rows, generator=generator), 2, False, generator=generator, seed=seed)
        for rows in sets
    ]
    options = {"weights": [1, 1], "world_size": world_size}
    return WeightedBatchSampler(ConcatDataset(sets), samplers, generator, seed, **options)


def test_stock_samplers_draw_an_epoch_again_as_it_was():
    never_stopped, resumed, epochs = with_stock(), with_stock(), []
    for epoch in range(3):
        never_stopped.set_epoch(epoch)
        epochs.append(list(never_stopped))
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2] != epochs[1]


@pytest.mark.parametrize("make", [with_stock, lambda world_size, seed: make((2, 1, 1), world_size, 3, False, seed)])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_process_gets_its_batch_of_every_step(world_size, seed, make):
    sampler = make(world_size=world_size, seed=seed)
    shards = [BatchSamplerShard(sampler, world_size, rank) for rank in range(world_size)]
    shares = [list(shard) for shard in shards]
    assert [len(share) for share in shares] == [len(sampler) // world_size] * world_size == list(map(len, shards))
    for step in zip(*shares, strict=True):
        rows = [row for batch in step for row in batch]
        assert len(set(rows)) == len(rows) == sampler.batch_size * world_size
        ends = sampler.dataset.cumulative_sizes
        assert len({next(number for number, end in enumerate(ends) if row < end) for row in rows}) == 1


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((1, 1), ValueError, "There are 2 `weights`, but 3 data sets"),
        ((1, 0, 1), ValueError, r"`weights\[1\]=0`"),
        ((1, "2", 1), TypeError, r"`weights\[1\]='2'`"),
        ((1, float("inf"), 1), ValueError, "finite"),
        ((1, float("nan"), 1), ValueError, r"`weights\[1\]=nan`"),
    ],
)
def test_wrong_weights_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        make(weights)


def test_a_weight_too_small_for_one_batch_is_told(caplog):
    sampler = make((1000, 1000, 1))
    assert sampler.counts[2] == 0
    assert "Data set 2 is never trained on: `weights[2]=1`" in caplog.text


def test_weights_of_any_size_are_ratios():
    assert make((1e308, 1e308, 1e308)).counts == make((1, 1, 1)).counts


def test_a_set_that_fills_no_global_batch_is_refused():
    with pytest.raises(ValueError, match=r"Data set 2 of 3 does not fill one global batch on 8 process"):
        make((1, 1, 1), world_size=8, drop_last=False)
