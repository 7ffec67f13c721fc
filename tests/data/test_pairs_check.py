"""A set of pairs is checked as a whole, against counts made by hand, and split by content."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from tiny import picture, tiny_encoder
from unime_st.data import ItemReader, PairsReport, check_pairs, load_pairs, split_pairs, with_images
from unime_st.data.pairs.walk import each_cell, each_row
from unime_st.samplers import FalseNegativeAwareBatchSampler


@pytest.fixture
def forty(tmp_path):
    """Forty pairs: three images are bad, two are copies of one, a caption recurs, a row recurs, a cell is empty."""
    lines = ["caption,image"]
    for number in range(40):
        picture((number, 200, 9), (30 + number, 30)).save(tmp_path / f"{number}.png")
        lines.append(f"caption {number},{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "7.png").unlink()
    (tmp_path / "11.png").write_bytes((tmp_path / "12.png").read_bytes()[:70])
    shutil.copy(tmp_path / "20.png", tmp_path / "21.png")
    lines[1 + 31] = "caption 30,31.png"
    lines[1 + 36] = lines[1 + 35]
    lines[1 + 38] = ",38.png"
    path = tmp_path / "forty.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_everything_is_counted_at_once(forty):
    report = check_pairs(load_pairs(forty), batch_size=8, num_train_epochs=1.5)
    assert isinstance(report, PairsReport)
    assert (report.name, report.rows) == ("forty.csv", 40)
    assert report.kinds == {"anchor": {"text": 39, "empty": 1}, "positive": {"image": 40}}
    assert [(found.row, found.place, found.column) for found in report.bad_images] == [
        (row, f"forty.csv, line {row + 2}", "positive") for row in (3, 7, 11)
    ]
    assert [found.what.partition(":")[0] for found in report.bad_images] == ["3.png", "7.png", "11.png"]
    assert "There is no image" in report.bad_images[1].what
    assert [(found.row, found.place) for found in report.empty_cells] == [(38, "forty.csv, line 40")]
    assert report.bad_rows == (3, 7, 11, 38)
    assert (report.duplicates.rows, report.duplicates.pairs) == (2, 1)
    assert report.duplicates.examples == (("forty.csv, line 37", "forty.csv, line 38"),)
    assert (report.equal_queries.rows, report.equal_queries.contents) == (2, 1)  # the duplicate counts as one row
    assert report.equal_targets.examples == (("forty.csv, line 22", "forty.csv, line 23"),)  # copies of a file
    assert report.plan == {"batch_size": 8, "epochs": 1.5, "steps": 8}
    first, second = report.problems
    assert first.startswith("3 images in 3 of 40 rows cannot be read: forty.csv, line 5, line 9, line 13. Mend them")
    assert second.startswith("1 of 40 rows have a side with nothing on it: forty.csv, line 40. Fill them in")
    with pytest.raises(ValueError, match=r"(?s)forty.csv is not fit for training.*3 images.*1 of 40"):
        report.raise_for_problems()


def test_it_prints_and_becomes_json(forty):
    report = check_pairs(load_pairs(forty))
    told = json.loads(report.to_json())
    assert told["rows"] == 40
    assert told["problems"] == report.problems
    assert told["bad_images"][1]["place"] == "forty.csv, line 9"
    assert json.loads(json.dumps(report.to_dict())) == told
    printed = str(report)
    for part in (
        "forty.csv: 40 pairs",
        "caption asks for image",
        "line 9, column 'positive': 7.png",
        "PROBLEM: 3 images",
    ):
        assert part in printed


def test_dropping_makes_it_fit(forty):
    report = check_pairs(load_pairs(forty, bad_images="drop", empty_cells="drop"))
    assert (report.rows, report.problems) == (36, [])
    report.raise_for_problems()
    assert "No problem found." in str(report)
    assert report.equal_targets.examples == (("forty.csv, line 22", "forty.csv, line 23"),)


def test_without_opening_only_missing_files_are_found(forty):
    report = check_pairs(load_pairs(forty), open_images=False)
    assert [found.row for found in report.bad_images] == [7]


def test_rows_that_moved_are_not_told_by_another_line(forty):
    shuffled = load_pairs(forty).shuffle(seed=1)
    report = check_pairs(shuffled)
    stored = shuffled.with_format(None)
    assert {stored[found.row]["positive"]["image"] for found in report.bad_images} == {"3.png", "7.png", "11.png"}
    assert all(found.place == f"row {found.row}" for found in report.bad_images)


def test_tokens_are_the_models(forty, tmp_path):
    model = tiny_encoder("qwen2_vl", tmp_path / "model")
    pairs = load_pairs(forty, bad_images="drop", empty_cells="drop")
    report = check_pairs(pairs, model, batch_size=4)
    for column in ("anchor", "positive"):
        counts = model.preprocess([row[column] for row in pairs])["attention_mask"].sum(dim=1).numpy()
        found = report.tokens[column]
        assert found["max"] == pytest.approx(counts.max(), abs=6)  # images differ in size
        assert found["p50"] == pytest.approx(np.median(counts), abs=6)
        assert found["over"] == 0
    assert report.tokens["anchor"]["max"] == model.preprocess([{"text": "caption 10"}])["attention_mask"].sum()
    assert report.plan["tokens_a_step"] > 4 * 100
    alone = check_pairs(pairs, tmp_path / "model", max_seq_length=9)  # the tokenizer: texts alone
    assert alone.tokens["anchor"] == {"p50": 10.0, "p95": 10.0, "max": 10.0, "over": 28}
    assert alone.tokens["positive"]["max"] == 0


def test_texts_alone_and_other_data_sets(forty):
    rows = Dataset.from_dict({"q": ["a", "a", "b", "c"], "t": ["x", "x", "x", "c"]})
    report = check_pairs(rows)
    assert (report.duplicates.pairs, report.equal_queries.pairs, report.equal_targets.pairs) == (1, 0, 1)
    assert report.own_targets == ("row 3",)
    same = check_pairs(Dataset.from_dict({"q": ["a", "b"], "t": ["x", "x"]}))
    assert same.problems == ["All 2 rows have one target, so there is nothing to tell apart. Is it the right column?"]
    assert "at least two are needed" in check_pairs(rows.select([0])).problems[0]
    images = Dataset.from_dict({"q": ["a", "b"], "image": ["0.png", "7.png"]})
    found = check_pairs(with_images(images, image_root=forty.parent, image_columns=["image"])).bad_images
    assert [(one.row, one.column) for one in found] == [(1, "image")]
    with pytest.raises(TypeError, match="The rows have a transform of type function"):
        check_pairs(rows.with_transform(lambda batch: batch))


@pytest.mark.parametrize("seed", range(5))
def test_no_content_is_on_both_sides_of_a_split(seed):
    draw = np.random.default_rng(seed)
    rows = Dataset.from_dict({
        "query": [f"q{number}" for number in draw.integers(0, 150, 200)],
        "target": [f"t{number}" for number in draw.integers(0, 150, 200)],
    })  # fmt: skip
    rows = rows.select(range(100))
    train, held = split_pairs(rows, 0.2, seed=seed)
    assert len(train) + len(held) == 100
    assert 10 <= len(held) <= 20
    for column in ("query", "target"):
        assert not set(train[column]) & set(held[column])
    shared = [len(set(rows[column])) for column in ("query", "target")]
    assert max(shared) < 100  # else there is nothing to keep together
    again = split_pairs(rows, 0.2, seed=seed)[1]
    assert again.to_dict() == held.to_dict()


def test_a_split_knows_copies_of_images_and_labels(forty):
    pairs = load_pairs(forty, bad_images="drop", empty_cells="drop")
    for seed in range(10):
        parts = [
            {row["positive"]["image"] for row in part.with_format(None)} for part in split_pairs(pairs, 0.4, seed=seed)
        ]
        assert [name for part in parts for name in part if name in ("20.png", "21.png")] != []
        assert len([part for part in parts if part & {"20.png", "21.png"}]) == 1
        assert sum(map(len, parts)) == 35
    rows = Dataset.from_dict({"query": ["a", "b", "c", "d"], "target": ["w", "x", "y", "z"], "label": [1, 2, 1, 2]})
    parts = split_pairs(rows, 0.5)
    assert [len(set(part["label"])) for part in parts] == [1, 1]


def test_a_split_that_cannot_be(forty):
    rows = Dataset.from_dict({"query": ["a", "b", "a"], "target": ["x", "x", "y"]})
    with pytest.raises(ValueError, match=r"the 3 rows form 1 groups .*of up to 3 rows, and 1 rows are to be held out"):
        split_pairs(rows, 0.3)
    with pytest.raises(ValueError, match="`held_out=1`, but it is a share of the rows"):
        split_pairs(rows, 1)


def test_nothing_is_no_content_and_texts_are_no_images(monkeypatch):
    monkeypatch.setattr(ItemReader, "check", lambda *_, **__: pytest.fail("a text was opened"))
    rows = Dataset.from_dict({"query": ["", "", None, "b"], "target": ["x", "y", "z", "w"]})
    for pairs in (rows, load_pairs(rows)):
        report = check_pairs(pairs)
        assert report.equal_queries.rows == 0
        assert report.bad_rows == (0, 1, 2)


def test_rows_are_walked_in_order_and_whole():
    rows = Dataset.from_dict({"a": [str(row) for row in range(1001)], "b": list(range(1001))})
    assert list(each_row(rows)) == list(rows)
    assert list(each_cell(rows, "a")) == rows["a"][:]


def test_rows_that_share_contents_are_those_the_sampler_keeps_apart():
    draw = np.random.default_rng(0)
    queries, targets = ([f"{kind}{n}" for n in draw.integers(0, 30, 60)] for kind in "qt")
    report = check_pairs(Dataset.from_dict({"query": queries, "target": targets}))
    copies = [count for count in Counter(zip(queries, targets, strict=True)).values() if count > 1]
    assert (report.duplicates.contents, report.duplicates.rows) == (len(copies), sum(copies))
    assert copies  # else there is nothing to count once
    once = list(dict.fromkeys(zip(queries, targets, strict=True)))
    rows = Dataset.from_dict({"query": [query for query, _ in once], "target": [target for _, target in once]})
    keys = FalseNegativeAwareBatchSampler(rows, batch_size=2, drop_last=False).conflicts.keys
    found = [report.equal_queries.rows, report.equal_targets.rows]
    assert found == (keys >= 0).sum(axis=0).tolist()
    assert min(found) > 0
