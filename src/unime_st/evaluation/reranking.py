"""Reranking the first candidates of each query: what every evaluator does with a reranker.

A reranker's scores put the first ``k`` candidates of a query in a new order; those behind them stay where they are.
Candidates that it scores alike keep the encoder's order, so a reranker that tells nothing changes nothing.

What is asked at once is one candidate of a query, or by a listwise reranker all of them, in the encoder's order.

Dimension letters: Q queries, k candidates reranked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from unime_st.data.judging.scorer import ListScorer, PairScorer, list_scores, pair_scores
from unime_st.distributed import gather_objects, rank, world_size
from unime_st.embedding.broken import shown
from unime_st.embedding.cache import EmbeddingCache
from unime_st.embedding.distinct import open_section
from unime_st.embedding.sections import Section
from unime_st.files import checksum
from unime_st.identity.content import Content

_BATCHES_A_CHUNK = 32

Where = Callable[[int, int], str]
"""Says what the query of a row, and its candidate at a place, are to the user, for errors."""


@dataclass(frozen=True)
class Question:
    """What a reranker is asked at once: a row's query against its candidates at some places."""

    row: int
    places: tuple[int, ...]
    names: tuple[str, ...]  # under which the score of each candidate is kept


class Reranking:
    """Scores candidates of a query, each distinct pair or list once, over all calls; counts them, and the time.

    Args:
        reranker: a ``CrossEncoder`` of sentence-transformers or what has its ``predict``, or a ``ListwiseReranker``.
        batch_size: pairs a forward pass, or candidates of lists.
        cache: where scores are looked up and, every few batches, kept, as embeddings are; None keeps them in memory.
        settings: what else decides the scores, for the cache.
        prepare: makes of an item what the reranker is shown, late, such as an opened and resized image.
        show_progress_bar: whether to show progress.

    Raises:
        TypeError: the reranker has no ``predict``.
    """

    def __init__(
        self,
        reranker: PairScorer | ListScorer,
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
        model = scoring_model(reranker)
        modalities = getattr(model, "modalities", None)
        self._texts_alone = modalities is not None and "image" not in modalities
        settings = {**(settings or {}), "reranker": str(getattr(model, "activation_fn", ""))}
        if isinstance(reranker, ListScorer):
            settings["lists"] = "\n".join(str(getattr(reranker, name, "")) for name in ("template", "prompt"))
        # what is no module has no weights to be known by, so its scores are not kept on disk
        kept = cache if isinstance(model, nn.Module) else None
        self._section: Section = open_section(model, kept, settings=settings)
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
        asked: dict[str, Question] = {}  # the first of those that are equal
        names = np.full(top.shape, "", dtype=object)
        for row in range(len(top)):
            for question in self._questions(row, [contents[int(queries[row])].fingerprint], top[row], contents):
                names[row, list(question.places)] = question.names
                asked.setdefault(question.names[0], question)
        every = list(dict.fromkeys(name for question in asked.values() for name in question.names))
        found = {name: row[0] for name, row in zip(every, self._section.get(every), strict=True) if row is not None}
        missing = {key for key, question in asked.items() if not all(name in found for name in question.names)}
        if world_size() > 1:  # what one process lacks, all take as missing
            missing = set().union(*gather_objects(missing))

        def contents_of(question: Question) -> tuple[Content, list[Content]]:
            own = [contents[int(top[question.row, place])] for place in question.places]
            return contents[int(queries[question.row])], own

        found |= self._fill([own for key, own in asked.items() if key in missing], contents_of, where)
        self._known.update(every)
        self.pairs = len(self._known)
        self.seconds += time.perf_counter() - began
        scores = np.array([[found.get(name, -np.inf) for name in row] for row in names], np.float32).reshape(top.shape)
        return first_alone(scores) if getattr(self.reranker, "replaces", None) == "first" else scores

    def _questions(
        self, row: int, said: list[str], top: np.ndarray, contents: dict[int, Content]
    ) -> Iterator[Question]:
        """What is asked of a row with these candidates, -1 for none, whose query has the fingerprint ``said``."""
        places = np.flatnonzero(top >= 0).tolist()
        own = {place: contents[int(top[place])].fingerprint for place in places}
        if not isinstance(self.reranker, ListScorer):
            for place in places:
                yield Question(row, (place,), (said[0] + own[place],))
        elif places:
            names = tuple(checksum(*said, *own.values(), str(number)) for number in range(len(places)))
            yield Question(row, tuple(places), names)

    def _fill(
        self, missing: list[Question], contents_of: Callable[[Question], tuple[Content, list[Content]]], where: Where
    ) -> dict[str, float]:
        """Score what is missing; several processes take chunks in turn and exchange the scores."""
        size = max((len(question.names) for question in missing), default=1)
        step = max(1, self.batch_size * _BATCHES_A_CHUNK // size)
        chunks = [missing[start : start + step] for start in range(0, len(missing), step)]
        fresh: dict[str, float] = {}
        failure = ""
        hidden = not self.show_progress_bar or not missing
        total = sum(len(question.names) for question in missing)
        with tqdm(total=total, desc="Reranking", unit="pair", disable=hidden) as bar:
            for chunk in chunks[rank() :: world_size()]:
                names = [name for question in chunk for name in question.names]
                try:
                    scores = self._predicted(chunk, contents_of, where)
                except ValueError as error:
                    if world_size() == 1:
                        raise
                    failure = str(error)
                    break
                self._section.add(names, scores[:, None])
                fresh.update(zip(names, scores.tolist(), strict=True))
                bar.update(len(names) * world_size())
        shared = gather_objects((fresh, failure))
        if failures := [why for _, why in shared if why]:
            raise ValueError(failures[0])
        return {name: score for part, _ in shared for name, score in part.items()}

    def _predicted(
        self, chunk: list[Question], contents_of: Callable[[Question], tuple[Content, list[Content]]], where: Where
    ) -> np.ndarray:
        shown_as: dict[str, Any] = {}  # each distinct input is prepared once a chunk
        lists = []
        for question in chunk:
            query, candidates = contents_of(question)
            for half, place in zip((query, *candidates), (question.places[0], *question.places), strict=True):
                if half.fingerprint not in shown_as:
                    shown_as[half.fingerprint] = self._shown(half, where(question.row, place))
            own = [shown_as[half.fingerprint] for half in candidates]
            lists.append((shown_as[query.fingerprint], own))

        def told(number: int) -> str:
            return where(chunk[number].row, chunk[number].places[0])

        if isinstance(self.reranker, ListScorer):
            return np.concatenate(list_scores(self.reranker, lists, self.batch_size, told))
        pairs = [(query, candidate) for query, (candidate,) in lists]
        return pair_scores(self.reranker, pairs, self.batch_size, told)

    def _shown(self, content: Content, where: str) -> Any:
        """What the reranker is given; one of texts alone takes bare strings."""
        if self._texts_alone:
            if content.media:
                raise ValueError(f"{where}: the reranker takes texts alone, but this is {shown(content.item)}.")
            return content.text
        return content.item if self.prepare is None else self.prepare(content.item)


def check_reranker(reranker: Any, depth: int = 0) -> None:
    """Refuse what can score neither pairs nor lists, or no lists of so many candidates."""
    if isinstance(reranker, ListScorer):
        if depth > reranker.max_candidates:
            raise ValueError(
                f"`rerank_depth={depth}`, but the listwise reranker takes `max_candidates={reranker.max_candidates}`. "
                "Lower the depth, or raise `max_candidates`."
            )
    elif not isinstance(reranker, PairScorer):
        raise TypeError(
            f"`reranker` is a {type(reranker).__name__}, but it needs a method `predict`, as a CrossEncoder has."
        )


def scoring_model(reranker: Any) -> Any:
    """The model that scores: of a listwise reranker the one that it asks."""
    return reranker.model if isinstance(reranker, ListScorer) else reranker


def first_alone(scores: np.ndarray) -> np.ndarray:
    """Scores (Q, k) that put each row's best candidate first and leave the others in their order.

    >>> first_alone(np.array([[0.2, 0.1, 0.5], [0.3, 0.3, -np.inf]], dtype=np.float32)).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, -inf]]
    """
    best = np.zeros_like(scores)
    if scores.shape[1]:
        best[np.arange(len(scores)), scores.argmax(axis=1)] = 1
    return np.where(np.isneginf(scores), scores, best)


def reranker_name(reranker: Any) -> str:
    """What a reranker is called in settings and reports: the checkpoint it was loaded from, or its class."""
    model = scoring_model(reranker)
    card: Any = getattr(model, "model_card_data", None)
    name = getattr(card, "model_id", None) or getattr(card, "base_model", None) or type(model).__name__
    if not isinstance(reranker, ListScorer):
        return name
    return f"{name} (listwise, {'first place alone' if reranker.replaces == 'first' else 'all places'})"
