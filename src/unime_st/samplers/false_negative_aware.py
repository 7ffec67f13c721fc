"""Batches in which no row is a false negative of another."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

from unime_st import distributed
from unime_st.samplers.conflicts import Conflicts, find_conflicts, guide_pairs, row_identities
from unime_st.samplers.packing import compatible, pack
from unime_st.samplers.together import draw_together, hardest_rows

logger = logging.getLogger(__name__)

_EPOCH_TRIES = 3


@dataclass(frozen=True)
class _Plan:
    """One epoch.

    Attributes:
        full: ``(bins, W * B)`` rows of each global batch.
        tail: Rows of the last, smaller one; empty with ``drop_last``.
    """

    full: np.ndarray
    tail: np.ndarray


class FalseNegativeAwareBatchSampler(DefaultBatchSampler):
    """Batches whose rows may serve as each other's negatives, on one process or several.

    Two rows never meet in one *global* batch, the ``W`` consecutive batches that ``W`` processes get, when they have

    * the same target content, the same query content or the same label, or
    * with a guide: a query that is more similar to the other row's target than to its own, by more than ``margin``.

    Every row is drawn at most once an epoch. Rows that conflict with too many others to be placed are left out of the
    epoch, others each time, counted in the log and listed in :attr:`unplaced`.

    Give the class to ``batch_sampler=`` of the training arguments, or :meth:`configured` with options.

    Contents are compared as stored: a path by its name, bytes by their content, and through any ``with_transform``, so
    nothing is decoded. The first use reads the whole table once. Explicit negatives are not compared: the loss
    recognises those that equal a right answer.

    Args:
        dataset: The training set; the first column is the query, the second the target.
        batch_size: Rows a batch on each process, ``B``.
        drop_last: Leave out what does not fill a whole global batch. Else it comes last, in batches of ``B`` and one of
            the rest.
        valid_label_columns: Names taken for the label. A label counts when it is an integer, boolean or string, not
            when it is a score or an embedding.
        generator: Ignored: epochs are drawn from a private generator made of ``seed`` and the epoch, so that resuming
            repeats them.
        seed: See above.
        world_size: Processes that share a global batch, ``W``; None for the number running.
        guide_queries: ``(N, D)`` embeddings of the rows' queries by a guide, or the path of an ``.npy`` file of them. A
            path is better in training, because the Trainer stores its arguments with each checkpoint.
        guide_targets: ``(N, D)`` embeddings of the targets, likewise.
        margin: Of the guide, in cosine similarity, as ``margin`` of
            :class:`~unime_st.losses.HardNegativeInfoNCELoss`.
        hard_negatives_together: How many of each row's hardest rows by the guide, false ones left out, to draw into its
            global batch where they fit; 0 leaves batches to chance.

    Raises:
        TypeError: When the data set is not a ``datasets.Dataset``.
        ValueError: When the guide's embeddings do not fit, or the rows conflict so much that they fill not one global
            batch.

    Relations:
        ``NoDuplicatesBatchSampler`` looks at one process's batch only, at texts in any column, and may draw rows twice;
        its length is an estimate.

    Example:
        >>> rows = Dataset.from_dict({"query": ["a", "b", "c", "d"], "target": ["x", "x", "y", "y"]})
        >>> sampler = FalseNegativeAwareBatchSampler(rows, batch_size=2, drop_last=True)
        >>> len(sampler), [sorted(rows[batch]["target"]) for batch in sampler]
        (2, [['x', 'y'], ['x', 'y']])
    """

    def __init__(  # noqa: PLR0917 the Trainer's order
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        world_size: int | None = None,
        guide_queries: np.ndarray | torch.Tensor | str | Path | None = None,
        guide_targets: np.ndarray | torch.Tensor | str | Path | None = None,
        margin: float = 0.1,
        hard_negatives_together: int = 0,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{type(self).__name__} needs a datasets.Dataset of known length, got {type(dataset)}.")
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.dataset = dataset
        self.world_size = distributed.world_size() if world_size is None else world_size
        if self.world_size < 1:
            raise ValueError(f"`world_size={world_size}`, but at least one process is needed.")
        if (guide_queries is None) != (guide_targets is None):
            raise ValueError("A guide needs both `guide_queries` and `guide_targets`; only one was given.")
        if hard_negatives_together < 0 or (hard_negatives_together and guide_queries is None):
            raise ValueError(
                f"`hard_negatives_together={hard_negatives_together}` must be 0, or a number above with "
                "`guide_queries` and `guide_targets` to tell what is hard."
            )
        self.margin = margin
        self.hard_negatives_together = hard_negatives_together
        self._guide = (guide_queries, guide_targets)
        self._epoch_plan: tuple[int, _Plan] | None = None

    @classmethod
    def configured(cls, **options: Any) -> Callable[..., FalseNegativeAwareBatchSampler]:
        """Bind options, for ``batch_sampler=`` of the training arguments.

        Args:
            options: Of the constructor: ``world_size``, ``guide_queries``, ``guide_targets``, ``margin``,
                ``hard_negatives_together``.

        Example:
            >>> batch_sampler = FalseNegativeAwareBatchSampler.configured(world_size=4)
            >>> batch_sampler(Dataset.from_dict({"q": ["a"], "t": ["b"]}), batch_size=1, drop_last=False).world_size
            4
        """
        return functools.partial(cls, **options)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the current epoch's batches, exactly ``len(self)`` of them."""
        plan = self._plan()
        for rows in (*plan.full, plan.tail):
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        """Return the number of batches, the same in every epoch."""
        plan = self._base_plan
        return len(plan.full) * self.world_size + -(-len(plan.tail) // self.batch_size)

    @property
    def unplaced(self) -> np.ndarray:
        """Rows in no batch of the current epoch, in ascending order: for conflicts, or left over by ``drop_last``."""
        plan = self._plan()
        return np.setdiff1d(np.arange(len(self.dataset)), np.concatenate([plan.full.ravel(), plan.tail]))

    @functools.cached_property
    def conflicts(self) -> Conflicts:
        """What is known of the rows; found on first use."""
        identities = row_identities(self.dataset, self.valid_label_columns)
        guide = self._load_guide()
        pairs = None if guide is None else guide_pairs(guide[0], guide[1], self.margin)
        return find_conflicts(identities, pairs, len(self.dataset))

    @functools.cached_property
    def _hardest(self) -> np.ndarray | None:
        guide = self._load_guide() if self.hard_negatives_together else None
        return None if guide is None else hardest_rows(guide[0], guide[1], self.margin, self.hard_negatives_together)

    def _load_guide(self) -> list[Any] | None:
        embeddings = []
        for name, given in zip(("guide_queries", "guide_targets"), self._guide, strict=True):
            if given is None:
                return None
            loaded = np.load(given, mmap_mode="r") if isinstance(given, (str, Path)) else given
            if loaded.ndim != 2 or len(loaded) != len(self.dataset):
                raise ValueError(
                    f"`{name}` has shape {tuple(loaded.shape)}, but one embedding a row is needed: "
                    f"({len(self.dataset)}, D), in the data set's order."
                )
            embeddings.append(loaded)
        return embeddings

    @functools.cached_property
    def _base_plan(self) -> _Plan:
        """A plan found once, whose size every epoch keeps."""
        rows, size = len(self.dataset), self._global_batch_size
        num_bins = rows // size
        attempt = 0
        plan, placed = self._draw(num_bins, np.random.default_rng([self.seed, attempt]))
        while plan is None:  # ends: no rows always fill no bins
            attempt += 1
            num_bins = max(0, placed // size - attempt // 20)  # in larger steps when small ones do not help
            plan, placed = self._draw(num_bins, np.random.default_rng([self.seed, attempt]))
        if len(plan.full) == 0 and rows >= size:
            raise ValueError(
                f"Not one global batch of {size} rows ({self.world_size} x {self.batch_size}) without false negatives "
                f"can be made of {rows} rows. Lower the batch size, or see whether the target, query or label column "
                "holds few distinct values."
            )
        left = rows - plan.full.size - len(plan.tail)
        conflicting = left - rows % size if self.drop_last else left
        if conflicting > 0:
            logger.warning(
                "%d of %d rows (%.1f %%) are left out of each epoch, others every time: they are false negatives of "
                "too many others to fill global batches of %d rows. A smaller batch size places more of them.",
                conflicting,
                rows,
                100 * conflicting / rows,
                size,
            )
        return plan

    @property
    def _global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def _draw(self, num_bins: int, rng: np.random.Generator) -> tuple[_Plan | None, int]:
        """Draw a plan with this many full global batches, or None when it fails; and how many rows found a place."""
        size = self._global_batch_size
        bins = pack(self.conflicts, num_bins, size, rng)
        placed = int((bins >= 0).sum())
        if placed < num_bins * size:
            return None, placed
        if self._hardest is not None:
            bins = draw_together(self.conflicts, bins, self._hardest, rng)
        order = rng.permutation(len(bins))
        order = order[np.argsort(bins[order], kind="stable")]  # unplaced rows first, then bin after bin
        left, full = np.split(order, [len(bins) - placed])
        tail = left[:0] if self.drop_last else compatible(self.conflicts, left, size)
        return _Plan(rng.permutation(full.reshape(num_bins, size)), tail), placed

    def _plan(self) -> _Plan:
        """The current epoch's plan, a function of the seed and the epoch only."""
        if self._epoch_plan is None or self._epoch_plan[0] != self.epoch:
            self._epoch_plan = (self.epoch, self._draw_epoch())
        return self._epoch_plan[1]

    def _draw_epoch(self) -> _Plan:
        base = self._base_plan
        for attempt in range(_EPOCH_TRIES):
            plan, _ = self._draw(len(base.full), np.random.default_rng([self.seed, self.epoch, attempt]))
            if plan is not None and len(plan.tail) >= len(base.tail):
                return _Plan(plan.full, plan.tail[: len(base.tail)])
        logger.info("Epoch %d repeats the first plan's batches in another order: no other was found.", self.epoch)
        rng = np.random.default_rng([self.seed, self.epoch, _EPOCH_TRIES])
        return _Plan(rng.permuted(rng.permutation(base.full), axis=1), base.tail)
