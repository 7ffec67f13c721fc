"""What the emoji benchmark is about: concepts, their drawings by three vendors, minimal pairs, the split by role."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emoji.packages import EMOJIBASE, FLUENT, NOTO, TWEMOJI, Fetched

TRAINED_VENDORS = ("google", "twitter")
HELD_OUT_VENDOR = "fluent"
VENDORS = (*TRAINED_VENDORS, HELD_OUT_VENDOR)
SPLITS = ("train", "validation", "test")

TONES = ("", "light skin tone", "medium-light skin tone", "medium skin tone", "medium-dark skin tone", "dark skin tone")
COLOURS = frozenset(["red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink"])
DIRECTIONS = frozenset((
    "left", "right", "up", "down", "upwards", "downwards", "leftwards", "rightwards", "left-facing",
    "right-facing", "up-left", "up-right", "down-left", "down-right", "left-right", "up-down", "horizontal",
    "vertical",
))  # fmt: skip
SIZES = frozenset(["small", "medium", "medium-small", "large", "low", "high"])
NUMBERS = frozenset((
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve", "1st", "2nd", "3rd", "first", "last",
))  # fmt: skip
GENDERS = frozenset(["man", "woman", "person", "men", "women", "people", "boy", "girl"])

_PEOPLE = {"1F468", "1F469", "1F9D1", "1F466", "1F467"}
_SIGNS = {"2640", "2642"}


@dataclass(frozen=True)
class Concept:
    """One emoji: its texts and where each vendor's drawings of it are.

    Attributes:
        code: code points joined by "-", without the variation selector; the name of its image files.
        label: its name, e.g. "waving hand".
        tags: keywords, e.g. ("bye", "hello").
        group: one of 8 categories, e.g. "people & body".
        subgroup: one of 94 subcategories, e.g. "hand fingers open".
        role: what is drawn, whoever is drawn doing it: the unit of the split.
        sources: vendor -> packaged image files, the plain drawing first, then five skin tones if it has them.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    role: str
    sources: dict[str, tuple[Path, ...]] = field(hash=False, compare=False, repr=False)

    @property
    def has_tones(self) -> bool:
        """Whether there are skin-tone variants."""
        return len(self.sources[HELD_OUT_VENDOR]) > 1

    @property
    def words(self) -> tuple[str, ...]:
        """The label in lower-case words."""
        return tuple(re.findall(r"[\w’'-]+|[#*]", self.label.lower()))

    def image(self, vendor: str, tone: int = 0) -> str:
        """Path of a drawing below the benchmark's image folder; tone 0 is the plain drawing, 1 (light) to 5 (dark)."""
        return f"{vendor}/{self.code.lower()}{f'-tone{tone}' if tone else ''}.png"

    def name(self, tone: int = 0) -> str:
        """The label, with its skin tone if one is given."""
        return f"{self.label}: {TONES[tone]}" if tone else self.label


@dataclass(frozen=True)
class MinimalPair:
    """A concept and another whose label differs in one word.

    Attributes:
        kind: "colour", "direction", "size", "number", "gender", "object" (the last word differs) or "other".
    """

    concept: Concept
    other: Concept
    word: str
    other_word: str
    kind: str


def load_concepts(fetched: Fetched) -> list[Concept]:
    """Read every emoji that all three vendors draw, in the order of their code points.

    Left out: flags (a drawing does not say its country's name), components (bare skin tones and hair), the families
    told apart by members (two vendors draw them as the same few silhouettes), and drawings that a vendor uses twice.
    """
    texts = {_plain(row["hexcode"]): row for row in _read(fetched.path(EMOJIBASE) / "package/en/data.json")}
    drawn: dict[str, set[bytes]] = {vendor: set() for vendor in VENDORS}
    concepts = []
    rows = _read(fetched.path(NOTO) / "package/emoji.json")
    for row in sorted(rows, key=lambda row: row["unified"]):
        text = texts.get(_plain(row["unified"]))
        if row["category"] in {"Flags", "Component"} or text is None or text["label"].startswith("family:"):
            continue
        sources = _sources(fetched, row)
        if sources is None:
            continue
        pictures = {vendor: paths[0].read_bytes() for vendor, paths in sources.items()}
        if any(pictures[vendor] in drawn[vendor] for vendor in VENDORS):
            continue
        for vendor in VENDORS:
            drawn[vendor].add(pictures[vendor])
        concepts.append(
            Concept(
                code=_plain(row["unified"]),
                label=text["label"],
                tags=tuple(text.get("tags", ())),
                group=row["category"].lower(),
                subgroup=row["subcategory"].replace("-", " "),
                role=_role(_plain(row["unified"])),
                sources=sources,
            )
        )
    return concepts


