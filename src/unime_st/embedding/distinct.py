"""Each distinct thing is encoded once: within a call by its content, across calls and runs through the cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from unime_st.distributed import gather_objects, rank, world_size
from unime_st.embedding.broken import ITEM_ERRORS, BrokenItemError, shown
from unime_st.embedding.cache import EmbeddingCache
from unime_st.embedding.prompts import effective_prompt
from unime_st.embedding.sections import MemorySection, Section
from unime_st.identity.content import Content, takes_contents

logger = logging.getLogger(__name__)

OnError = Literal["raise", "report"]

# And what else libraries raise for one item, such as the processor of another package's model.
_ANY_ITEM_ERROR = (*ITEM_ERRORS, ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError)
_ROW_OF_ONE = re.compile(r"\b[Rr]ow 0( of the batch)?\b")  # an item is looked at alone

_BATCHES_A_CHUNK = 8
_LETTERS_AN_IMAGE = 1000


Cache = EmbeddingCache | str | Path | Section


def open_section(
    model: Any,
    cache: EmbeddingCache | str | Path | None = None,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Section:
    """The cache's section for a model in its present state under a prompt; in memory when there is no cache."""
    if cache is None:
        return MemorySection()
    if isinstance(cache, str | Path):
        cache = EmbeddingCache(cache)
    return cache.section(model, prompt=effective_prompt(model, prompt, prompt_name), settings=settings)


def encode_distinct(
    model: Any,
    items: Sequence[Any],
    *,
    cache: Cache | None = None,
    batch_size: int = 32,
    prompt: str | None = None,
    prompt_name: str | None = None,
    show_progress_bar: bool | None = None,
) -> np.ndarray:
    """Encode each distinct item once; those that the cache has are not encoded at all.

    Args:
        model: Encodes whatever ``items`` are.
        items: Texts, images, dicts of both, messages; content decides what is equal, see
            :func:`~unime_st.identity.content.fingerprint`.
        cache: Where embeddings are looked up and, every few batches, written, so that a killed run goes on where it
            was: a cache, its folder, or a section opened before (:func:`open_section`), which saves reading the weights
            in each of several calls.
        batch_size: Items a forward pass.
        prompt: Instruction for all items; wins over ``prompt_name``.
        prompt_name: Name of one of the model's prompts.
        show_progress_bar: None shows it when the log level is INFO or below.

    Returns:
        Shape (N, D), float32, in the order of ``items``; as the model gives them, normalised only
        if it does.

    Raises:
        BrokenItemError: If an item cannot be read or encoded.
        ValueError: If there are no items, ``prompt_name`` is not one of the model's, or an embedding is not finite.

    Example:
        >>> class Lengths:  # stands for a model
        ...     def encode(self, items, **kwargs):
        ...         print("encoding", items)
        ...         return np.array([[len(item)] for item in items])
        >>> encode_distinct(Lengths(), ["a", "bb", "a"]).tolist()
        encoding ['a', 'bb']
        [[1.0], [2.0], [1.0]]
    """
    embeddings, index, _ = encode_indexed(
        model,
        items,
        cache=cache,
        batch_size=batch_size,
        prompt=prompt,
        prompt_name=prompt_name,
        show_progress_bar=show_progress_bar,
    )
    return embeddings[index]


