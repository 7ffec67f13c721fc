"""The released sets' JSON list: read row by row in flat memory, written back equal, and refused by row and column."""

import json
import tracemalloc

import numpy as np
import pytest

from tiny import picture
from unime_st.data import (
    import_judged_json,
    judged_json_rows,
    load_judged_negatives,
    read_judged_json,
    write_judged_json,
)


def row(number, negatives=10):
    return {
        "query_text": f"<|image_1|>\nRepresent the given image with the following question: Ünïque “{number}”?\n",
        "query_image": f"images/{'red' if number % 2 else 'green'}.png",
        "pos_text": f"answer {number}",
        "pos_image": "",
        "query_pos_scores": 0.7215937972068787,
        "hard_negatives": [[f"wrong {number}, {k}", ""] if k % 3 else ["", "images/red.png"] for k in range(negatives)],
        "hard_negatives_scores": [round(0.01 * k + 0.001 * number % 0.5, 17) for k in range(negatives)],
    }


ROWS = [row(number, negatives=10 - number % 4) for number in range(9)]


@pytest.fixture
def released(tmp_path):
    """A few rows in the released layout: one list, four spaces a level."""
    path = tmp_path / "train_data_sample_scores.json"
    path.write_text(json.dumps(ROWS, indent=4, ensure_ascii=False))
    return path


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_read_and_written_back_equal(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr("unime_st.data.judging.json_list._CHUNK", chunk)
    path = tmp_path / "released.json"
    path.write_text(json.dumps(ROWS, indent=indent))
    assert list(read_judged_json(path)) == ROWS
    copy = write_judged_json(read_judged_json(path), tmp_path / "copy.json")
    assert json.loads(copy.read_text()) == ROWS
    again = write_judged_json(read_judged_json(copy), tmp_path / "again.json")
    assert again.read_bytes() == copy.read_bytes()


def test_memory_is_that_of_a_row(tmp_path):
    peaks = []
    for count in (2000, 20000):
        path = tmp_path / f"{count}.json"
        write_judged_json((row(number) for number in range(count)), path)
        tracemalloc.start()
        assert sum(1 for _ in read_judged_json(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 4 * max(peaks)
    assert peaks[1] < 1.2 * peaks[0]


def test_what_is_imported_trains(released, tmp_path):
    (tmp_path / "images").mkdir()
    for color in ("red", "green"):
        picture(color).save(tmp_path / "images" / f"{color}.png")
    folder = import_judged_json(released, tmp_path / "judged", image_root=tmp_path, rows_per_file=4)
    found = load_judged_negatives(folder)
    assert len(found) == len(ROWS)
    for got, source in zip(found, ROWS, strict=True):
        assert "<|image_1|>" not in got["anchor"]["text"]
        assert "Ünïque" in got["anchor"]["text"]
        assert got["anchor"]["image"].size == (40, 30)
        scores = [source["query_pos_scores"], *source["hard_negatives_scores"]]
        np.testing.assert_allclose(got["label"], scores + [-1.0] * (11 - len(scores)), atol=1e-7)
    back = list(judged_json_rows(folder))
    assert [r["hard_negatives"] for r in back] == [r["hard_negatives"] for r in ROWS]
    assert [r["query_image"] for r in back] == [r["query_image"] for r in ROWS]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    import_judged_json(released, folder, image_root=tmp_path, rows_per_file=4)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before
    with pytest.raises(ValueError, match="rows_per_file"):
        import_judged_json(released, folder, image_root=tmp_path, rows_per_file=5)


def test_empty_negatives_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [row(0, negatives=3), {**row(1, negatives=3), "query_image": "", "query_text": "a"}]
    rows[0]["hard_negatives"][1] = ["<|image_1|>", ""]
    path = write_judged_json(rows, tmp_path / "a.json")
    folder = import_judged_json(path, tmp_path / "judged", image_root=tmp_path, rows_per_file=1)
    labels = load_judged_negatives(folder).with_format(None)["label"]
    scores = rows[0]["hard_negatives_scores"]
    np.testing.assert_allclose(labels[0], [rows[0]["query_pos_scores"], scores[0], scores[2], -1.0], atol=1e-7)
    assert "Took 2 of 2 rows" in caplog.text
    assert "without 1 negatives that are empty" in caplog.text


def changed(number, **fields):
    rows = [dict(r) for r in ROWS]
    rows[number].update(fields)
    return json.dumps(rows)


TEXT = json.dumps(ROWS)
BAD = {
    "a list cut short": (TEXT[:-1], r"cut short or damaged in row 9|is cut short"),
    "a row cut short": (TEXT[: len(TEXT) // 2], r"cut short or damaged in row \d"),
    "nothing": ("", "begins with ''"),
    "lines of rows": ("\n".join(json.dumps(r) for r in ROWS), r"begins with '\{"),
    "two lists": (TEXT + TEXT, "goes on after its list, behind row 8"),
    "no comma": (TEXT.replace("}, {", "} {", 1), "damaged behind row 0"),
    "no object": ("[1, 2]", "row 0 is a int"),
    "another set": ('[{"qry": "a"}]', r"row 0 has no query_text.*It has \['qry'\]"),
    "no text": (changed(3, pos_text=None), r"row 3: pos_text is None"),
    "fewer scores": (changed(4, hard_negatives_scores=[0.1]), r"row 4: 10 hard_negatives have 1 hard_negatives_scores"),
    "a score of 2": (changed(2, query_pos_scores=2.0), r"row 2, query_pos_scores: the score is 2"),
    "NaN": (changed(4, hard_negatives_scores=[0.1] * 9 + [float("nan")]), r"row 4, hard_negatives_scores\[9\].* nan"),
    "a score as text": (changed(1, query_pos_scores="0.5"), r"row 1: query_pos_scores is '0.5'"),
    "a negative alone": (changed(0, hard_negatives=["a"] * 10), r"row 0: hard_negatives\[0\] is 'a'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_with_row_and_column(tmp_path, kind):
    content, message = BAD[kind]
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.json.*({message})"):
        list(read_judged_json(path))


def test_bytes_are_no_list(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.json is no text in UTF-8"):
        list(read_judged_json(path))


def test_a_bad_row_leaves_the_old_file(tmp_path):
    path = write_judged_json(ROWS, tmp_path / "out.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"out\.json, row 1 has no"):
        write_judged_json([ROWS[0], {}], path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_damage_in_an_early_row_is_told_without_reading_on(tmp_path):
    path = tmp_path / "list.json"
    rest = ",\n".join([json.dumps(ROWS[0])] * 3000)
    path.write_text('[{"query_text": "a" "b", ' + rest + "]")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"list\.json is cut short or damaged in row 0 \(Expecting ','"):
        list(read_judged_json(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < path.stat().st_size


def test_a_byte_order_mark_is_taken_and_a_huge_number_named(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    assert list(read_judged_json(path)) == ROWS
    path.write_text(json.dumps([ROWS[0] | {"query_pos_scores": -(10**400)}]))
    with pytest.raises(ValueError, match=r"row 0, query_pos_scores: the score is"):
        list(read_judged_json(path))


def test_lists_in_lists_without_end_are_damage(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" + "[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is damaged in row 0: it nests lists or objects too deeply"):
        list(read_judged_json(path))
