"""Approximate search over a corpus of random vectors: time and memory of building, time of a query, recall; and exact.

    python benchmarks/search.py                            # both kinds, 1,000,000 rows of 1,024 dimensions
    python benchmarks/search.py clustered --rows 100000

- ``uniform``: each row is a direction drawn uniformly from the sphere. Nothing is near anything: of a million rows the
  nearest has a cosine of about 0.15, and its rivals are within 0.01. This is the hardest case; embeddings are not so.
- ``clustered``: 5,000 centres drawn uniformly; each row is a centre plus an independent direction of the same length,
  so that rows of one centre have a cosine of about 0.5.

Queries are drawn as the rows are, and are none of them. The corpus is written by ``encode_corpus`` (npy, float16) with
a stand-in for the model; then ``build_index``, the queries and exact search each run in a process of its own, with two
threads. Peak memory is resident memory, pages of memory-mapped files included. Times are of single queries, wall clock,
beside CPU time, for other work may run on the machine. Writes `benchmarks/results/search.json`.
"""

from __future__ import annotations

from basics import RESULTS, in_process, keep, kept, machine, parser, peak_mb

# isort: split
import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CENTRES = 5000
WINDOW = 8192
THREADS = 2
QUERIES = 200


def directions(generator: np.random.Generator, count: int, dim: int) -> np.ndarray:
    found = generator.standard_normal((count, dim), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


class Vectors:
    """Stands for a model: an input is a row's number, and a window's rows are drawn at once."""

    def __init__(self, kind: str, dim: int) -> None:
        self.dim = dim
        self.centres = directions(np.random.default_rng(1), CENTRES, dim) if kind == "clustered" else None

    def draw(self, count: int, *seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        found = directions(generator, count, self.dim)
        if self.centres is not None:
            found += self.centres[generator.integers(0, CENTRES, count)]
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def encode(self, items: list[str], **_: Any) -> np.ndarray:
        return self.draw(len(items), 2, int(items[0]))


def write_corpus(folder: str, kind: str, rows: str, dim: str) -> dict[str, Any]:
    """Ids are ``<last two digits>/<row>``, so that a prefix chooses a hundredth or a tenth of the rows."""
    from unime_st.data import encode_corpus

    numbers: Iterator[tuple[str, str]] = ((f"{row % 100:02d}/{row}", str(row)) for row in range(int(rows)))
    encode_corpus(
        Vectors(kind, int(dim)), numbers, folder, output_format="npy", dtype="float16", window_size=WINDOW,
        with_ids=True, model_name=f"{kind} vectors", cache_bytes=0, show_progress_bar=False,
    )  # fmt: skip
    return {}


def measure_build(folder: str) -> dict[str, Any]:
    from unime_st.data import load_corpus
    from unime_st.search import build_index

    wall, cpu = time.perf_counter(), time.process_time()
    index = build_index(load_corpus(folder), show_progress_bar=False)
    spent = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    about = {name: index.about[name] for name in ("factory", "nprobe", "k_factor", "recall@10")}
    return {**spent, "peak_mb": peak_mb(), "file_mb": round(index.path.stat().st_size / 1e6), **about}


def measure_queries(folder: str, kind: str) -> dict[str, Any]:
    """One query at a time through the index; recall against exact search over the corpus."""
    from unime_st.data import load_corpus
    from unime_st.search import CorpusSearch, exact_search

    corpus = load_corpus(folder)
    queries = Vectors(kind, corpus.shape[1]).draw(QUERIES, 3)
    truth = exact_search(corpus, queries)
    opened = time.perf_counter()
    search = CorpusSearch(corpus, method="index")
    open_seconds = time.perf_counter() - opened
    found: list[np.ndarray] = []
    told = timed(lambda query: found.append(search.search(query).rows[0]), queries)
    hits = [len(set(ours) & set(exact)) for ours, exact in zip(found[-QUERIES:], truth.rows.tolist(), strict=True)]
    recall = sum(hits) / truth.rows.size
    filtered = {}
    for share, prefix in (("1 %", "07/"), ("10 %", "0")):
        theirs = timed(lambda query, prefix=prefix: search.search(query, id_prefix=prefix), queries[:20])
        filtered[share] = theirs
    nearest = round(float(truth.scores[:, 0].mean()), 3)
    return {"queries": QUERIES, "recall@10": round(recall, 4), **told, "with_id_prefix": filtered,
            "open_seconds": round(open_seconds, 2), "nearest_cosine": nearest}  # fmt: skip


def measure_exact(folder: str, kind: str) -> dict[str, Any]:
    """One query at a time against all rows: from disk as ``exact_search`` does, and from float32 in memory."""
    from unime_st.data import load_corpus
    from unime_st.search import exact_search

    corpus = load_corpus(folder)
    queries = Vectors(kind, corpus.shape[1]).draw(20, 3)
    told: dict[str, Any] = {
        "from_disk": {**timed(lambda query: exact_search(corpus, query), queries[:5]), "peak_mb": peak_mb()}
    }
    rows = np.asarray(corpus).astype(np.float32)
    told["in_memory"] = {**timed(lambda query: np.argpartition(-(rows @ query), 10), queries), "peak_mb": peak_mb()}
    return told


def timed(ask: Callable[[np.ndarray], Any], queries: np.ndarray) -> dict[str, Any]:
    """Milliseconds of a query, after one round that is not counted."""
    walls: list[float] = []
    for _ in range(2):
        walls, cpu = [], time.process_time()
        for query in queries:
            started = time.perf_counter()
            ask(query)
            walls.append(1000 * (time.perf_counter() - started))
    cpu_ms = 1000 * (time.process_time() - cpu) / len(queries)
    p50, p99 = np.quantile(walls, [0.5, 0.99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "cpu_ms": round(cpu_ms, 2),
            "load_average": round(os.getloadavg()[0], 1)}  # fmt: skip


def measured(function: str, *arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = in_process(__file__, "--measure", function, *arguments)
    print(f"{function}: {result}", flush=True)
    return result


def run(kind: str, rows: int, dim: int, scratch: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        measured("write_corpus", folder, kind, str(rows), str(dim))
        return {
            "rows": rows,
            "dimensions": dim,
            "build": measured("measure_build", folder),
            "index": measured("measure_queries", folder, kind),
            "exact": measured("measure_exact", folder, kind),
        }


def main() -> None:
    kinds = ("clustered", "uniform")
    options = parser(__doc__, output=RESULTS / "search.json")
    options.add_argument("kinds", nargs="*", metavar="kind", help=f"of {', '.join(kinds)} (default: both)")
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--dim", type=int, default=1024)
    options.add_argument("--scratch", type=Path, help="folder for corpus and index, 7 GB (default: the system's)")
    options.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.measure:
        print(json.dumps(globals()[given.measure[0]](*given.measure[1:])))
        return
    if unknown := set(given.kinds) - set(kinds):
        options.error(f"There is no kind {sorted(unknown)}; the kinds are {', '.join(kinds)}.")
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    for kind in given.kinds or kinds:
        told = {"command": f"python benchmarks/search.py {kind}", "machine": machine(threads=THREADS)}
        keep(given.output, kept(given.output) | {kind: told | run(kind, given.rows, given.dim, given.scratch)})


if __name__ == "__main__":
    main()
