"""Says what a plan leaves out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from unime_st.samplers.planning.plan import Planner

logger = logging.getLogger(__name__)


def report_plan(planner: Planner, batch: str, subset_names: Sequence[str]) -> None:
    """Refuse a plan without a full batch, and log which rows and data sets are left out, and how whole clusters are.

    ``batch`` says how large a global batch is, ``subset_names`` name the planner's pools if it is homogeneous.
    """
    rows, homogeneous = planner.num_drawn, planner.homogeneous
    if planner.num_full == 0 and rows >= planner.size:
        raise ValueError(
            f"Not one global batch of {batch} {'from one data set and ' if homogeneous else ''}without false negatives "
            f"can be made of {rows} rows. Lower the batch size, or see whether the target, query or label column holds "
            "few distinct values."
        )
    conflicting = planner.conflicting()
    if conflicting > 0:
        logger.warning(
            "%d of %d rows (%.1f %%) are left out of each epoch, others every time: they are false negatives of "
            "too many others to fill global batches of %d rows. A smaller batch size places more of them.",
            conflicting,
            rows,
            100 * conflicting / rows,
            planner.size,
        )
    if planner.clusters is not None:
        logger.info(
            "%.1f %% of an epoch's rows are in a batch with their whole cluster; the clusters of the others are broken "
            "up by false negatives, were one too many for whole batches, or gave way to rows in no cluster.",
            100 * planner.whole_clusters(),
        )
    if homogeneous:
        _report_subsets(planner, subset_names)


def _report_subsets(planner: Planner, names: Sequence[str]) -> None:
    batches = dict(zip(names, (len(plan.full) for plan in planner.base), strict=True))
    logger.info("Global batches of %d rows an epoch, by data set: %s.", planner.size, batches)
    if planner.clusters is not None:
        numbers = planner.clusters.numbers
        chance = [name for name, (rows,) in zip(names, planner.pools, strict=True) if (numbers[rows] < 0).all()]
        if chance:
            logger.warning(
                "The data sets %s have no clusters, so their rows meet by chance: they have fewer rows than a cluster, "
                "or so few targets that no two rows have each other's among the ranks from `range_min`.",
                chance,
            )
    never = [name for name, count in batches.items() if count == 0]
    if never:
        logger.warning(
            "The data sets %s do not fill one global batch of %d rows each, so are never drawn (but for a last "
            "batch). Lower the batch size, or leave `homogeneous` off.",
            never,
            planner.size,
        )
