"""Each distinct thing is encoded once: within a call by its content, across calls and runs through the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm.auto import tqdm

from unime_st.evaluation.cache import EmbeddingCache
from unime_st.fingerprint import fingerprint

logger = logging.getLogger(__name__)

OnError = Literal["raise", "report"]

_BATCHES_A_SHARD = 8


class Section(Protocol):
    """Where embeddings of one model under one prompt are kept: a :class:`~unime_st.evaluation.cache.CacheSection` or a
    :class:`MemorySection`."""

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings, None where there is none."""

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings (N, D)."""


Cache = EmbeddingCache | str | Path | Section


class MemorySection:
    """Keeps embeddings for as long as it lives: one evaluation's several tasks encode nothing twice."""

    def __init__(self) -> None:
        self._rows: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, fingerprints: Iterable[str]) -> list[np.ndarray | None]:
        """Look up embeddings, None where there is none."""
        return [self._rows.get(fingerprint) for fingerprint in fingerprints]

    def add(self, fingerprints: Sequence[str], embeddings: np.ndarray) -> None:
        """Store embeddings (N, D)."""
        self._rows.update(zip(fingerprints, embeddings, strict=True))


def effective_prompt(model: Any, prompt: str | None = None, prompt_name: str | None = None) -> str | None:
    """The prompt `model.encode` would use: `prompt`, else the one named, else the model's default one, else None.

    Raises:
        ValueError: the model has no prompt of that name.
    """
    if prompt is not None:
        return prompt
    prompts = getattr(model, "prompts", None) or {}
    name = prompt_name if prompt_name is not None else getattr(model, "default_prompt_name", None)
    if name is None:
        return None
    if name not in prompts:
        raise ValueError(
            f"prompt_name={name!r}, but the model's prompts are {sorted(prompts)}. "
            "Name one of them or give the text itself as `prompt`."
        )
    return prompts[name]


def open_section(
    model: Any,
    cache: EmbeddingCache | None = None,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
) -> Section:
    """The cache's section for a model in its present state under a prompt; in memory when there is no cache.

    Opening reads the weights once. Hold the section while the model stays as it is.
    """
    if cache is None:
        return MemorySection()
    return cache.section(model, prompt=effective_prompt(model, prompt, prompt_name))


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
    """Encode items, each distinct one once, and what the cache knows not at all.

    Args:
        model: Encodes whatever ``items`` are.
        items: Texts, images, dicts of both, messages; content decides what is equal, see
            :func:`~unime_st.fingerprint.fingerprint`.
        cache: Where embeddings are looked up and, every few batches, written, so that a killed run goes on where it was:
            a cache, its folder, or a section opened before (:func:`open_section`), which saves reading the weights in
            each of several calls.
        batch_size: Items a forward pass.
        prompt: Instruction for all items; wins over ``prompt_name``.
        prompt_name: Name of one of the model's prompts.
        show_progress_bar: None shows it when the log level is INFO or below.

    Returns:
        Shape (N, D), float32, in the order of ``items``; as the model gives them, so not normalised unless it does that.

    Raises:
        ValueError: If there are no items, or an embedding is not finite.

    Example:
        >>> class Lengths:  # stands for a model
        ...     def encode(self, items, **kwargs):
        ...         print("encoding", items)
        ...         return np.array([[len(item)] for item in items])
        >>> encode_distinct(Lengths(), ["a", "bb", "a"]).tolist()
        encoding ['bb', 'a']
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
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Encode items as :func:`encode_distinct` does, without repeating equal rows.

    Args:
        model: See :func:`encode_distinct`, as for all below.
        items: What to encode.
        cache: Where embeddings are kept.
        batch_size: Items a forward pass.
        prompt: Instruction for all items.
        prompt_name: Name of one of the model's prompts.
        show_progress_bar: Whether to show progress.
        on_error: "raise", or "report" to go on without the items that cannot be read or encoded.

    Returns:
        Embeddings of the distinct items, shape (U, D), float32, in the order of first appearance; the row of each item,
        shape (N,), -1 for one that failed; and item number -> error for those.

    Raises:
        ValueError: If there are no items, none can be encoded, or with "raise" an embedding is not finite.
    """
    if not len(items):
        raise ValueError("There is nothing to encode: `items` is empty.")
    if batch_size < 1:
        raise ValueError(f"`batch_size={batch_size}`, but a batch needs at least one item.")
    prompt = effective_prompt(model, prompt, prompt_name)
    section = _section(model, cache, prompt)
    keys, errors = _fingerprints(items, on_error)
    item_of = {key: items[row] for row, key in reversed(list(enumerate(keys))) if key}  # the first of equals
    distinct = [key for key in dict.fromkeys(keys) if key]
    found = {key: row for key, row in zip(distinct, section.get(distinct), strict=True) if row is not None}
    missing = sorted((key for key in distinct if key not in found), key=lambda key: _size(item_of[key]), reverse=True)
    failed: dict[str, str] = {}
    step = batch_size * _BATCHES_A_SHARD
    for start in _progress(len(missing), step, show_progress_bar):
        part = missing[start : start + step]
        fresh = _encode(model, {key: item_of[key] for key in part}, batch_size, prompt, failed, on_error)
        if fresh:
            section.add(list(fresh), np.stack(list(fresh.values())))
        found.update(fresh)
    errors |= {row: failed[key] for row, key in enumerate(keys) if key in failed}
    kept = [key for key in distinct if key in found]
    if not kept:
        raise ValueError(f"None of the {len(items)} items could be encoded; the first: {errors[min(errors)]}")
    place = {key: row for row, key in enumerate(kept)}
    return np.stack([found[key] for key in kept]), np.array([place.get(key, -1) for key in keys]), errors


