import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unime_st.evaluation import Report, compare, read_settings
from unime_st.evaluation.__main__ import main
from unime_st.evaluation.outcomes import TaskOutcomes, read_outcomes, write_outcomes


def outcomes(**scores):
    return {
        task: TaskOutcomes(np.arange(len(own)), np.asarray(own, float), np.zeros(len(own), bool))
        for task, own in scores.items()
    }


def written(folder, settings=None, **scores):
    folder.mkdir()
    write_outcomes(folder / "MMEB_results_rows.parquet", outcomes(**scores), settings or {})
    return folder


def test_outcomes_come_back(tmp_path):
    made = {"a": TaskOutcomes(np.array([4, 1]), np.array([0.5, 1.0]), np.array([True, False])),
            "b": TaskOutcomes(np.array([7]), np.array([True]), np.array([False]))}  # fmt: skip
    write_outcomes(tmp_path / "rows.parquet", made)
    found = read_outcomes(tmp_path / "rows.parquet")
    assert list(found) == ["a", "b"]
    assert found["a"].rows.tolist() == [4, 1]
    assert found["a"].scores.tolist() == [0.5, 1.0]
    assert found["a"].tied.tolist() == [True, False]
    assert found["b"].scores.tolist() == [1.0]
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"torn\.parquet holds no results by row"):
        read_outcomes(tmp_path / "torn.parquet")


def test_no_flipped_or_missing_byte_of_outcomes_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    made = outcomes(a=[0.0, 1.0, 0.5], b=[1.0])
    write_outcomes(path, made, {"prompt": "Find it: "})
    good, refused = path.read_bytes(), 0
    harmed = [good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in range(len(good))]
    for content in [*harmed, *(good[:length] for length in range(0, len(good), 50))]:
        path.write_bytes(content)
        try:
            found = read_outcomes(path)
        except ValueError as error:
            refused += str(path) in str(error) and "Evaluate again" in str(error)
        else:
            assert list(found) == list(made)
            assert read_settings(path) in ({"prompt": "Find it: "}, None)  # None: its key is another
            for task, own in made.items():
                for name in ("rows", "scores", "tied"):
                    np.testing.assert_array_equal(getattr(found[task], name), getattr(own, name))
    assert refused > len(good) / 2  # of parquet's footer, much is for nobody


