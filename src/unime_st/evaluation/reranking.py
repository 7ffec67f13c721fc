"""Reranking the first candidates of each query: what every evaluator does with a reranker.

A reranker's scores put the first ``k`` candidates of a query in a new order; those behind them stay where they are.
Candidates that it scores alike keep the encoder's order, so a reranker that tells nothing changes nothing.

Dimension letters: Q queries, k candidates reranked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from unime_st.data.judging.scorer import PairScorer, pair_scores
from unime_st.distributed import gather_objects, rank, world_size
from unime_st.embedding.broken import shown
from unime_st.embedding.cache import EmbeddingCache
from unime_st.embedding.distinct import open_section
from unime_st.embedding.sections import Section
from unime_st.identity.content import Content

_BATCHES_A_CHUNK = 32

Where = Callable[[int, int], str]
"""Says what the query of a row, and its candidate at a place, are to the user, for errors."""


class Reranking:
    """Scores pairs of a query and a candidate, each distinct pair once, over all calls; counts them, and the time.

    Args:
        reranker: scores the pairs; a ``CrossEncoder`` of sentence-transformers, or what has its ``predict``.
        batch_size: pairs a forward pass.
        cache: where scores are looked up and, every few batches, kept, as embeddings are; None keeps them in memory.
        settings: what else decides the scores, for the cache.
        prepare: makes of an item what the reranker is shown, late, such as an opened and resized image.
        show_progress_bar: whether to show progress.

    Raises:
        TypeError: the reranker has no ``predict``.
    """

    def __init__(
        self,
        reranker: PairScorer,
        *,
        batch_size: int = 32,
        cache: EmbeddingCache | str | Path | None = None,
        settings: dict[str, Any] | None = None,
        prepare: Callable[[Any], Any] | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        check_reranker(reranker)
        self.reranker, self.batch_size, self.prepare = reranker, batch_size, prepare
        self.show_progress_bar = show_progress_bar
        self.pairs, self.seconds = 0, 0.0
        modalities = getattr(reranker, "modalities", None)
        self._texts_alone = modalities is not None and "image" not in modalities
        settings = {**(settings or {}), "reranker": str(getattr(reranker, "activation_fn", ""))}
        # what is no module has no weights to be known by, so its scores are not kept on disk
        kept = cache if isinstance(reranker, nn.Module) else None
        self._section: Section = open_section(reranker, kept, settings=settings)
        self._known: set[str] = set()

    def scores(self, items: Sequence[Any], queries: np.ndarray, top: np.ndarray, where: Where) -> np.ndarray:
        """Score the candidates ``top`` (Q, k) of ``queries`` (Q,), numbers of ``items``; every process calls this.

        A candidate of -1 is none, and has the score -inf.

        Returns:
            (Q, k) float32.

        Raises:
            ValueError: a score is NaN or infinite, there is not one for each pair, or the reranker takes no images.
        """
        began = time.perf_counter()
        contents = {int(item): Content(items[item]) for item in np.unique(np.concatenate([queries, top.ravel()]))
                    if item >= 0}  # fmt: skip
        place_of: dict[str, tuple[int, int]] = {}  # of the first pair that is equal
        keys = np.full(top.shape, "", dtype=object)
        for row, place in zip(*np.nonzero(top >= 0), strict=True):
            query, candidate = contents[int(queries[row])], contents[int(top[row, place])]
            keys[row, place] = query.fingerprint + candidate.fingerprint
            place_of.setdefault(keys[row, place], (int(row), int(place)))
        found = {key: row[0] for key, row in zip(place_of, self._section.get(place_of), strict=True) if row is not None}
        missing = {key for key in place_of if key not in found}
        if world_size() > 1:  # what one process lacks, all take as missing
            missing = set().union(*gather_objects(missing))

        def pair_of(key: str) -> tuple[Content, Content]:
            row, place = place_of[key]
            return contents[int(queries[row])], contents[int(top[row, place])]

        def told(key: str) -> str:
            return where(*place_of[key])

        found |= self._fill([key for key in place_of if key in missing], pair_of, told)
        self._known.update(place_of)
        self.pairs = len(self._known)
        self.seconds += time.perf_counter() - began
        return np.array([[found.get(key, -np.inf) for key in row] for row in keys], dtype=np.float32).reshape(top.shape)

    def _fill(
        self, missing: list[str], pair_of: Callable[[str], tuple[Content, Content]], told: Callable[[str], str]
    ) -> dict[str, float]:
        """Score what is missing; several processes take chunks in turn and exchange the scores."""
        step = self.batch_size * _BATCHES_A_CHUNK
        chunks = [missing[start : start + step] for start in range(0, len(missing), step)]
        fresh: dict[str, float] = {}
        failure = ""
        hidden = not self.show_progress_bar or not missing
        with tqdm(total=len(missing), desc="Reranking", unit="pair", disable=hidden) as bar:
            for chunk in chunks[rank() :: world_size()]:
                try:
                    scores = self._predicted(chunk, pair_of, told)
                except ValueError as error:
                    if world_size() == 1:
                        raise
                    failure = str(error)
                    break
                self._section.add(chunk, scores[:, None])
                fresh.update(zip(chunk, scores.tolist(), strict=True))
                bar.update(len(chunk) * world_size())
        shared = gather_objects((fresh, failure))
        if failures := [why for _, why in shared if why]:
            raise ValueError(failures[0])
        return {key: score for part, _ in shared for key, score in part.items()}

    def _predicted(
        self, keys: list[str], pair_of: Callable[[str], tuple[Content, Content]], told: Callable[[str], str]
    ) -> np.ndarray:
        shown_as: dict[str, Any] = {}  # each distinct input is prepared once a chunk
        pairs = []
        for key in keys:
            halves = pair_of(key)
            for half in halves:
                if half.fingerprint not in shown_as:
                    shown_as[half.fingerprint] = self._shown(half, told(key))
            pairs.append(tuple(shown_as[half.fingerprint] for half in halves))
        return pair_scores(self.reranker, pairs, self.batch_size, lambda number: told(keys[number]))

    def _shown(self, content: Content, where: str) -> Any:
        """What the reranker is given; one of texts alone takes bare strings."""
        if self._texts_alone:
            if content.media:
                raise ValueError(f"{where}: the reranker takes texts alone, but this is {shown(content.item)}.")
            return content.text
        return content.item if self.prepare is None else self.prepare(content.item)


def check_reranker(reranker: Any) -> None:
    """Refuse what cannot score pairs."""
    if not isinstance(reranker, PairScorer):
        raise TypeError(
            f"`reranker` is a {type(reranker).__name__}, but it needs a method `predict`, as a CrossEncoder has."
        )


def reranker_name(reranker: Any) -> str:
    """What a reranker is called in settings and reports: the checkpoint it was loaded from, or its class."""
    card: Any = getattr(reranker, "model_card_data", None)
    return getattr(card, "model_id", None) or getattr(card, "base_model", None) or type(reranker).__name__
