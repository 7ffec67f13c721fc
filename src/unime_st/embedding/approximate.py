"""An approximate index of nearest targets, made with faiss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

PROBES, MANY_PROBES = 8, 64
"""How many cells are looked at for a query, and for a query with many near targets."""

_SEED = 0


class NearestTargets:
    """Finds most of the targets nearest to a query without comparing the query with all of them.

    An inverted file, with about the square root of the number of targets as its number of cells, holds 4-bit product
    codes; the best candidates by those codes are then scored exactly. ``without`` is what to do where faiss is missing.
    """

    def __init__(self, targets: torch.Tensor, without: str) -> None:  # (T, D) float32, of length 1
        faiss = import_faiss(without)
        array = targets.numpy()
        count, dim = array.shape
        cells = max(1, int(1.25 * math.sqrt(count)))
        quantizers = next((n for n in (64, 32, 16, 8, 4, 2) if dim % n == 0 and dim // n >= 2), 1)
        self.index: Any = faiss.index_factory(dim, f"IVF{cells},PQ{quantizers}x4fs", faiss.METRIC_INNER_PRODUCT)
        cells_of = faiss.downcast_index(self.index)
        for clustering, points in ((cells_of.cp, 40), (cells_of.pq.cp, 256)):
            clustering.niter, clustering.seed = 8, _SEED
            clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, points
        sample = np.random.default_rng(_SEED).permutation(count)[: 50 * max(cells, 100)]
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # many small steps: threads wait for each other longer than they work
        self.index.train(array[np.sort(sample)])
        faiss.omp_set_num_threads(threads)
        self.index.add(array)
        self.targets = array
        lists = cells_of.invlists
        by_cell = [faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell)) for cell in range(cells)]
        self.places = np.empty(count, dtype=np.int64)  # (T,) rank of each target by cell: near ones are close
        self.places[np.concatenate(by_cell)] = np.arange(count)

    def search(self, queries: torch.Tensor, number: int, probes: int = PROBES) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact scores and target numbers ``(n, C)`` of queries ``(n, D)``, about in order; -inf and -1 for none."""
        faiss, asked = import_faiss(), np.ascontiguousarray(queries.numpy())
        number = min(number, len(self.targets))
        probes = min(probes, self.index.nlist)
        _, found = self.index.search(asked, number, params=faiss.SearchParametersIVF(nprobe=probes))
        scores = np.full(found.shape, -np.inf, dtype=np.float32)
        pointers = [faiss.swig_ptr(array) for array in (scores, asked, self.targets, found)]
        faiss.fvec_inner_products_by_idx(*pointers, asked.shape[1], len(asked), number)
        scores[found < 0] = -np.inf
        return torch.from_numpy(scores), torch.from_numpy(found)


def import_faiss(without: str = "") -> Any:
    """Import faiss, or raise an error with the advice ``without``."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(without) from error
    return faiss
