import random

import pytest

from emoji.concepts import load_concepts, minimal_pairs
from emoji.swaps import attribute_swaps
from emoji.tasks import TASKS, TRAIN_ONLY_TASKS, Pool


@pytest.fixture
def pool(fake):
    return make_pool(fake)


def make_pool(fake, vendors=("google", "twitter"), seed=0):
    concepts = load_concepts(fake)
    subgroups = {}
    for concept in concepts:
        subgroups.setdefault(concept.group, {})[concept.subgroup] = None
    names = {group: list(found) for group, found in subgroups.items()}
    return Pool(concepts, vendors, names, random.Random(seed), "toy")


@pytest.mark.parametrize("name", [*TASKS, *TRAIN_ONLY_TASKS])
def test_examples_are_sound(fake, pool, name):
    task = (TASKS | TRAIN_ONLY_TASKS)[name]
    examples = list(task(pool))
    assert len(examples) > 20
    for example in examples:
        assert example.wrong
        assert example.target not in example.wrong
        assert len(set(example.wrong)) == len(example.wrong)
        for item in (example.query, example.target, *example.wrong):
            assert item.text
            assert ("<|image_1|>" in item.text) == bool(item.image)
            assert "fluent" not in item.image
    assert examples == list(task(make_pool(fake)))  # all choices come from the seed
    assert name == "EmojiClassification" or all(len(example.wrong) <= 19 for example in examples)


def test_the_hardest_wrong_answers_come_first(pool):
    for example in TASKS["Emoji_i2t"](pool):
        if example.target.text == "red heart":
            first = {item.text for item in example.wrong[:14]}
            assert all(text.split()[0] == "red" or text.split()[-1] == "heart" for text in first)


def test_plain_labels_are_not_shown_beside_tones(pool):
    for example in TASKS["Emoji_i2t"](pool):
        has_tone = {"skin tone" in item.text for item in (example.target, *example.wrong)}
        assert len(has_tone) == 1


def test_keywords_fit_only_the_target(pool):
    by_image = {concept.image(vendor): concept for concept, vendor in pool.shown()}
    checked = 0
    for example in TASKS["Emoji_t2i"](pool):
        if "keywords" in example.query.text:
            asked = set(example.query.text.split(": ")[1].split(", "))
            for item in example.wrong:
                concept = by_image[item.image]
                assert not asked <= {*concept.tags, *concept.words}
            checked += 1
    assert checked


def test_composed_queries_show_what_they_ask_for(pool):
    kinds = {"tone": 0, "colour": 0, "gender": 0, "style": 0}
    for example in TASKS["EmojiCIR"](pool):
        change = example.query.text.split("changed: ")[1]
        assert example.query.image in {item.image for item in example.wrong}  # the drawing unchanged is wrong
        if "skin tone" in change:
            kinds["tone"] += 1
            assert "-tone" in example.target.image
        elif "the same in" in change:
            kinds["colour"] += 1
        elif "showing" in change:
            kinds["gender"] += 1
        else:
            kinds["style"] += 1
            assert example.query.image.split("/")[0] != example.target.image.split("/")[0]
            assert example.query.image.split("/")[1] == example.target.image.split("/")[1]
    assert all(kinds.values())


def test_grounding_asks_for_a_corner_of_its_collage(pool):
    corners = ("top left", "top right", "bottom left", "bottom right")
    for example in TASKS["EmojiGrounding"](pool):
        place = next(index for index, corner in enumerate(corners) if f"the {corner} corner" in example.query.text)
        assert pool.collages[example.query.image][place] == example.target.image


def test_swaps_differ_from_the_caption(pool):
    sets = attribute_swaps(pool, minimal_pairs(pool.concepts))
    assert set(sets) == {"replace_att", "replace_obj", "swap_obj", "add_obj"}
    labels = {concept.image(vendor): concept.label for concept, vendor in pool.shown()}
    for name, rows in sets.items():
        assert rows
        for row in rows:
            assert row["caption"] != row["negative_caption"]
            if row["kind"] in {"colour", "object", "gender", "addition"}:
                assert labels[row["filename"]] == row["caption"]
            if name.startswith("replace") and row["kind"] != "skin tone":
                pairs = zip(row["caption"].split(), row["negative_caption"].split(), strict=True)
                assert sum(left != right for left, right in pairs) == 1
    assert {row["kind"] for row in sets["replace_att"]} >= {"colour", "skin tone"}
    assert all("person" not in row["negative_caption"] for row in sets["replace_obj"] if row["kind"] == "gender")
    assert all(row["negative_caption"].startswith(row["caption"] + " and ") for row in sets["add_obj"])
