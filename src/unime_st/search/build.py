"""Builds a corpus's index, in pieces that survive a kill."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unime_st.arguments import require_number
from unime_st.data import EncodedCorpus
from unime_st.data.corpus.stream import progress_bar
from unime_st.files import one_at_a_time, remove_leftovers, whole_file, write_atomically
from unime_st.search.exact import unit_rows
from unime_st.search.ids import write_ids
from unime_st.search.index import (
    ABOUT,
    FOLDER,
    FORMAT_VERSION,
    IDS,
    INDEX,
    DamagedIndexError,
    SearchIndex,
    StaleIndexError,
    about_text,
    faiss_module,
    file_record,
    open_index,
)
from unime_st.search.recall import RecallSample, tune

logger = logging.getLogger(__name__)

PRECISIONS = {"float16": "SQfp16", "int8": "SQ8"}
"""How the rows' copies in an index are kept, and faiss's name for it."""

LEAST_ROWS = 16  # as many as a 4-bit code has values
_BUILDING = "building"
_PLAN, _TRAINED = "plan.json", "trained.faiss"
_PIECE_BYTES = 1 << 28
_SAMPLED_PER_CELL = 64
_SEED = 0


def build_index(
    corpus: EncodedCorpus,
    *,
    precision: Literal["float16", "int8"] | None = None,
    queries: Any = None,
    target_recall: float = 0.97,
    rebuild: bool = False,
    show_progress_bar: bool | None = None,
) -> SearchIndex:
    """Build a corpus's index for approximate search, or open the one that is there.

    An inverted file, with about the square root of the number of rows as its number of cells, holds 4-bit codes of
    pairs of dimensions, in memory; the best rows by these are scored by their copies in half precision or 8 bits,
    which are memory-mapped. How many cells are looked at and how many rows are scored is the least that reaches
    ``target_recall`` on one half of a sample of queries; the other half gives the recall that is told. The sample is
    searched exactly for this.

    A build that was killed goes on when called again. What is built is in ``<corpus>/_search``: ``index.faiss``, which
    ``faiss.read_index`` reads too (its ids are row numbers of the corpus, its scores cosines of unit vectors), the
    ids, and ``index.json``.

    Args:
        corpus: See :func:`~unime_st.data.load_corpus`.
        precision: Of the rows' copies: 2 bytes a dimension (``"float16"``) or 1 (``"int8"``); None keeps that of an
            index that is there, and takes float16 for a new one.
        queries: Embeddings ``(Q, D)`` of queries as they will be asked, to tune and measure recall on; given for an
            index that is there, it is tuned anew. None takes 256 rows of the corpus, each without itself. Queries of
            another kind than the rows, such as texts for images, lie elsewhere and find less: give some.
        target_recall: The recall@10 to reach, if looking at everything does.
        rebuild: Build anew what is there.
        show_progress_bar: Show a bar of rows; None shows it when the log level is INFO or below.

    Returns:
        The index.

    Raises:
        ImportError: Without faiss (``pip install "unime_st[ann]"``).
        TypeError: When ``target_recall`` is no number.
        ValueError: For another precision, a recall outside (0, 1], queries of another dimension, a corpus of fewer than
            16 rows, or a damaged part.

    Example:
        >>> import tempfile
        >>> from unime_st.data import encode_corpus
        >>> class Points:  # stands for a model
        ...     def encode(self, items, **options):
        ...         return np.array([[np.cos(float(item)), np.sin(float(item))] for item in items])
        >>> corpus = encode_corpus(Points(), [str(row / 10) for row in range(60)], tempfile.mkdtemp(), model_name="p")
        >>> index = build_index(corpus, show_progress_bar=False)
        >>> index.search(unit_rows(np.array([[1.0, 0.0]])), top_k=1).rows.tolist()
        [[0]]
    """
    faiss_module()
    require_number("target_recall", target_recall, above=0, whole=False)
    if target_recall > 1:
        raise ValueError(f"`target_recall={target_recall}`, but recall is at most 1.")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"`precision={precision!r}`, but it must be one of {', '.join(PRECISIONS)}.")
    if len(corpus) < LEAST_ROWS:
        raise ValueError(
            f"{corpus.folder} has {len(corpus)} rows, and an index needs {LEAST_ROWS}. Search it exactly, without one."
        )
    sample = None if queries is None else RecallSample(corpus, queries)
    folder = corpus.folder / FOLDER
    with one_at_a_time(folder):
        remove_leftovers(folder)
        current = None if rebuild else _current(corpus, precision)
        if current is not None and queries is None:
            return current
        started = time.perf_counter()
        build = _Build(corpus, precision or (current.about["precision"] if current else "float16"))
        whole = build.whole(show_progress_bar) if current is None else faiss_module().read_index(str(current.path))
        found = tune(whole, sample or RecallSample(corpus, None), target_recall)
        build.write(whole, {**found, "seconds": round(time.perf_counter() - started, 1)})
    index = open_index(corpus)
    logger.info("%r", index)
    return index


def _current(corpus: EncodedCorpus, precision: str | None) -> SearchIndex | None:
    """The index that is there, if it can be used."""
    try:
        index = open_index(corpus, verify=True)
    except FileNotFoundError:
        return None
    except (StaleIndexError, DamagedIndexError) as error:
        logger.warning("%s It is built anew now.", str(error).partition(" Build ")[0])
        return None
    if precision not in (None, index.about["precision"]):
        logger.info("The index is of precision %s; it is built anew.", index.about["precision"])
        return None
    return index


class _Build:
    """The steps of a build; what earlier, killed runs have finished is found in a folder of its own."""

    def __init__(self, corpus: EncodedCorpus, precision: str) -> None:
        rows, dimension = corpus.shape
        self.corpus, self.precision = corpus, precision
        self.folder = corpus.folder / FOLDER
        self.owners: tuple[Any, ...] = ()
        self.cells = max(1, math.isqrt(rows))
        codes = dimension // 2 if dimension % 2 == 0 else dimension
        self.factory = f"IVF{self.cells},PQ{codes}x4fs,Refine({PRECISIONS[precision]})"
        self.made_of = {
            "format_version": FORMAT_VERSION,
            "rows": rows,
            "dimension": dimension,
            "window_size": corpus.manifest["window_size"],
            "precision": precision,
            "cells": self.cells,
            "factory": self.factory,
            "piece_rows": max(1024, _PIECE_BYTES // (4 * dimension)),
            "faiss": faiss_module().__version__,
            "parts": corpus.part_checksums(),
        }

    def whole(self, shown: bool | None) -> Any:
        """All pieces in one index."""
        faiss = faiss_module()
        building = self._begun()
        trained = building / _TRAINED
        if not trained.exists():
            _write(self._train(), trained)
        size = self.made_of["piece_rows"]
        with progress_bar(len(self.corpus), shown, "Indexing") as bar:
            for start, path in self._pieces(building):
                rows = range(start, min(start + size, len(self.corpus)))
                if not path.exists():
                    self._write_piece(trained, rows, path)
                bar.update(len(rows))
        plain = faiss.read_index(str(trained))
        cells, copies = faiss.downcast_index(plain.base_index), faiss.downcast_index(plain.refine_index)
        for start, path in self._pieces(building):
            piece = faiss.read_index(str(path))
            cells.merge_from(faiss.downcast_index(piece.base_index), start)
            copies.merge_from(faiss.downcast_index(piece.refine_index), 0)
        packed = faiss.IndexIVFPQFastScan(cells)
        self.owners = (plain, packed)  # faiss frees the parts of an index with the object that owns them
        return faiss.IndexRefine(packed, copies)

    def write(self, whole: Any, measured: dict[str, Any]) -> None:
        """Put the index in its place, what is known of it last, and remove the pieces."""
        faiss = faiss_module()
        path, copies = self.folder / INDEX, faiss.downcast_index(whole.refine_index)
        _write(whole, path)
        files = {INDEX: file_record(path, path.stat().st_size - copies.ntotal * copies.code_size)}
        if self.corpus.manifest["with_ids"]:
            write_ids(self.folder / IDS, self.corpus)
            files[IDS] = file_record(self.folder / IDS)
        write_atomically(self.folder / ABOUT, about_text({**self.made_of, **measured, "files": files}))
        shutil.rmtree(self.folder / _BUILDING, ignore_errors=True)

    def _begun(self) -> Path:
        """The folder of the pieces, emptied if they are of another corpus or setting."""
        building = self.folder / _BUILDING
        plan = building / _PLAN
        try:
            same = json.loads(plan.read_text(encoding="utf-8")) == self.made_of
        except (FileNotFoundError, ValueError):
            same = False
        if not same:
            shutil.rmtree(building, ignore_errors=True)
            write_atomically(plan, json.dumps(self.made_of))
        remove_leftovers(building)
        return building

    def _pieces(self, building: Path) -> Iterator[tuple[int, Path]]:
        for number, start in enumerate(range(0, len(self.corpus), self.made_of["piece_rows"])):
            yield start, building / f"piece-{number:05d}.faiss"

    def _train(self) -> Any:
        """An index without rows, its cells and codes fitted to a sample of the corpus."""
        faiss = faiss_module()
        # Pieces hold plain codes: merging those that are packed for fast scans corrupts memory (faiss 1.15).
        plain = self.factory.replace("x4fs", "x4")
        index = faiss.index_factory(self.corpus.shape[1], plain, faiss.METRIC_INNER_PRODUCT)
        cells = faiss.downcast_index(index.base_index)
        for clustering, most in ((cells.cp, _SAMPLED_PER_CELL), (cells.pq.cp, 256)):
            clustering.niter, clustering.seed = 8, _SEED
            clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, most
        count = min(len(self.corpus), max(_SAMPLED_PER_CELL * self.cells, 4096))
        logger.info("Training the index's %d cells on %d of %d rows", self.cells, count, len(self.corpus))
        chosen = np.random.default_rng(_SEED).choice(len(self.corpus), count, replace=False)
        rows = unit_rows(self.corpus.rows(np.sort(chosen)))
        cells.train_q1(count, faiss.swig_ptr(rows), False, cells.metric_type)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # many small steps: threads wait for each other longer than they work
        index.train(rows)
        faiss.omp_set_num_threads(threads)
        return index

    def _write_piece(self, trained: Path, rows: range, path: Path) -> None:
        piece = faiss_module().read_index(str(trained))
        piece.add(unit_rows(self.corpus.rows(np.arange(rows.start, rows.stop))))
        _write(piece, path)


def _write(index: Any, path: Path) -> None:
    with whole_file(path) as partial:
        faiss_module().write_index(index, str(partial))
