"""Batches in which no row is a false negative of another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

from unime_st import distributed
from unime_st.arguments import require_number
from unime_st.columns import SUBSET
from unime_st.functional import check_margin
from unime_st.identity.rows import row_identities, subset_numbers
from unime_st.samplers.guide.clusters import find_clusters, import_pymetis
from unime_st.samplers.guide.embeddings import GuideEmbeddings
from unime_st.samplers.guide.neighbors import Neighbors, find_neighbors
from unime_st.samplers.guide.store import NeighborStore
from unime_st.samplers.planning.conflicts import Conflicts, find_conflicts
from unime_st.samplers.planning.plan import Clusters, HardRows, Plan, Planner
from unime_st.samplers.planning.report import report_plan


class FalseNegativeAwareBatchSampler(DefaultBatchSampler):
    """Batches whose rows may serve as each other's negatives, on one process or several.

    Two rows never meet in one *global* batch, the ``W`` consecutive batches that ``W`` processes get, when they have

    * the same target content, the same query content or the same label, or
    * with a guide: a query that is more similar to the other row's target than to its own, by more than ``margin``.

    Every row is drawn at most once an epoch. Rows that conflict with too many others to be placed are left out of the
    epoch, different ones each time, counted in the log and listed in :attr:`unplaced`.

    With ``homogeneous=True`` all rows of a global batch come from one data set, which the stored column ``subset``
    names, and the batches of the sets follow each other at random, so in proportion to their size. What is left of each
    set after its full global batches is left out of the epoch, other rows each time; without ``drop_last`` the last,
    smaller global batch comes from the set with the most rows left, always the same one, so that the length stays.

    Give the class to ``batch_sampler=`` of the training arguments, or :meth:`configured` with options.

    Contents are compared as stored: a path by its name, bytes by their content, and through any ``with_transform``, so
    nothing is decoded. The first use reads the whole table once. Explicit negatives are not compared: the loss
    recognises those that equal a right answer.

    The guide's embeddings are compared when the sampler is made: on rank 0, which hands the result to the others, so
    with several processes make it on all of them, as the Trainer does. All else is the same function of the seed, the
    epoch and the rows on every process.

    Args:
        dataset: The training set; the first column is the query, the second the target.
        batch_size: Rows per batch on each process, ``B``.
        drop_last: Leave out the rows that do not fill a whole global batch. Otherwise they come last, in batches of
            ``B`` and one of the rest.
        valid_label_columns: Names of columns that hold the label. A label counts when it is an integer, boolean or
            string, and not when it is a score or an embedding.
        generator: Ignored: epochs are drawn from a private generator made of ``seed`` and the epoch, so that resuming
            repeats them.
        seed: Seed of the epochs' batches.
        world_size: Number of processes that share a global batch, ``W``; None for the number running.
        guide_queries: ``(N, D)`` embeddings of the rows' queries by a guide, or the path of an ``.npy`` file of them. A
            path is better in training, because the Trainer stores its arguments with each checkpoint.
        guide_targets: ``(N, D)`` embeddings of the targets, likewise.
        margin: The guide's margin in cosine similarity, as ``margin`` of
            :class:`~unime_st.losses.HardNegativeInfoNCELoss`.
        hard_negatives_together: How many of each row's hardest rows by the guide, false ones left out, to draw into its
            global batch where they fit; 0 leaves batches to chance.
        cluster_size: Rows of a cluster, ``K``, for the batches of B3: rows that rank each other's targets high are put
            into clusters once, and each global batch is made of random whole clusters, so it must be a multiple of
            ``K``. See :attr:`clusters`. It needs the guide and METIS (``pip install "unime_st[b3]"``); None does
            without.
        range_min: How many of the guide's first ranks clusters pass over, as likely false negatives. Ranks count the
            distinct targets that are neither a row's own nor false by ``margin``.
        range_max: The rank at which they stop.
        homogeneous: Fill each global batch from one data set. The rows must have the stored column ``subset``, which
            ``load_mmeb_train(subset_column=True)`` adds and which must not reach the model: see
            :func:`~unime_st.columns.without_subset`. The guide then does not compare rows of different sets.
        max_rows_per_dataset: Largest number of rows of each data set in an epoch, different rows each time; this needs
            ``subset`` too.
        exact_neighbors: Compare every query with every target of the guide (True), or find candidates by an approximate
            index (False), which needs faiss (``pip install "unime_st[ann]"``) and misses a few: see :attr:`recall`.
            None compares everything up to 10,000 rows (of a set, with ``homogeneous``). Equal contents and labels are
            always kept apart exactly.
        plan_dir: Folder that keeps the result of the guide's comparison, so that a restarted run does not compare
            again. The result is found again by the embeddings' content and the settings. Only rank 0 needs to see it.

    Raises:
        TypeError: When the data set is not a ``datasets.Dataset``, or an argument that must be a number is not one.
        ImportError: When an approximate index is needed and faiss is missing.
        ValueError: When an argument is out of range, the guide's embeddings do not fit, the rows conflict so much that
            they do not fill a single global batch, or ``subset`` is needed and missing.

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
        cluster_size: int | None = None,
        range_min: int = 30,
        range_max: int = 130,
        homogeneous: bool = False,
        max_rows_per_dataset: int | None = None,
        exact_neighbors: bool | None = None,
        plan_dir: str | Path | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{type(self).__name__} needs a datasets.Dataset of known length, got {type(dataset)}.")
        require_number("batch_size", batch_size, least=1)
        require_number("seed", seed, least=0)
        require_number("world_size", world_size, optional=True)
        require_number("max_rows_per_dataset", max_rows_per_dataset, optional=True)
        check_margin(margin, optional=False)
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.dataset = dataset
        self.world_size = distributed.world_size() if world_size is None else world_size
        if self.world_size < 1:
            raise ValueError(f"`world_size={world_size}`, but at least one process is needed.")
        if max_rows_per_dataset is not None and max_rows_per_dataset < 1:
            raise ValueError(f"`max_rows_per_dataset={max_rows_per_dataset}` would leave no rows; None is no limit.")
        self.hard_negatives_together, self.cluster_size = hard_negatives_together, cluster_size
        self.range_min, self.range_max = range_min, range_max
        self._check_guide(guide_queries, guide_targets)
        self.margin = margin
        self.homogeneous, self.max_rows_per_dataset = homogeneous, max_rows_per_dataset
        self._subsets: np.ndarray | None = None
        self.subset_names: list[str] = []
        if homogeneous or max_rows_per_dataset is not None:
            self._subsets, self.subset_names = subset_numbers(dataset)
            _check_hidden(dataset)
        self._neighbors: Neighbors | None = None
        self._clusters: np.ndarray | None = None
        if guide_queries is not None:
            find = functools.partial(self._judge, guide_queries, guide_targets, exact_neighbors, plan_dir)
            self._neighbors, self._clusters = distributed.from_rank_zero(find)
        self._epoch_plan: tuple[int, Plan] | None = None

    @classmethod
    def configured(cls, **options: Any) -> Callable[..., FalseNegativeAwareBatchSampler]:
        """Bind options, for ``batch_sampler=`` of the training arguments.

        Args:
            options: Arguments of the constructor from ``world_size`` on.

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
        planner = self._planner
        return planner.num_full * self.world_size + -(-planner.num_tail // self.batch_size)

    @property
    def unplaced(self) -> np.ndarray:
        """Rows in no batch of the current epoch, ascending: they conflict, exceed the cap or are left over."""
        plan = self._plan()
        return np.setdiff1d(np.arange(len(self.dataset)), np.concatenate([plan.full.ravel(), plan.tail]))

    @property
    def recall(self) -> dict[str, float]:
        """Share of the guide's ``conflicts`` and ``hardest`` rows found, by a sample; empty when all were compared."""
        return {} if self._neighbors is None else self._neighbors.recall

    @functools.cached_property
    def conflicts(self) -> Conflicts:
        """The rows that may not meet, found on first use."""
        identities = row_identities(self.dataset, self.valid_label_columns)
        pairs = None if self._neighbors is None else self._neighbors.pairs
        return find_conflicts(identities, pairs, len(self.dataset))

    @property
    def clusters(self) -> np.ndarray | None:
        """The number of each row's cluster ``(N,)``, -1 for rows in none; None without ``cluster_size``.

        Two rows are joined when each has the other's target among its ranks from ``range_min`` to ``range_max``, and
        METIS parts this graph, of each data set by itself with ``homogeneous``; parts are then repaired to exactly
        ``K`` rows. Rows beyond a multiple of ``K`` are in none, and together take the place of a cluster in a batch. A
        row that is a false negative of another one in its batch leaves its cluster for another batch, and the log says
        how many clusters are whole.
        """
        return self._clusters

    def _check_guide(self, queries: Any, targets: Any) -> None:
        """Refuse options of the guide that do not fit each other."""
        require_number("hard_negatives_together", self.hard_negatives_together)
        require_number("cluster_size", self.cluster_size, least=2, optional=True)
        require_number("range_min", self.range_min, least=0)
        require_number("range_max", self.range_max, least=1)
        if (queries is None) != (targets is None):
            raise ValueError("A guide needs both `guide_queries` and `guide_targets`; only one was given.")
        if self.hard_negatives_together < 0 or (self.hard_negatives_together and queries is None):
            raise ValueError(
                f"`hard_negatives_together={self.hard_negatives_together}` must be 0, or a number above with "
                "`guide_queries` and `guide_targets` to tell what is hard."
            )
        if self.cluster_size is None:
            return
        given, size = f"`cluster_size={self.cluster_size}`", self.batch_size * self.world_size
        if queries is None:
            raise ValueError(f"{given} needs `guide_queries` and `guide_targets` to tell what is hard.")
        if self.hard_negatives_together:
            raise ValueError(f"Give either {given} or `hard_negatives_together={self.hard_negatives_together}`.")
        if size % self.cluster_size:
            raise ValueError(
                f"{given} must divide the global batch, {size} rows ({self.world_size} x {self.batch_size}), which is "
                "made of whole clusters."
            )
        if self.range_max <= self.range_min:
            raise ValueError(
                f"`range_min={self.range_min}` and `range_max={self.range_max}` leave no ranks. Raise `range_max`."
            )
        import_pymetis()

    def _judge(
        self, queries: Any, targets: Any, exact: bool | None, plan_dir: str | Path | None
    ) -> tuple[Neighbors, np.ndarray | None]:
        """What the guide says: the neighbours and, with ``cluster_size``, the clusters in place of the hardest rows."""
        guides = (("guide_queries", queries), ("guide_targets", targets))
        sides = [GuideEmbeddings(name, given, len(self.dataset)) for name, given in guides]
        find = find_neighbors if plan_dir is None else NeighborStore(Path(plan_dir)).load_or_find
        groups = self._subsets if self.homogeneous else None
        ranks = self.hard_negatives_together if self.cluster_size is None else self.range_max
        found = find(*sides, margin=self.margin, num_hardest=ranks, groups=groups, exact=exact)
        if self.cluster_size is None:
            return found, None
        self._neighbors = found
        ranked = found.hardest[:, self.range_min :]
        clusters = find_clusters(ranked, found.twins, self.conflicts, self.cluster_size, groups)
        return dataclasses.replace(found, hardest=found.hardest[:, :0]), clusters

    @functools.cached_property
    def _planner(self) -> Planner:
        """The planner, with a plan found once whose size every epoch keeps."""
        size, neighbors = self.batch_size * self.world_size, self._neighbors
        together = neighbors is not None and self.hard_negatives_together > 0
        planner = Planner(
            self.conflicts,
            size,
            self.drop_last,
            self.seed,
            subsets=self._subsets,
            homogeneous=self.homogeneous,
            max_rows=self.max_rows_per_dataset,
            hard_rows=HardRows(neighbors.hardest, neighbors.twins) if together and neighbors is not None else None,
            clusters=None if self._clusters is None else Clusters(self._clusters, self.cluster_size or 0),
        )
        report_plan(planner, f"{size} rows ({self.world_size} x {self.batch_size})", self.subset_names)
        return planner

    def _plan(self) -> Plan:
        if self._epoch_plan is None or self._epoch_plan[0] != self.epoch:
            self._epoch_plan = (self.epoch, self._planner.epoch(self.epoch))
        return self._epoch_plan[1]


def _check_hidden(dataset: Dataset) -> None:
    """Refuse rows that show the Trainer the column of names, which it would take for a negative."""
    if dataset.format["type"] != "custom" and SUBSET in dataset.format["columns"]:
        raise ValueError(
            f"The rows have {SUBSET!r} among their columns, so the Trainer would embed the data sets' names as "
            "explicit negatives. Hide it: `dataset.with_transform(unime_st.columns.without_subset)`, or load the "
            "rows with `load_mmeb_train(..., subset_column=True)`, whose transform leaves it out."
        )