def split_concepts(
    concepts: Sequence[Concept], shares: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0
) -> dict[str, list[Concept]]:
    """Divide concepts into train, validation and test so that no role is in two of them.

    A role is the code points before the first joiner; for people at work or play it is what they do ("man farmer" and
    "woman farmer" are one role), and concepts whose labels differ only in a word of gender are one role too. Otherwise
    a drawing nearly equal to a test drawing would be trained on.
    """
    roles = _merged_roles(concepts)
    members: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        members[roles[concept.code]].append(concept)
    order = sorted(members)
    random.Random(seed).shuffle(order)
    bounds = (shares[0] * len(concepts), (shares[0] + shares[1]) * len(concepts), float("inf"))
    chosen: dict[str, str] = {}
    placed = 0
    for role in order:
        split = next(name for name, bound in zip(SPLITS, bounds, strict=True) if placed < bound)
        chosen |= {concept.code: split for concept in members[role]}
        placed += len(members[role])
    return {split: [concept for concept in concepts if chosen[concept.code] == split] for split in SPLITS}


def minimal_pairs(concepts: Iterable[Concept]) -> dict[str, list[MinimalPair]]:
    """Find, for each concept's code, the concepts whose labels differ from its own in exactly one word.

    >>> def concept(code, label):
    ...     return Concept(code, label, (), "symbols", "heart", code, {})
    >>> pairs = minimal_pairs([concept("1", "red heart"), concept("2", "blue heart"), concept("3", "broken mirror")])
    >>> [(pair.other.label, pair.kind) for pair in pairs["1"]]
    [('blue heart', 'colour')]
    """
    frames: dict[tuple[Any, ...], list[tuple[str, Concept]]] = defaultdict(list)
    for concept in concepts:
        words = concept.words
        for place in range(len(words) if len(words) > 1 else 0):
            frames[place, words[:place], words[place + 1 :]].append((words[place], concept))
    pairs: dict[str, list[MinimalPair]] = defaultdict(list)
    for (_, _, rest), fillings in frames.items():
        for word, concept in fillings:
            for other_word, other in fillings:
                if other is not concept:
                    kind = _kind(word, other_word, is_last=not rest)
                    pairs[concept.code].append(MinimalPair(concept, other, word, other_word, kind))
    return dict(pairs)


def _kind(word: str, other_word: str, is_last: bool) -> str:
    named = {"colour": COLOURS, "direction": DIRECTIONS, "size": SIZES, "number": NUMBERS, "gender": GENDERS}
    for kind, vocabulary in named.items():
        if word in vocabulary and other_word in vocabulary:
            return kind
    return "object" if is_last else "other"


def _role(code: str) -> str:
    first, *rest = code.split("-200D-")
    if first in _PEOPLE and rest:
        doing = [part for part in rest if part.split("-")[0] not in _PEOPLE | _SIGNS]
        return "person+" + ("+".join(doing) or "family")
    return first


def _merged_roles(concepts: Sequence[Concept]) -> dict[str, str]:
    """Role of each code, after roles that share a label but for words of gender have been made one."""
    parent: dict[str, str] = {concept.role: concept.role for concept in concepts}

    def root(role: str) -> str:
        while parent[role] != role:
            role = parent[role]
        return role

    seen: dict[tuple[str, ...], str] = {}
    for concept in concepts:
        frame = tuple(word for word in concept.words if word not in GENDERS)
        if not frame or len(frame) == len(concept.words):
            continue
        first = seen.setdefault(frame, concept.role)
        parent[max(root(first), root(concept.role))] = min(root(first), root(concept.role))
    return {concept.code: root(concept.role) for concept in concepts}


def _sources(fetched: Fetched, row: dict[str, Any]) -> dict[str, tuple[Path, ...]] | None:
    """Files of one emoji by vendor, or None if a vendor lacks it. Tones only where all vendors draw all five."""
    tones = list(row.get("skin_variations", {}).values())
    tones = tones if len(tones) == 5 else []
    sources = {vendor: [_file(fetched, vendor, variant["image"]) for variant in (row, *tones)] for vendor in VENDORS}
    if any(paths[0] is None for paths in sources.values()):
        return None
    complete = all(path is not None for paths in sources.values() for path in paths)
    return {
        vendor: tuple(path for path in (paths if complete else paths[:1]) if path is not None)
        for vendor, paths in sources.items()
    }


def _file(fetched: Fetched, vendor: str, image: str) -> Path | None:
    if vendor == "fluent":
        stem, folder = image.removesuffix(".png"), fetched.path(FLUENT) / "package/assets"
        names = [folder / f"{stem}.webp", folder / f"{stem.replace('-fe0f', '')}.webp"]
    else:
        package = NOTO if vendor == "google" else TWEMOJI
        names = [fetched.path(package) / "package/img" / vendor / "64" / image]
    return next((path for path in names if path.is_file()), None)


def _plain(code: str) -> str:
    return code.upper().replace("-FE0F", "")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
