"""Attribute swaps in the manner of SugarCrepe: an image, its caption, and one that is wrong by a word or a place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from emoji.concepts import GENDERS, TONES, Concept, MinimalPair
from emoji.tasks import Pool, side_by_side, side_by_side_text

SET_OF_KIND = {
    "colour": "replace_att",
    "size": "replace_att",
    "number": "replace_att",
    "other": "replace_att",
    "direction": "replace_att",
    "gender": "replace_obj",
    "object": "replace_obj",
}
NEUTRAL = GENDERS & {"person", "people"}  # a neutral drawing is not wrong enough beside a gendered caption
MOST_PER_KIND = 2  # wrong captions of one kind for one drawing

Row = dict[str, str]


def attribute_swaps(pool: Pool, pairs: dict[str, list[MinimalPair]]) -> dict[str, list[Row]]:
    """Make the swap sets of a pool.

    Args:
        pool: whose drawings are shown; each row draws its vendor from it.
        pairs: minimal pairs over *all* concepts: the wrong caption may be any concept's, the image is the pool's.

    Returns:
        Name of the set -> rows with `filename`, `caption`, `negative_caption` and `kind`.
    """
    sets: dict[str, list[Row]] = {"replace_att": [], "replace_obj": [], "swap_obj": [], "add_obj": []}
    for concept in pool.concepts:
        for pair in _chosen(pool, pairs.get(concept.code, [])):
            image = concept.image(pool.rng.choice(pool.vendors))
            sets[SET_OF_KIND[pair.kind]].append(_row(image, concept.label, pair.other.label, pair.kind))
        if concept.has_tones:
            tone = pool.rng.randrange(1, len(TONES))
            wrong_tone = pool.rng.choice([other for other in range(1, len(TONES)) if abs(other - tone) > 1])
            image = concept.image(pool.rng.choice(pool.vendors), tone)
            sets["replace_att"].append(_row(image, concept.name(tone), concept.name(wrong_tone), "skin tone"))
    for image, left, right in side_by_side(pool, len(pool.concepts) // 2):
        caption, wrong = side_by_side_text(left, right), side_by_side_text(right, left)
        sets["swap_obj"].append(_row(image, caption, wrong, "place"))
    for concept, other in islice(_strangers(pool), len(pool.concepts) // 2):
        image = concept.image(pool.rng.choice(pool.vendors))
        sets["add_obj"].append(_row(image, concept.label, f"{concept.label} and {other.label}", "addition"))
    return sets


def _row(image: str, caption: str, negative: str, kind: str) -> Row:
    return {"filename": image, "caption": caption, "negative_caption": negative, "kind": kind}


def _chosen(pool: Pool, pairs: list[MinimalPair]) -> Iterator[MinimalPair]:
    taken = dict.fromkeys(SET_OF_KIND, 0)
    for pair in pool.rng.sample(pairs, len(pairs)):
        if pair.kind == "gender" and {pair.word, pair.other_word} & NEUTRAL:
            continue
        if pair.kind == "direction" and (
            pair.word.startswith(pair.other_word) or pair.other_word.startswith(pair.word)
        ):
            continue  # "up" and "upwards" say the same
        if taken[pair.kind] < MOST_PER_KIND:
            taken[pair.kind] += 1
            yield pair


def _strangers(pool: Pool) -> Iterator[tuple[Concept, Concept]]:
    while True:
        concept, other = pool.rng.sample(pool.concepts, 2)
        if concept.subgroup != other.subgroup:
            yield concept, other
