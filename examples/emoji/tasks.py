"""The emoji benchmark's tasks: each turns a pool of concepts into examples with wrong answers, the hardest first.

One builder serves training and evaluation: a training row takes one of an example's hardest wrong answers as its
explicit negative, an evaluation row shows them all as candidates. No wrong answer is meant to be as right as the right
one: plain labels are not shown beside skin-tone variants, which they describe too, nor keywords beside drawings that
have them all.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from emoji.concepts import COLOURS, HELD_OUT_VENDOR, TONES, TRAINED_VENDORS, Concept, minimal_pairs

IMAGE = "<|image_1|>"
TARGET_IMAGE = f"{IMAGE}\nRepresent this drawing."
CORNERS = ("top left", "top right", "bottom left", "bottom right")
COLOURED = frozenset({"heart", "geometric", "book paper", "animal mammal", "animal bird", "food fruit"})
GENDER_ANSWERS = {
    "man": "a man", "men": "men", "woman": "a woman", "women": "women", "person": "a person", "people": "people",
    "boy": "a boy", "girl": "a girl",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One side of an example: text, the path of an image below the image folder, or both."""

    text: str = ""
    image: str = ""


@dataclass(frozen=True)
class Example:
    """A query, its right answer and wrong ones, the hardest first."""

    query: Item
    target: Item
    wrong: tuple[Item, ...]


@dataclass
class Pool:
    """The concepts that examples are made of, and the drawings they may show.

    Attributes:
        concepts: of one split.
        vendors: whose drawings are shown.
        subgroups: group -> names of its subgroups, over all splits: the answers of the classification task.
        rng: all choices are drawn from it, so that a pool made alike gives the same examples.
        collages: filled by the builders: path of an image to make -> the 2 or 4 drawings on it.
        prefix: of the collages' file names.
        num_wrong: wrong answers an example, at most.
    """

    concepts: Sequence[Concept]
    vendors: Sequence[str]
    subgroups: dict[str, list[str]]
    rng: random.Random
    prefix: str
    collages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    num_wrong: int = 19

    def __post_init__(self) -> None:
        self.pairs = minimal_pairs(self.concepts)
        self.near: dict[str, list[Concept]] = defaultdict(list)
        for concept in self.concepts:
            self.near[concept.subgroup].append(concept)

    def rivals(self, concept: Concept) -> list[Concept]:
        """Other concepts of the pool: labels one word apart first, then the same subgroup, then any."""
        tiers = (
            [pair.other for pair in self.pairs.get(concept.code, [])],
            self.near[concept.subgroup],
            self.rng.sample(self.concepts, min(len(self.concepts), self.num_wrong + 1)),
        )
        found: dict[str, Concept] = {}
        for tier in tiers:
            for other in self.rng.sample(tier, len(tier)):
                if other.code != concept.code:
                    found.setdefault(other.code, other)
        return list(found.values())[: self.num_wrong]

    def shown(self) -> Iterator[tuple[Concept, str]]:
        """Every concept with every vendor's drawing of it."""
        for concept in self.concepts:
            for vendor in self.vendors:
                yield concept, vendor

    def collage(self, drawings: Sequence[str]) -> str:
        """Order an image that shows 2 drawings side by side or 4 in its corners; returns its path."""
        path = f"collage/{self.prefix}-{len(self.collages):05d}.png"
        self.collages[path] = tuple(drawings)
        return path


def drawing(image: str) -> Item:
    """An image as a target."""
    return Item(TARGET_IMAGE, image)


def classification(pool: Pool) -> Iterator[Example]:
    """Image -> the name of its subcategory, among all of them."""
    for concept, vendor in pool.shown():
        siblings = [name for name in pool.subgroups[concept.group] if name != concept.subgroup]
        others = [name for group, names in pool.subgroups.items() if group != concept.group for name in names]
        wrong = pool.rng.sample(siblings, len(siblings)) + pool.rng.sample(others, len(others))
        query = Item(f"{IMAGE}\nName the kind of thing that is drawn.", concept.image(vendor))
        yield Example(query, Item(concept.subgroup), tuple(Item(name) for name in wrong))