def _section(model: Any, cache: Cache | None, prompt: str | None) -> Section:
    if isinstance(cache, str | Path):
        cache = EmbeddingCache(cache)
    if cache is None or isinstance(cache, EmbeddingCache):
        return open_section(model, cache, prompt=prompt)
    return cache


def _fingerprints(items: Sequence[Any], on_error: OnError) -> tuple[list[str], dict[int, str]]:
    """Content of each item, "" for one that cannot be read; and the errors."""
    keys, errors = [], {}
    for row, item in enumerate(items):
        try:
            keys.append(fingerprint(item))
        except (OSError, ValueError, TypeError) as error:
            if on_error == "raise":
                raise
            keys.append("")
            errors[row] = f"{type(error).__name__}: {error}"
    return keys, errors


def _progress(count: int, step: int, shown: bool | None) -> Iterator[int]:
    if shown is None:
        shown = logger.isEnabledFor(logging.INFO)
    with tqdm(total=count, desc="Encoding", unit="item", disable=not shown or not count) as bar:
        for start in range(0, count, step):
            yield start
            bar.update(min(step, count - start))


def _size(item: Any) -> tuple[int, int]:
    """Brings like items into one batch: number of images, length of text."""
    if isinstance(item, str):
        return 0, len(item)
    if isinstance(item, dict):
        images = item.get("image")
        return len(images) if isinstance(images, list | tuple) else int(images is not None), len(item.get("text") or "")
    return 1, 0


def _encode(
    model: Any, items: Mapping[str, Any], batch_size: int, prompt: str | None, failed: dict[str, str], on_error: OnError
) -> dict[str, np.ndarray]:
    """Encode items by key. With "report", halves what fails until the culprits are alone, and notes them in `failed`."""
    try:
        embeddings = _finite(model, list(items.values()), batch_size, prompt)
    except (OSError, ValueError) as error:
        if on_error == "raise":
            raise
        if len(items) == 1:
            failed[next(iter(items))] = f"{type(error).__name__}: {error}"
            return {}
        keys = list(items)
        halves = (keys[: len(keys) // 2], keys[len(keys) // 2 :])
        parts = [_encode(model, {key: items[key] for key in half}, batch_size, prompt, failed, on_error) for half in halves]
        return parts[0] | parts[1]
    return dict(zip(items, embeddings, strict=True))


def _finite(model: Any, items: list[Any], batch_size: int, prompt: str | None) -> np.ndarray:
    embeddings = model.encode(
        items, batch_size=batch_size, prompt=prompt, show_progress_bar=False, convert_to_numpy=True
    )
    embeddings = np.asarray(embeddings, dtype=np.float32)
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise ValueError(
            f"The model gave an embedding that is not finite for {len(broken)} of {len(items)} items, the first of which "
            f"is {str(items[broken[0]])[:200]!r}. Try float32 or bfloat16 instead of float16."
        )
    return embeddings