def encode_indexed(
    model: Any,
    items: Sequence[Any],
    *,
    cache: Cache | None = None,
    batch_size: int = 32,
    prompt: str | None = None,
    prompt_name: str | None = None,
    show_progress_bar: bool | None = None,
    on_error: OnError = "raise",
    prepare: Callable[[Any], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Encode items as :func:`encode_distinct` does, without repeating equal rows; every process makes this call.

    With ``on_error="report"`` items that cannot be read or encoded are left out. ``prepare`` makes of an item what the
    model encodes, late, such as an opened and resized image; what it does must be part of the cache's settings.

    Returns embeddings of the distinct items ``(U, D)``, float32, in the order of first appearance, ``(0, 0)`` when all
    failed; the row of each item ``(N,)``, -1 for one that failed; and item number -> error for those.
    """
    if isinstance(items, str | bytes | Mapping):
        raise TypeError(f"`items` is one item, {shown(items)}, and not a list of them: give [item].")
    if not len(items):
        raise ValueError("There is nothing to encode: `items` is empty.")
    if batch_size < 1:
        raise ValueError(f"`batch_size={batch_size}`, but a batch needs at least one item.")
    prompt = effective_prompt(model, prompt, prompt_name)
    if cache is None or isinstance(cache, EmbeddingCache | str | Path):
        section = open_section(model, cache, prompt=prompt)
    else:
        section = cache
    run = _Run(model, items, batch_size, prompt, on_error, prepare)
    keys = run.tell()
    distinct = [key for key in dict.fromkeys(keys) if key]
    found = {key: row for key, row in zip(distinct, section.get(distinct), strict=True) if row is not None}
    missing = {key for key in distinct if key not in found}
    run.has_worked = bool(found)
    fresh, encoded = run.fill(missing, section, len(distinct), show_progress_bar)
    found.update(fresh)
    logger.info("%d items, %d distinct: %d from the cache, %d encoded", len(items), len(distinct),
                len(distinct) - encoded, len(fresh))  # fmt: skip
    kept = [key for key in distinct if key in found]
    place = {key: row for row, key in enumerate(kept)}
    index = np.array([place.get(key, -1) for key in keys], dtype=np.int64)
    errors = {row: run.errors[run.first.get(key, row)] for row, key in enumerate(keys) if index[row] < 0}
    return np.stack([found[key] for key in kept]) if kept else np.zeros((0, 0), np.float32), index, errors


def _progress(count: int, distinct: int, shown: bool | None) -> Any:
    if shown is None:
        shown = logger.isEnabledFor(logging.INFO)
    known = f" ({distinct - count} cached)" if count < distinct else ""
    return tqdm(total=count, desc=f"Encoding{known}", unit="item", disable=not shown or not count)


@dataclass
class _Run:
    """One call's items and how they are encoded."""

    model: Any
    items: Sequence[Any]
    batch_size: int
    prompt: str | None
    on_error: OnError
    prepare: Callable[[Any], Any] | None = None
    errors: dict[int, str] = field(default_factory=dict)  # item number -> what is wrong with it, with "report"
    first: dict[str, int] = field(default_factory=dict)  # fingerprint -> number of the first item that has it
    contents: dict[str, Content] = field(default_factory=dict)  # fingerprint -> what that item says, without the item
    has_worked: bool = False  # whether the model has ever encoded something

    def tell(self) -> list[str]:
        """Fingerprint of each item, "" for one that cannot be read."""
        keys = []
        known: dict[Any, str] = {}  # what recurs, as candidates do, is read and hashed once a call
        for row, item in enumerate(self.items):
            name = name_of(item)
            key = known.get(name) if name is not None else None
            if key is None:
                key = self._told(row, item)
                if key and name is not None:
                    known[name] = key
            keys.append(key)
        return keys

    def _told(self, row: int, item: Any) -> str:
        try:
            content = Content(item)
        except _ANY_ITEM_ERROR as error:
            self._broken(row, error)
            return ""
        key = content.fingerprint
        if key not in self.contents:
            self.first[key], self.contents[key] = row, content.given_as(None)  # an item may be an image: read it again
        return key

    def fill(
        self, missing: set[str], section: Section, distinct: int, shown: bool | None
    ) -> tuple[dict[str, np.ndarray], int]:
        """Encode what is missing into a section; embeddings of all processes by key, and how many were asked for.

        Items that begin alike (the same image) are in one chunk, the most costly chunk is first. Several processes take
        chunks in turn and exchange the embeddings, so that all end with the same.
        """
        alone = getattr(self.model, "_distributed_inference", None) is not None  # the Trainer shares `encode` out
        share, of = (0, 1) if alone else (rank(), world_size())
        if of > 1:  # all have looked before any writes; what one lacks, all take as missing
            missing = set().union(*gather_objects(missing))
        queue = sorted(missing, key=lambda key: (*self._beginning(key), key))
        step = self.batch_size * _BATCHES_A_CHUNK
        chunks = [queue[start : start + step] for start in range(0, len(queue), step)]
        chunks.sort(key=lambda chunk: -sum(map(self._cost, chunk)))
        fresh: dict[str, np.ndarray] = {}
        failure: BrokenItemError | None = None
        with _progress(len(queue), distinct, shown) as bar:
            for chunk in chunks[share::of]:
                try:
                    made = self.encode(chunk)
                except BrokenItemError as error:
                    if of == 1:
                        raise
                    failure = error
                    break
                if made:
                    section.add(list(made), np.stack(list(made.values())))
                fresh.update(made)
                bar.update(len(chunk) * of)
        if of > 1:
            fresh = self._exchanged(fresh, failure)
        return fresh, len(queue)

    def _exchanged(self, fresh: dict[str, np.ndarray], failure: BrokenItemError | None) -> dict[str, np.ndarray]:
        """What all processes have encoded, and their errors."""
        shared = gather_objects((fresh, self.errors, failure and (failure.position, failure.reason)))
        if failures := [failed for *_, failed in shared if failed]:
            raise BrokenItemError(*min(failures))
        for part, errors, _ in shared:
            fresh = fresh | part
            self.errors.update(errors)
        return fresh

    def _beginning(self, key: str) -> tuple[int, tuple[bytes, ...], str]:
        """A key that sorts like items together."""
        content = self.contents[key]
        return len(content.media), content.media, content.text

    def _cost(self, key: str) -> int:
        content = self.contents[key]
        return len(content.media) * _LETTERS_AN_IMAGE + len(content.text)

    def encode(self, keys: list[str]) -> dict[str, np.ndarray]:
        failed: dict[str, Exception] = {}
        made = self._halved(keys, failed)
        self.has_worked |= bool(made)
        if not made and len(keys) > 1 and len(set(map(repr, failed.values()))) == 1:
            error = failed[keys[0]]
            if not self.has_worked or not isinstance(error, ITEM_ERRORS):
                raise error  # it is the same for every item: the fault is the model's
        for key in sorted(failed, key=self.first.__getitem__):
            self._broken(self.first[key], failed[key])
        return made

    def _halved(self, keys: list[str], failed: dict[str, Exception]) -> dict[str, np.ndarray]:
        """Encode items; those that make a batch fail are found by halving, and noted."""
        try:
            embeddings = self.model.encode(
                [self._prepared(key) for key in keys],
                batch_size=self.batch_size,
                prompt=self.prompt,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        except torch.OutOfMemoryError:
            raise
        except _ANY_ITEM_ERROR as error:
            if len(keys) == 1:
                failed[keys[0]] = error
                return {}
        else:
            return self._finite(keys, np.asarray(embeddings, dtype=np.float32))
        half = len(keys) // 2
        return self._halved(keys[:half], failed) | self._halved(keys[half:], failed)

    def _finite(self, keys: list[str], embeddings: np.ndarray) -> dict[str, np.ndarray]:
        for row in np.flatnonzero(~np.isfinite(embeddings).all(axis=1)):
            number = self.first[keys[row]]
            raise BrokenItemError(
                number,
                f"The model gave NaN or infinity for item {number} ({shown(self.items[number])}). Its weights may "
                "have diverged; if not, try float32 or bfloat16 in place of float16.",
            )
        return dict(zip(keys, embeddings, strict=True))

    def _prepared(self, key: str) -> Any:
        item = self.items[self.first[key]]
        if self.prepare is not None:
            item = self.prepare(item)
        return self.contents[key].given_as(item) if takes_contents(self.model) else item

    def _broken(self, row: int, error: Exception) -> None:
        message = f"{type(error).__name__}: {_ROW_OF_ONE.sub('the item', str(error))}"
        if self.on_error == "raise":
            raise BrokenItemError(row, f"{shown(self.items[row])}: {message}") from error
        self.errors[row] = message


def name_of(item: Any) -> Any:
    """A hashable value that identifies an input without reading files, or None where nothing cheap does."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and all(isinstance(value, str) for value in item.values()):
        return tuple(sorted(item.items()))
    return None
