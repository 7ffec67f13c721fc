"""Corpora with planted neighbours: groups of rows about one direction."""

import numpy as np

from unime_st.data import encode_corpus

GROUPS, DIM = 40, 16


def planted(rows, seed=0):
    """Rows `(rows, DIM)` about `GROUPS` directions, row n about direction n % GROUPS; of lengths other than 1."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((GROUPS, DIM))
    points = centres[np.arange(rows) % GROUPS] + 0.2 * rng.standard_normal((rows, DIM))
    return (points * rng.uniform(0.5, 2, (rows, 1))).astype(np.float32)


class Table:
    """Stands for a model: an input is a row's number."""

    def __init__(self, rows):
        self.rows = rows

    def encode(self, items, **options):
        return self.rows[[int(item) for item in items]]


def write(folder, rows, *, window_size=100, ids=lambda row: f"{'ab'[row % 2]}/{row}", **options):
    inputs = [(ids(row), str(row)) for row in range(len(rows))] if ids else [str(row) for row in range(len(rows))]
    return encode_corpus(
        Table(rows),
        inputs,
        folder,
        model_name="table",
        window_size=window_size,
        with_ids=ids is not None,
        show_progress_bar=False,
        **options,
    )


def brute_force(rows, queries, k, among=None):
    """Row numbers and cosines of the k nearest, in float64, one query at a time."""
    rows = rows.astype(np.float64)
    numbers = range(len(rows)) if among is None else among
    found = []
    for query in np.asarray(queries, dtype=np.float64):
        cosines = {n: float(rows[n] @ query / np.linalg.norm(rows[n]) / np.linalg.norm(query)) for n in numbers}
        found.append(sorted(cosines.items(), key=lambda pair: (-pair[1], pair[0]))[:k])
    return np.array([[n for n, _ in one] for one in found]), np.array([[score for _, score in one] for one in found])
