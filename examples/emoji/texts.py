"""Texts for stage 1: WordNet terms with their glosses, and the training split's captions and keywords."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emoji.concepts import Concept
from emoji.packages import WORDNET, Fetched

GLOSS_WORDS = range(4, 15)  # length of a usable gloss in words


@dataclass(frozen=True)
class Gloss:
    """A term of WordNet and what it means."""

    term: str
    gloss: str


def wordnet_glosses(fetched: Fetched) -> list[Gloss]:
    """Noun, verb and adjective entries with glosses of 4 to 14 words, without examples, each under its first term."""
    folder = fetched.path(WORDNET) / "package/dict"
    return [entry for part in ("noun", "verb", "adj") for entry in _entries(folder / f"data.{part}")]


def split_glosses(
    glosses: Iterable[Gloss], held_out: int = 500, seed: int = 0
) -> tuple[list[Gloss], list[Gloss], list[Gloss]]:
    """Part glosses into training, and `held_out` each for validation and test.

    Held-out terms have one sense only among the glosses given, so that each has one right gloss, never trained on.
    """
    shuffled = list(glosses)
    random.Random(seed).shuffle(shuffled)
    senses = Counter(entry.term for entry in shuffled)
    uses = Counter(entry.gloss for entry in shuffled)
    aside = [entry for entry in shuffled if senses[entry.term] == 1 and uses[entry.gloss] == 1][: 2 * held_out]
    if len(aside) < 2 * held_out:
        raise ValueError(f"`held_out={held_out}` needs {2 * held_out} terms of one sense; there are {len(aside)}.")
    taken = {entry.term for entry in aside}
    return [entry for entry in shuffled if entry.term not in taken], aside[:held_out], aside[held_out:]


def keywords_of(concept: Concept) -> str:
    """Up to five keywords that do not stand in the label; "" where there are fewer than two."""
    others = [tag for tag in concept.tags if tag not in concept.words][:5]
    return ", ".join(others) if len(others) > 1 else ""


def definitions(concepts: Iterable[Concept], glosses: Iterable[Gloss]) -> list[str]:
    """The gloss of each concept's label that shares most words with its keywords, "" where none shares any.

    >>> saw = Concept("1", "saw", ("tool", "carpenter"), "", "", "1", {})
    >>> definitions([saw], [Gloss("saw", "a wise old saying"), Gloss("saw", "a hand tool for cutting wood")])
    ['a hand tool for cutting wood']
    """
    of: dict[str, list[str]] = defaultdict(list)
    for entry in glosses:
        of[entry.term.lower()].append(entry.gloss)
    found = []
    for concept in concepts:
        words = {word for tag in concept.tags for word in tag.split()} - set(concept.words)
        shared = {gloss: len(words & set(re.findall(r"\w+", gloss))) for gloss in of[concept.label.lower()]}
        best = max(shared, key=shared.__getitem__, default="")
        found.append(best if shared.get(best) else "")
    return found


def caption_texts(concepts: Iterable[Concept]) -> list[str]:
    """Labels and keyword lists of concepts, each once, for the teacher beside the glosses."""
    texts: dict[str, None] = {}
    for concept in concepts:
        texts[concept.label] = None
        if concept.tags:
            texts[", ".join(concept.tags[:5])] = None
    return list(texts)


def _entries(path: Path) -> Iterator[Gloss]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence at the top
                continue
            fields, _, rest = line.partition(" | ")
            gloss = re.split(r'[;:]\s*"', rest, maxsplit=1)[0].strip(" ;:\n")
            term = re.sub(r"\(\w+\)$", "", fields.split(" ")[4]).replace("_", " ")
            if len(gloss.split()) in GLOSS_WORDS:
                yield Gloss(term, gloss)
