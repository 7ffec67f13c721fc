"""Pairs of a query and a candidate: what each half says, and in which order pairs are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unime_st.identity.content import Content
from unime_st.modules.inputs import Message, as_messages, contents_of

FramesOf = Callable[[Content], Any]

HALVES = {"query": "query", "document": "candidate"}
"""The role of each half in a chat template, and the word that errors have for it."""


def are_pairs(inputs: Sequence[Any]) -> bool:
    """Whether inputs are pairs, and not single inputs or chat messages."""
    return all(isinstance(pair, (list, tuple)) and len(pair) == 2 and not _is_message(pair[0]) for pair in inputs)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "role" in item


def pair_messages(pair: Any, row: int, opened: dict[Any, Any], **options: Any) -> list[Message]:
    """Chat messages of a pair, one for each half, with opened images; errors name the pair and the half."""
    messages = []
    for half, (role, word) in zip(pair, HALVES.items(), strict=True):
        try:
            (message,) = as_messages(half, row, opened=opened, **options)
        except (OSError, TypeError, ValueError) as error:
            raise type(error)(f"The {word} of pair {row}: {error}") from error
        messages.append({**message, "role": role})
    return messages


@dataclass(frozen=True)
class ScoringOrder:
    """Which pairs are scored, and in which order: those of one query side by side."""

    pairs: list[tuple[Content, Content]]  # the distinct pairs, in order
    index: np.ndarray  # (N,) the place of each pair that was given in `pairs`
    first: np.ndarray  # (U,) the number of the first pair that was given of each of `pairs`


def scoring_order(inputs: Sequence[Any]) -> ScoringOrder:
    """Put equal pairs together, and pairs of one query, or whose queries or candidates show one image, side by side."""
    halves = []
    for place, word in enumerate(HALVES.values()):
        given: dict[int, Content] = {}  # one object is often the query of many pairs
        told = []
        for row, pair in enumerate(inputs):
            item = pair[place]
            if id(item) not in given:
                given[id(item)] = _content(item, row, word)
            told.append(given[id(item)])
        halves.append(told)
    keys = [(query.fingerprint, document.fingerprint) for query, document in zip(*halves, strict=True)]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    distinct = list(first.values())

    def beginning(number: int) -> tuple[Any, ...]:
        query, document = halves[0][number], halves[1][number]
        return bool(query.media), query.media, query.text, document.media, document.text, number

    ordered = sorted(distinct, key=beginning)
    place_of = {keys[number]: place for place, number in enumerate(ordered)}
    pairs = [(halves[0][number], halves[1][number]) for number in ordered]
    index = np.array([place_of[key] for key in keys], dtype=np.int64)
    return ScoringOrder(pairs, index, np.array(ordered, dtype=np.int64))


def pair_batches(pairs: Sequence[tuple[Content, Content]], size: int, frames_of: FramesOf | None) -> list[list[int]]:
    """The places of pairs in batches of at most ``size``, in order; pairs with videos get batches of their own.

    ``frames_of`` tells what the videos of a batch must have in common, None if nothing.
    """
    groups: dict[Any, list[int]] = {}
    for place, pair in enumerate(pairs):
        shows_video = any(half.shows_video for half in pair)
        alike = tuple(map(frames_of, pair)) if shows_video and frames_of is not None else None
        groups.setdefault((shows_video, alike), []).append(place)
    return [own[start : start + size] for own in groups.values() for start in range(0, len(own), size)]


def _content(item: Any, row: int, word: str) -> Content:
    try:
        return contents_of([item], [row])[0]
    except (OSError, TypeError, ValueError) as error:
        raise type(error)(f"The {word} of pair {row}: {error}") from error
