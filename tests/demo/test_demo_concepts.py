import pytest

from emoji.concepts import SPLITS, VENDORS, Concept, load_concepts, minimal_pairs, split_concepts


def test_flags_and_families_are_left_out_and_tones_kept(fake):
    concepts = load_concepts(fake)
    assert len(concepts) == 96
    assert not any("flag" in concept.label or "family" in concept.label for concept in concepts)
    assert sum(concept.has_tones for concept in concepts) == 18
    assert all(set(concept.sources) == set(VENDORS) for concept in concepts)


def test_a_drawing_used_twice_is_left_out(fake, tmp_path):
    from fake_packages import make_fake_packages

    own = make_fake_packages(tmp_path)
    first, second, *_ = load_concepts(own)
    second.sources["fluent"][0].write_bytes(first.sources["fluent"][0].read_bytes())
    assert [c.code for c in load_concepts(own)] == [c.code for c in load_concepts(fake) if c.code != second.code]


def test_no_role_is_in_two_splits(fake):
    concepts = load_concepts(fake)
    for seed in range(5):
        splits = split_concepts(concepts, seed=seed)
        assert sorted(c.code for split in SPLITS for c in splits[split]) == sorted(c.code for c in concepts)
        assert 60 <= len(splits["train"]) <= 72
        assert len(splits["test"]) >= 14
        jobs = [{c.label.split()[-1] for c in splits[split] if c.group == "people & body"} for split in SPLITS]
        assert len(set.union(*jobs)) == sum(map(len, jobs)) == 6
    assert split_concepts(concepts, seed=0) != split_concepts(concepts, seed=1)


def test_labels_that_differ_in_gender_are_one_role():
    def concept(code, label):
        return Concept(code, label, (), "people & body", "person", code, {})

    dancers = [concept("1F57A", "man dancing"), concept("1F483", "woman dancing")]
    others = [concept(f"{number:04X}", f"thing {number}") for number in range(40)]
    for seed in range(10):
        splits = split_concepts(dancers + others, seed=seed)
        assert sum(any(c in dancers for c in splits[split]) for split in SPLITS) == 1


@pytest.mark.parametrize(
    ("one", "two", "kind"),
    [
        ("red heart", "blue heart", "colour"),
        ("thumbs up", "thumbs down", "direction"),
        ("man running", "woman running", "gender"),
        ("keycap: 1", "keycap: 10", "number"),
        ("large diamond", "small diamond", "size"),
        ("wine glass", "wine bottle", "object"),
        ("birthday cake", "moon cake", "other"),
    ],
)
def test_kinds_of_minimal_pairs(one, two, kind):
    concepts = [Concept(str(i), label, (), "g", "s", str(i), {}) for i, label in enumerate((one, two))]
    (pair,) = minimal_pairs(concepts)["0"]
    assert (pair.other.label, pair.kind) == (two, kind)


def test_two_words_apart_is_no_minimal_pair():
    concepts = [Concept(str(i), label, (), "g", "s", str(i), {}) for i, label in enumerate(("red apple", "green pear"))]
    assert minimal_pairs(concepts) == {}


@pytest.mark.slow
def test_real_concepts(fetched):
    concepts = load_concepts(fetched)
    splits = split_concepts(concepts)
    assert {split: len(members) for split, members in splits.items()} == {"train": 1103, "validation": 157, "test": 315}
    assert len({concept.label for concept in concepts}) == len(concepts)
    assert len({concept.subgroup for concept in concepts}) == 95