def test_outcomes_of_before_there_were_checksums_are_read(tmp_path):
    table = pa.table({"task": ["a"], "row": [3], "score": [0.5], "tied": [False]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_outcomes(tmp_path / "rows.parquet")["a"].scores.tolist() == [0.5]
    pq.write_table(table.replace_schema_metadata({"unime_st_checksun": "0"}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="its checksum is another"):
        read_outcomes(tmp_path / "rows.parquet")


def test_settings_that_differ_are_told(tmp_path, caplog):
    first = {"prompt": "a", "weights": "1", "versions": {"torch": "2.13", "peft": "0.19"}, "frames": {"t": 8}}
    second = {**first, "prompt": "b", "weights": "2", "versions": {"torch": "2.14", "peft": "0.19"}, "limit": 3}
    a, b = written(tmp_path / "a", first, t=[1, 0]), written(tmp_path / "b", second, t=[1, 1])
    assert read_settings(a / "MMEB_results_rows.parquet") == first
    with caplog.at_level(logging.WARNING):
        found = compare(a, b, resamples=10)
    assert found.other_settings == {
        "MMEB: prompt": ('"a"', '"b"'),
        "MMEB: weights": ('"1"', '"2"'),
        "MMEB: versions torch": ('"2.13"', '"2.14"'),
        "MMEB: limit": ("-", "3"),
    }
    assert 'MMEB: prompt "a" (before), "b" (after); MMEB: versions torch' in caplog.text
    assert "weights" not in caplog.text
    report = Report("x")
    found.add_to(report)
    rows = next(own.data["rows"] for own in report.sections if own.title == "Settings that differ or are not told")
    assert rows[0] == ["MMEB: prompt", '"a"', '"b"']
    assert len(rows) == 4


def test_equal_settings_and_other_weights_warn_of_nothing(tmp_path, caplog):
    a, b = (written(tmp_path / name, {"weights": name, "batch_size": 4}, t=[1, 0]) for name in "ab")
    assert compare(a, a, resamples=10).other_settings == {}
    assert list(compare(a, b, resamples=10).other_settings) == ["MMEB: weights"]
    assert not caplog.records


def test_files_without_settings_are_said_not_to_tell(tmp_path, caplog):
    a = written(tmp_path / "a", t=[1, 0])
    (tmp_path / "old").mkdir()
    write_outcomes(tmp_path / "old" / "MMEB_results_rows.parquet", outcomes(t=[1, 0]))
    assert read_settings(tmp_path / "old" / "MMEB_results_rows.parquet") is None
    assert compare(tmp_path / "old", a, resamples=10).other_settings == {"MMEB": ("not told", "told")}
    assert "MMEB not told (before), told (after)" in caplog.text


def test_the_interval_against_a_plain_loop(tmp_path):
    rng = np.random.default_rng(5)
    a = {task: rng.integers(0, 2, size).astype(float) for task, size in (("one", 60), ("two", 25))}
    b = {task: np.clip(own + rng.integers(-1, 2, len(own)), 0, 1) for task, own in a.items()}
    found = compare(written(tmp_path / "a", **a), written(tmp_path / "b", **b), resamples=4000, seed=1)
    loop = np.random.default_rng(99)
    means = {task: [] for task in (*a, "mean")}
    for _ in range(4000):
        one = {}
        for task, own in a.items():
            drawn = loop.integers(len(own), size=len(own)).tolist()
            one[task] = sum(b[task][row] - own[row] for row in drawn) / len(drawn)
            means[task].append(one[task])
        means["mean"].append(sum(one.values()) / len(one))
    by_task = {name.removeprefix("MMEB: "): difference for name, difference in found.tasks.items()}
    for task, difference in (*by_task.items(), ("mean", found.means["MMEB"])):
        low, high = np.percentile(means[task], [2.5, 97.5])
        assert difference.low == pytest.approx(low, abs=0.041)
        assert difference.high == pytest.approx(high, abs=0.041)
    for task, difference in by_task.items():
        assert difference.difference == pytest.approx(b[task].mean() - a[task].mean())
        assert list(difference.gained) == [row for row in range(len(a[task])) if b[task][row] > a[task][row]]
        assert list(difference.lost) == [row for row in range(len(a[task])) if b[task][row] < a[task][row]]
    assert found.means["MMEB"].difference == pytest.approx(np.mean([b[t].mean() - a[t].mean() for t in a]))


def test_equal_results_differ_by_nothing(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2, 50)
    found = compare(written(tmp_path / "a", t=rows), written(tmp_path / "b", t=rows))
    assert (found.means["MMEB"].difference, found.means["MMEB"].low, found.means["MMEB"].high) == (0, 0, 0)
    assert not found.means["MMEB"].is_clear


def test_pairing_sees_what_two_separate_intervals_would_not(tmp_path):
    """Most rows agree, a few are gained: clear when paired, though each score alone is uncertain by more."""
    rng = np.random.default_rng(3)
    a = rng.integers(0, 2, 400).astype(float)
    b = a.copy()
    b[np.flatnonzero(a == 0)[:12]] = 1
    found = compare(written(tmp_path / "a", t=a), written(tmp_path / "b", t=b))
    assert found.tasks["MMEB: t"].is_clear
    alone = 1.96 * a.std() / 20
    assert alone > found.tasks["MMEB: t"].difference > found.tasks["MMEB: t"].low > 0


def test_the_interval_covers_the_truth(tmp_path):
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(120):
        a = (rng.random(150) < 0.5).astype(float)
        b = np.where(rng.random(150) < 0.2, (rng.random(150) < 0.8).astype(float), a)  # truth: 0.2 * (0.8 - 0.5)
        folders = [written(tmp_path / f"{trial}{side}", t=own) for side, own in (("a", a), ("b", b))]
        found = compare(*folders, resamples=400, seed=trial).tasks["MMEB: t"]
        covered += found.low <= 0.06 <= found.high
    assert 0.88 <= covered / 120 <= 0.99


def test_other_rows_are_refused(tmp_path):
    a = written(tmp_path / "a", t=[1, 0, 1], u=[1])
    b = written(tmp_path / "b", t=[1, 0])
    with pytest.raises(ValueError, match=r"only before: MMEB: u.*intersection=True"):
        compare(a, b)
    c = written(tmp_path / "c", t=[1, 0], u=[0])
    with pytest.raises(ValueError, match=r"t: 3 rows before and 2 after.*`limit` and `seed`"):
        compare(a, c)
    assert compare(a, c, intersection=True).tasks["MMEB: t"].before == 0.5
    with pytest.raises(FileNotFoundError, match=r"no \*_rows\.parquet"):
        compare(a, tmp_path)
    with pytest.raises(ValueError, match="resamples=0"):
        compare(a, a, resamples=0)


def test_the_report_and_the_command(tmp_path, capsys):
    a, b = written(tmp_path / "a", t=[1, 0, 0, 1], u=[1, 0]), written(tmp_path / "b", t=[1, 1, 0, 0], u=[1, 1])
    report = Report("x")
    compare(a, b).add_to(report)
    differences, drawn, flips = report.sections
    assert [row[0] for row in differences.data["rows"]] == ["MMEB: t", "MMEB: u", "MMEB: mean of tasks"]
    assert differences.data["rows"][1][3] == 0.5
    assert drawn.kind == "plot"
    assert flips.data["rows"] == [
        ["MMEB: t", "gained", 1, "1"],
        ["MMEB: t", "lost", 1, "3"],
        ["MMEB: u", "gained", 1, "1"],
    ]
    main(["compare", str(a), str(b), "--output", str(tmp_path / "out"), "--resamples", "50"])
    assert f"wrote {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


def test_several_evaluators_are_not_mixed_and_may_be_more_on_one_side(tmp_path):
    a, b = written(tmp_path / "a", t=[1, 0]), written(tmp_path / "b", t=[1, 1])
    write_outcomes(b / "sugarcrepe_results_rows.parquet", outcomes(swap=[0, 0, 0]))
    with pytest.raises(ValueError, match=r"only after: sugarcrepe: swap"):
        compare(a, b)
    found = compare(a, b, intersection=True)
    assert list(found.tasks) == ["MMEB: t"]
    write_outcomes(a / "sugarcrepe_results_rows.parquet", outcomes(swap=[1, 0, 0]))
    found = compare(a, b)
    assert {name: difference.difference for name, difference in found.means.items()} == {
        "MMEB": 0.5,
        "sugarcrepe": pytest.approx(-1 / 3),
    }
    alone = compare(a / "MMEB_results_rows.parquet", b / "MMEB_results_rows.parquet")
    assert alone.tasks["MMEB: t"] == found.tasks["MMEB: t"]  # whatever else is compared


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), str(tmp_path)])
    assert "holds no *_rows.parquet" in capsys.readouterr().err
