"""Judging mined negatives: the choice against plain Python, what is judged, what is refused, and kills."""

import hashlib
import random
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder

from killing import note, notes, run_with_kills
from tiny import picture, tiny_backbone
from two_processes import run_two
from unime_st.columns import without_subset
from unime_st.data import ItemReader, judge_negatives, judged_json_rows, load_judged_negatives
from unime_st.data.judging.choose import chosen_negatives
from unime_st.modules import ListwiseReranker, build_reranker

POOL = 12


def pool(rows=30, seed=0, candidates=POOL):
    """Rows whose queries, positives and candidates recur."""
    rng = random.Random(seed)
    table = {"anchor": [f"q{rng.randrange(rows * 2 // 3)}" for _ in range(rows)]}
    table["positive"] = [f"d{rng.randrange(40)}" for _ in range(rows)]
    for k in range(candidates):
        table[f"negative_{k + 1}"] = [f"d{rng.randrange(40)}" for _ in range(rows)]
    return Dataset.from_dict(table)


def score(query, candidate):
    return int.from_bytes(hashlib.sha256(f"{query}|{candidate}".encode()).digest()[:4], "big") / 2**32


class Hashed:
    """A judge of texts whose scores depend on the pair alone; it remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def predict(self, inputs, *, batch_size, show_progress_bar):
        self.asked += inputs
        return np.array([score(*pair) for pair in inputs])


def expected_row(row, margin, stride, number):
    """The rule in plain Python."""
    best = np.float32(score(row["anchor"], row["positive"]))
    candidates, seen = [], {row["positive"]}
    for k in range(POOL):
        text = row[f"negative_{k + 1}"]
        if text not in seen:
            seen.add(text)
            candidates.append(text)
    valid = [text for text in candidates if float(np.float32(score(row["anchor"], text))) <= float(best) - margin]
    taken = []
    for start in range(stride):
        taken += valid[start::stride]
    return taken[:number]


@pytest.mark.parametrize(
    ("number", "margin", "stride", "too_few"), [(4, 0.01, 5, "keep"), (3, -0.1, 2, "drop"), (10, 0.3, 1, "keep")]
)
def test_the_rule_equals_plain_python(tmp_path, number, margin, stride, too_few):
    rows = pool()
    options = {"num_negatives": number, "margin": margin, "stride": stride, "too_few": too_few, "rows_per_file": 4}
    judge = Hashed()
    folder = judge_negatives(rows, judge, tmp_path / "judged", judge_name="hash", show_progress_bar=False, **options)
    found = load_judged_negatives(folder)
    assert len(judge.asked) == len(set(judge.asked)), "a pair was judged twice"
    distinct = {(row["anchor"], row[name]) for row in rows for name in rows.column_names[1:]}
    assert set(judge.asked) == distinct
    groups = list(dict.fromkeys(rows["anchor"]))
    wanted = sorted(range(len(rows)), key=lambda at: groups.index(rows[at]["anchor"]))
    expected = [(rows[at], expected_row(rows[at], margin, stride, number)) for at in wanted]
    least = 1 if too_few == "keep" else number
    kept = [(row, taken) for row, taken in expected if len(taken) >= least]
    assert 0 < len(kept) < len(rows) or too_few == "keep"
    assert len(found) == len(kept)
    assert any(len(taken) < number for _, taken in expected), "no row was short"
    for row, (source, taken) in zip(found, kept, strict=True):
        assert (row["anchor"], row["positive"]) == (source["anchor"], source["positive"])
        cells = [row[f"negative_{k + 1}"] for k in range(number)]
        assert cells == [*taken, *[row["positive"]] * (number - len(taken))]  # the place of none holds the positive
        scores = [score(row["anchor"], text) for text in (row["positive"], *taken)]
        np.testing.assert_allclose(row["label"], [*scores, *[-1.0] * (number - len(taken))], atol=1e-6)


def test_random_choices_follow_the_rule():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores, positive = rng.random(rng.integers(0, 60)), rng.random()
        stride, number = int(rng.integers(1, 8)), int(rng.integers(1, 12))
        taken = chosen_negatives(scores, positive, margin=0.01, stride=stride, num_negatives=number)
        valid = [place for place in range(len(scores)) if scores[place] <= positive - 0.01]
        assert len(taken) == len(set(taken)) == min(number, len(valid))
        assert set(taken) <= set(valid)
        assert taken == [place for start in range(stride) for place in valid[start::stride]][:number]
    assert chosen_negatives(np.array([np.nan, 0.1]), 0.5, margin=0.01, stride=5, num_negatives=2) == [1]


def test_what_is_too_few_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    judge_negatives(pool(), Hashed(), tmp_path, num_negatives=10, judge_name="hash", show_progress_bar=False)
    (told,) = [record.getMessage() for record in caplog.records if "with fewer than asked for" in record.getMessage()]
    labels = np.array(load_judged_negatives(tmp_path)["label"])
    short = int(((labels == -1).any(axis=1)).sum())
    assert short > 0
    assert f"{short} of them with fewer than asked for" in told
    assert f"negatives for {len(labels)} of 30 rows" in told


def test_fewer_negatives_are_read_than_kept(tmp_path):
    judge_negatives(pool(), Hashed(), tmp_path, num_negatives=6, judge_name="hash", show_progress_bar=False)
    whole, cut = load_judged_negatives(tmp_path), load_judged_negatives(tmp_path, num_negatives=4)
    assert cut.column_names == ["anchor", "positive", *(f"negative_{k}" for k in range(1, 5)), "label"]
    np.testing.assert_array_equal(np.array(cut["label"]), np.array(whole["label"])[:, :5])
    with pytest.raises(ValueError, match="`num_negatives=7`, but 6 were kept"):
        load_judged_negatives(tmp_path, num_negatives=7)


# --- a multimodal judge -----------------------------------------------------------------------------------------------


def pictures(folder, rows=12):
    """Image + text queries, their positives and candidates of texts and images, in files."""
    folder.mkdir(exist_ok=True)
    for name in ("red", "green", "white", "black"):
        picture(name).save(folder / f"{name}.png")
    colors = ["red.png", "green.png", "white.png", "black.png"]
    rng = random.Random(1)

    def cell():
        kind = rng.randrange(3)
        return {"image": rng.choice(colors) if kind else None, "text": f"item {rng.randrange(9)}" if kind < 2 else None}

    table = {"anchor": [{"image": rng.choice(colors), "text": f"what {n % 7}?"} for n in range(rows)]}
    table |= {name: [cell() for _ in range(rows)] for name in ("positive", *(f"negative_{k}" for k in range(1, 7)))}
    return Dataset.from_dict(table).with_transform(ItemReader(folder))


def judged_by_model(folder, work=None, **options):
    torch.set_num_threads(1)
    source = Path(work or folder)
    judge = build_reranker(source / "backbone", device="cpu")
    plain = judge.predict

    def predict(pairs, **given):
        note(folder, ["part"])
        return plain(pairs, **given)

    judge.predict = predict
    options = {"num_negatives": 3, "margin": -1.0, "stride": 2, "rows_per_file": 1, "judge_name": "tiny", **options}
    return judge_negatives(
        pictures(source / "images"), judge, Path(folder) / "judged", show_progress_bar=False, **options
    )


def killed_job(folder):
    judged_by_model(folder, Path(folder).parent)


def parts_written(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("judged/part-*")}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny_backbone("qwen2_vl", folder / "backbone", words=["Yes", "No"])
    judged_by_model(folder)
    return folder


def test_scores_are_the_judges_own(work):
    judge = build_reranker(work / "backbone", device="cpu")
    found = load_judged_negatives(work / "judged")
    pairs = [(row["anchor"], row[name]) for row in found for name in ("positive", "negative_1", "negative_2")]
    scores = np.array(found.with_format(None)["label"])[:, :3].ravel()
    there = scores >= 0
    assert there.sum() > 20
    np.testing.assert_allclose(judge.predict(pairs)[there], scores[there], atol=1e-5)


@pytest.mark.slow
def test_ten_kills_give_the_same_files(work):
    folder = work / "killed"
    seen = run_with_kills(killed_job, parts_written, folder, kills=10, seed=0, most=1)
    assert parts_written(folder) == parts_written(work)
    assert len({told[0] for told in seen}) > 3
    finished = [len(told[1]) for told in seen]
    assert finished == sorted(finished)
    assert len(notes(folder)) <= len(notes(work)) + 10, "what was there was judged again"


def two_jobs(rank, folder, work):
    judged_by_model(folder, work)
    return torch.tensor(len(notes(folder)))


@pytest.mark.slow
def test_two_processes_share_the_files(work, tmp_path):
    run_two(two_jobs, tmp_path, tmp_path, work)
    assert parts_written(tmp_path) == parts_written(work)
    assert len(notes(tmp_path)) == len(notes(work))


def test_a_stock_cross_encoder_judges(tmp_path, work):
    from unime_st.modules import export_reranker

    export_reranker(build_reranker(work / "backbone", device="cpu"), tmp_path / "stock")
    judge = CrossEncoder(str(tmp_path / "stock"), device="cpu")
    options = {"num_negatives": 3, "margin": -1.0, "stride": 2, "show_progress_bar": False}
    judge_negatives(pictures(work / "images"), judge, tmp_path / "judged", **options)
    stock = load_judged_negatives(tmp_path / "judged").with_format(None)["label"]
    ours = load_judged_negatives(work / "judged").with_format(None)["label"]
    np.testing.assert_allclose(np.array(stock), np.array(ours), atol=1e-5)


def test_rows_of_the_released_layout(work):
    (first, *rest) = judged_json_rows(work / "judged")
    assert first["query_image"].endswith(".png")
    assert first["query_text"].startswith("what")
    assert all(len(row["hard_negatives"]) == len(row["hard_negatives_scores"]) <= 3 for row in [first, *rest])


# --- bad input --------------------------------------------------------------------------------------------------------


class Wrong(Hashed):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def predict(self, inputs, **options):
        found = super().predict(inputs, **options)
        if callable(self.value):
            return self.value(found)
        found[[pair == ("q1", "right") for pair in inputs]] = self.value
        return found


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.01])
def test_scores_out_of_range_are_named_by_row_and_column(tmp_path, value):
    rows = Dataset.from_dict({"anchor": ["q0", "q1"], "positive": ["a", "b"], "negative_1": ["c", "right"]})
    with pytest.raises(ValueError, match=r"Row 1, column 'negative_1': the score is (nan|1\.5|-0\.01), and 0 more"):
        judge_negatives(rows, Wrong(value), tmp_path, judge_name="wrong", show_progress_bar=False)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: np.stack([s, s], axis=1)])
def test_scores_of_another_length_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=r"scores of shape .* for \d+ pairs"):
        judge_negatives(pool(), Wrong(change), tmp_path, judge_name="wrong", show_progress_bar=False)


def test_bad_rows_and_settings_are_named(tmp_path):
    rows = pool(8).to_dict()
    rows["negative_3"][5] = None
    options = {"judge_name": "hash", "show_progress_bar": False}
    with pytest.raises(ValueError, match=r"Row 5 has no 'negative_3' \(None\)"):
        judge_negatives(Dataset.from_dict(rows), Hashed(), tmp_path, rows_per_file=2, **options)
    with pytest.raises(ValueError, match=r"needs the columns .*mine_hard_negatives"):
        judge_negatives(pool().select_columns(["anchor", "positive"]), Hashed(), tmp_path / "a", **options)
    for bad, message in (
        ({"num_negatives": 0}, "num_negatives=0"), ({"stride": 0}, "stride=0"), ({"too_few": "repeat"}, "too_few"),
        ({"rows_per_file": 0}, "rows_per_file=0"), ({"margin": "a"}, "margin"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            judge_negatives(pool(), Hashed(), tmp_path / "b", **{**options, **bad})
    with pytest.raises(TypeError, match="needs a method `predict`"):
        judge_negatives(pool(), object(), tmp_path / "c", **options)
    with pytest.raises(ValueError, match="give `judge_name`"):
        judge_negatives(pool(), Hashed(), tmp_path / "d", show_progress_bar=False)
    with pytest.raises(ValueError, match="None of 30 rows keeps a negative"):
        judge_negatives(pool(), Hashed(), tmp_path / "e", margin=2.0, **options)


def test_a_listwise_reranker_is_no_judge(tmp_path, work):
    """What it says of a candidate depends on the others, so there is no score of a pair by itself."""
    listwise = ListwiseReranker(build_reranker(work / "backbone", device="cpu"))
    for name in (None, "tiny"):
        with pytest.raises(TypeError, match=r"is a ListwiseReranker, whose scores compare .*Give .* its `model`"):
            judge_negatives(pool(), listwise, tmp_path / "judged", judge_name=name, show_progress_bar=False)
    assert not (tmp_path / "judged").exists()


class Halved(torch.nn.Module):
    def forward(self, logits):
        return logits.sigmoid() / 2


def test_a_judge_of_another_activation_does_not_go_on(tmp_path, work):
    judge = build_reranker(work / "backbone", device="cpu")
    options = {"num_negatives": 2, "margin": -1.0, "show_progress_bar": False}
    judge_negatives(pool(4), judge, tmp_path / "judged", **options)
    for other in (Halved(), torch.special.expit):
        judge.activation_fn = other
        with pytest.raises(ValueError, match="mined otherwise: judge differ"):
            judge_negatives(pool(4), judge, tmp_path / "judged", **options)
        folder = tmp_path / type(other).__name__
        before = judge_negatives(pool(4), judge, folder, **options)
        assert judge_negatives(pool(4), judge, folder, **options) == before
    judge.activation_fn = torch.nn.Sigmoid()
    judge_negatives(pool(4), judge, tmp_path / "judged", **options)


def test_a_column_of_subsets_is_no_candidate(tmp_path):
    """Of a set of texts, too, which no reader of images opens."""
    rows = pool(6).add_column("subset", list("aabbcc"))
    options = {"judge_name": "hash", "num_negatives": 2, "margin": -1.0, "show_progress_bar": False}
    for number, given in enumerate((rows, rows.with_transform(without_subset))):
        folder = judge_negatives(given, Hashed(), tmp_path / str(number), **options)
        found = load_judged_negatives(folder)
        assert list(found[0]) == ["anchor", "positive", "negative_1", "negative_2", "label"]
        assert sorted(found.with_format(None)["subset"]) == list("aabbcc")


def test_damaged_and_foreign_files_are_named(tmp_path, caplog):
    options = {"judge_name": "hash", "show_progress_bar": False, "rows_per_file": 4}
    folder = judge_negatives(pool(), Hashed(), tmp_path / "one", **options)
    other = judge_negatives(pool(seed=3), Hashed(), tmp_path / "two", **options)
    part, foreign = sorted(folder.glob("part-*"))[1], sorted(other.glob("part-*"))[1]
    whole = part.read_bytes()
    for content in (whole[: len(whole) // 2], b"", foreign.read_bytes(), None):
        part.unlink() if content is None else part.write_bytes(content)
        with pytest.raises(ValueError, match=part.name):
            load_judged_negatives(folder)
    judge = Hashed()
    judge_negatives(pool(), judge, folder, **options)
    assert part.read_bytes() == whole
    assert 0 < len(judge.asked) < 200, "only that file's rows are judged again"
    for change in ({"margin": 0.2}, {"judge_name": "other"}, {"num_negatives": 2}):
        with pytest.raises(ValueError, match=rf"judged|mined otherwise.*{'judge' if 'judge_name' in change else ''}"):
            judge_negatives(pool(), Hashed(), folder, **{**options, **change})
    with pytest.raises(FileNotFoundError):
        load_judged_negatives(tmp_path / "nothing")


@pytest.mark.parametrize("column", ["anchor", "positive", "negative_1"])
def test_a_cell_without_content_is_named_by_row_and_column(tmp_path, column):
    table = {"anchor": ["q0", "q1"], "positive": ["a", "b"], "negative_1": ["c", "d"]}
    table[column][1] = " "
    with pytest.raises(ValueError, match=f"Row 1, column '{column}': the cell holds neither text nor an image"):
        judge_negatives(Dataset.from_dict(table), Hashed(), tmp_path, judge_name="hash", show_progress_bar=False)


def test_images_shown_in_another_size_are_another_judgement(tmp_path, work):
    options = {"judge_name": "hash", "show_progress_bar": False, "num_negatives": 3, "margin": -1.0}
    rows = pictures(work / "images")
    judge_negatives(rows, Hashed(), tmp_path, **options)
    smaller = rows.with_transform(ItemReader(work / "images", max_pixels=100))
    with pytest.raises(ValueError, match="mined otherwise: images differ"):
        judge_negatives(smaller, Hashed(), tmp_path, **options)


def test_rows_of_a_query_with_many_are_in_several_files(tmp_path):
    rows = {"anchor": ["q"] * 11 + ["r"], "positive": [f"p{n}" for n in range(12)]}
    rows |= {"negative_1": [f"n{n}" for n in range(12)], "negative_2": [f"m{n}" for n in range(12)]}

    class Asked:
        sizes: ClassVar = []

        def predict(self, pairs, **_):
            self.sizes.append(len(pairs))
            return np.array([0.9 if pair[1][0] == "p" else 0.1 for pair in pairs])

    options = {"num_negatives": 2, "rows_per_file": 3, "judge_name": "asked", "show_progress_bar": False}
    judged = judge_negatives(Dataset.from_dict(rows), Asked(), tmp_path / "judged", **options)
    found = load_judged_negatives(judged)
    assert sorted(found["positive"]) == sorted(rows["positive"])
    assert Asked.sizes == [9, 9, 15, 3]  # pairs of 3, 3 and 5 rows of the one query, and of the other's row