def question_answering(pool: Pool) -> Iterator[Example]:
    """Image and question -> answer: category, skin tone, who is shown, colour."""
    groups = tuple(pool.subgroups)
    colours = tuple(sorted(COLOURS))
    people = tuple(dict.fromkeys(GENDER_ANSWERS.values()))
    for concept, vendor in pool.shown():
        image = concept.image(vendor)
        yield _asked(pool, image, "Which category does it belong to?", concept.group, groups)
        if concept.has_tones:
            tone = pool.rng.randrange(1, len(TONES))
            yield _asked(pool, concept.image(vendor, tone), "Which skin tone is shown?", TONES[tone], TONES[1:])
        who = [GENDER_ANSWERS[word] for word in concept.words if word in GENDER_ANSWERS]
        if concept.group == "people & body" and len(who) == 1:
            yield _asked(pool, image, "Who is shown?", who[0], people)
        colour = [word for word in concept.words if word in COLOURS]
        if concept.subgroup in COLOURED and len(colour) == 1:
            yield _asked(pool, image, "What colour is it?", colour[0], colours)


def _asked(pool: Pool, image: str, question: str, answer: str, answers: Sequence[str]) -> Example:
    wrong = [Item(other) for other in pool.rng.sample(answers, len(answers)) if other != answer]
    return Example(Item(f"{IMAGE}\nLook at the drawing and answer: {question}", image), Item(answer), tuple(wrong))


def text_to_image(pool: Pool) -> Iterator[Example]:
    """Label, keywords or label with skin tone -> drawing."""
    for concept, vendor in pool.shown():
        wrong = tuple(drawing(other.image(vendor)) for other in pool.rivals(concept))
        find = "Find the drawing that shows this: "
        yield Example(Item(find + concept.label), drawing(concept.image(vendor)), wrong)
        tags = [tag for tag in concept.tags if tag not in concept.words]
        if len(tags) >= 3:
            chosen = pool.rng.sample(tags, min(4, len(tags)))
            unfit = [other for other in pool.rivals(concept) if not {*chosen} <= {*other.tags, *other.words}]
            query = Item(f"Find the drawing that fits these keywords: {', '.join(chosen)}")
            wrongs = tuple(drawing(other.image(vendor)) for other in unfit)
            yield Example(query, drawing(concept.image(vendor)), wrongs)
        if concept.has_tones:
            tone, *others = pool.rng.sample(range(1, len(TONES)), len(TONES) - 1)
            variants = tuple(drawing(concept.image(vendor, other)) for other in others)
            rivals = tuple(drawing(r.image(vendor, tone)) for r in pool.rivals(concept) if r.has_tones)
            wrongs = (variants + rivals)[: pool.num_wrong]
            yield Example(Item(find + concept.name(tone)), drawing(concept.image(vendor, tone)), wrongs)


def image_to_text(pool: Pool) -> Iterator[Example]:
    """Drawing -> label, with its skin tone where one is shown."""
    query = f"{IMAGE}\nFind the text that describes this drawing."
    for concept, vendor in pool.shown():
        wrong = tuple(Item(other.label) for other in pool.rivals(concept))
        yield Example(Item(query, concept.image(vendor)), Item(concept.label), wrong)
        if concept.has_tones:
            tone, *others = pool.rng.sample(range(1, len(TONES)), len(TONES) - 1)
            variants = tuple(Item(concept.name(other)) for other in others)
            rivals = tuple(Item(rival.name(tone)) for rival in pool.rivals(concept))
            wrongs = (variants + rivals)[: pool.num_wrong]
            yield Example(Item(query, concept.image(vendor, tone)), Item(concept.name(tone)), wrongs)


