"""Several data sets in one training, each with its share of the steps."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

from unime_st import distributed
from unime_st.arguments import require_number

logger = logging.getLogger(__name__)


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Global batches of one data set each, as many of each set as its weight says, in random order.

    For ``multi_dataset_batch_sampler=`` of the training arguments, with a ``train_dataset`` of several sets by name:
    each keeps its own columns, loss and transform, and its batches are made by the ``batch_sampler`` as ever. All
    processes get batches of the same set in a step, which the stock multi-dataset samplers do not see to. An epoch has
    as many global batches as the sets have together. A set with too few for its share starts anew, its rows drawn in
    another order, as often as it takes; of one with too many, others are left out in each epoch, as are batches that
    do not fill a last global batch: on several processes all batches are full.

    Args:
        dataset: The Trainer's concatenation of the data sets.
        batch_samplers: One a data set.
        generator: Of the stock batch samplers' rows; seeded anew in each epoch by ``seed`` and the epoch, by which the
            order of the sets is drawn too, so that resuming repeats both.
        seed: Of the order.
        weights: A number above 0 for each data set, in the order of ``train_dataset``; only their ratios count.
        world_size: Number of processes that share a global batch; None for the number running.

    Raises:
        ValueError: There are not as many weights as data sets, one is not above 0 and finite, or a data set does not
            fill one global batch.

    Relations:
        ``RoundRobinBatchSampler`` takes as much of each set, ``ProportionalBatchSampler`` goes by their sizes.

    Example:
        >>> sets = ConcatDataset([list(range(8)), list(range(4))])
        >>> samplers = [BatchSampler(range(8), 2, drop_last=True), BatchSampler(range(4), 2, drop_last=True)]
        >>> sampler = WeightedBatchSampler(sets, samplers, weights=[1, 2])
        >>> len(sampler), sum(batch[0] >= 8 for batch in sampler)
        (6, 4)
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        weights: Sequence[float],
        world_size: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_samplers, generator, seed)
        if len(weights) != len(batch_samplers):
            raise ValueError(
                f"There are {len(weights)} `weights`, but {len(batch_samplers)} data sets. Give one for each, in the "
                "order of `train_dataset`."
            )
        for number, weight in enumerate(weights):
            require_number(f"weights[{number}]", weight, above=0, whole=False)
        if not np.isfinite(weights).all():
            raise ValueError(f"`weights={list(weights)}`, but they must be finite.")
        require_number("world_size", world_size, least=1, optional=True)
        self.world_size = distributed.world_size() if world_size is None else world_size
        sizes = np.diff([0, *dataset.cumulative_sizes]).tolist()
        self.available = [  # global batches of each set
            self._full(sampler, rows) // self.world_size for sampler, rows in zip(batch_samplers, sizes, strict=True)
        ]
        if 0 in self.available:
            number = self.available.index(0)
            raise ValueError(
                f"Data set {number} of {len(weights)} does not fill one global batch on {self.world_size} process(es). "
                "Lower `per_device_train_batch_size`, or leave it out."
            )
        self.counts = _shares(weights, sum(self.available))
        """Global batches of each data set in an epoch."""
        for number, weight in enumerate(weights):
            if not self.counts[number]:
                logger.warning(
                    "Data set %d is never trained on: `weights[%d]=%s` gives it none of an epoch's %d global batches.",
                    *(number, number, weight, sum(self.counts)),
                )

    @classmethod
    def configured(cls, **options: Any) -> Callable[..., WeightedBatchSampler]:
        """Bind options, for ``multi_dataset_batch_sampler=`` of the training arguments.

        Args:
            options: ``weights`` and perhaps ``world_size``.
        """
        return functools.partial(cls, **options)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the current epoch's batches, exactly ``len(self)`` of them."""
        order = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng([self.seed or 0, self.epoch]).shuffle(order)
        if self.generator is not None:  # stock batch samplers go on from where it is
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        coming = [self._global_batches(number) for number in range(len(self.counts))]
        starts = [0, *self.dataset.cumulative_sizes]
        for number in order:
            for batch in next(coming[number]):
                yield [starts[number] + row for row in batch]

    def __len__(self) -> int:
        """Return the number of batches, the same in every epoch."""
        return int(sum(self.counts)) * self.world_size

    def _full(self, sampler: BatchSampler, rows: int) -> int:
        """A sampler's batches that may be part of a global batch, which on several processes are full ones."""
        return len(sampler) if self.world_size == 1 else min(len(sampler), rows // self.batch_size)

    def _global_batches(self, number: int) -> Iterator[list[list[int]]]:
        """A data set's global batches, without end; each pass over it is an epoch of its sampler's."""
        sampler = self.batch_samplers[number]
        passes = -(-self.counts[number] // self.available[number])
        for turn in itertools.count():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch * passes + turn)
            batches = iter(sampler)
            found = 0
            while len(group := list(itertools.islice(batches, self.world_size))) == self.world_size:
                if self.world_size > 1 and len(group[-1]) < self.batch_size:
                    break  # accelerate would leave out this step, and fill the last one with rows of other sets
                found += 1
                yield group
            if not found:
                raise ValueError(f"The batch sampler of data set {number} gave no whole global batch.")


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers with this sum, in the ratios of the weights, by the largest remainders."""
    ratios = np.asarray(weights, dtype=float) / max(weights)
    exact = ratios / ratios.sum() * total
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares.tolist()