def captions(pool: Pool) -> Iterator[Example]:
    """Bare image -> bare label, with its skin tone where one is shown; two drawings side by side -> where each is."""
    for concept, vendor in pool.shown():
        wrong = tuple(Item(other.label) for other in pool.rivals(concept))
        yield Example(Item(IMAGE, concept.image(vendor)), Item(concept.label), wrong)
        if concept.has_tones:
            tone, *others = pool.rng.sample(range(1, len(TONES)), len(TONES) - 1)
            wrong = tuple(Item(concept.name(other)) for other in others)
            yield Example(Item(IMAGE, concept.image(vendor, tone)), Item(concept.name(tone)), wrong)
    for image, left, right in side_by_side(pool, len(pool.concepts) // 3):
        yield Example(Item(IMAGE, image), Item(side_by_side_text(left, right)), (Item(side_by_side_text(right, left)),))


def side_by_side(pool: Pool, count: int) -> Iterator[tuple[str, Concept, Concept]]:
    """Yield collages of two concepts: path of the image, the one on the left, the one on the right."""
    for _ in range(count):
        left, right = pool.rng.sample(pool.concepts, 2)
        vendor = pool.rng.choice(pool.vendors)
        yield pool.collage([left.image(vendor), right.image(vendor)]), left, right


def side_by_side_text(left: Concept, right: Concept) -> str:
    """The caption of such a collage."""
    return f"{left.label} on the left, {right.label} on the right"


def composed_retrieval(pool: Pool) -> Iterator[Example]:
    """Image and change -> image: another skin tone, another gender, another colour, another artist's style."""
    for concept, vendor in pool.shown():
        yield _restyled(pool, concept, vendor)
        if concept.has_tones:
            before, after, *others = pool.rng.sample(range(len(TONES)), len(TONES))
            after, before = (after, before) if after else (before, after)  # the target always has a tone
            wrong = [concept.image(vendor, before), *(concept.image(vendor, other) for other in others)]
            wrong += [rival.image(vendor, after) for rival in pool.rivals(concept) if rival.has_tones]
            change = f"the same with {TONES[after]}"
            yield _changed(concept.image(vendor, before), change, concept.image(vendor, after), wrong, pool)
        for pair in pool.pairs.get(concept.code, []):
            if pair.kind == "gender" or (pair.kind == "colour" and concept.subgroup in COLOURED):
                new = pair.other_word if pair.kind == "colour" else GENDER_ANSWERS[pair.other_word]
                change = f"the same in {new}" if pair.kind == "colour" else f"the same, but showing {new}"
                wrong = [concept.image(vendor)]
                wrong += [r.image(vendor) for r in pool.rivals(pair.other) if r.code != concept.code]
                yield _changed(concept.image(vendor), change, pair.other.image(vendor), wrong, pool)


def _restyled(pool: Pool, concept: Concept, vendor: str) -> Example:
    """From one artist's drawing to another's; the held-out vendor's goes to a trained vendor's."""
    others = [other for other in pool.vendors if other != vendor] or ["google"]
    style = pool.rng.choice(others)
    wrong = [concept.image(vendor), *(rival.image(style) for rival in pool.rivals(concept))]
    return _changed(concept.image(vendor), "the same by another artist", concept.image(style), wrong, pool)


def _changed(image: str, change: str, target: str, wrong: Iterable[str], pool: Pool) -> Example:
    query = Item(f"{IMAGE}\nFind this drawing changed: {change}.", image)
    return Example(query, drawing(target), tuple(drawing(path) for path in wrong)[: pool.num_wrong])


def grounding(pool: Pool) -> Iterator[Example]:
    """Four drawings in one image, and a corner -> the drawing in that corner."""
    for _ in range(len(pool.concepts) // 2):
        shown = pool.rng.sample(pool.concepts, len(CORNERS))
        vendor = pool.rng.choice(pool.vendors)
        image = pool.collage([concept.image(vendor) for concept in shown])
        for place in pool.rng.sample(range(len(CORNERS)), 2):
            wrong = [other.image(vendor) for other in shown if other is not shown[place]]
            codes = {other.code for other in shown}
            wrong += [rival.image(vendor) for rival in pool.rivals(shown[place]) if rival.code not in codes]
            query = Item(f"{IMAGE}\nFind the drawing in the {CORNERS[place]} corner.", image)
            target = drawing(shown[place].image(vendor))
            yield Example(query, target, tuple(drawing(path) for path in wrong)[: pool.num_wrong])


TASKS: dict[str, Callable[[Pool], Iterator[Example]]] = {
    "EmojiClassification": classification,
    "EmojiVQA": question_answering,
    "Emoji_t2i": text_to_image,
    "Emoji_i2t": image_to_text,
    "EmojiCIR": composed_retrieval,
    "EmojiGrounding": grounding,
}
TRAIN_ONLY_TASKS: dict[str, Callable[[Pool], Iterator[Example]]] = {"EmojiCaption": captions}
META_TASKS = {
    "EmojiClassification": "Classification",
    "EmojiVQA": "VQA",
    "Emoji_t2i": "Retrieval",
    "Emoji_i2t": "Retrieval",
    "EmojiCIR": "Retrieval",
    "EmojiGrounding": "Grounding",
}
DRAWINGS = {"trained": TRAINED_VENDORS, "heldout": (HELD_OUT_VENDOR,)}
