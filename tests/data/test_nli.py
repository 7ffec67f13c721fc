"""Stage 1's texts from every layout they come in."""

import csv
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from unime_st.data import load_nli, with_teacher_labels

ROWS = [
    ("A cat sleeps.", "An animal rests."),
    ('He said "null".', "NA"),
    ("1234", "two,\tparts"),
    ("Ünï 猫", "two\nlines"),
]


def as_rows(dataset):
    return [tuple(row.values()) for row in dataset]


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path, rows):
    lines = [
        list(rows[0]),
        *([str(value).replace("\t", " ").replace("\n", " ") for value in row.values()] for row in rows),
    ]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_json(path, rows):
    path.write_text("\n " + json.dumps(rows))


@pytest.mark.parametrize("write", [write_parquet, write_csv, write_tsv, write_jsonl, write_json])
@pytest.mark.parametrize("names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("anchor", "positive")])
def test_every_format_gives_the_same_texts(tmp_path, write, names):
    path = tmp_path / f"set.{write.__name__.removeprefix('write_')}"
    write(path, [{"id": number, names[0]: a, names[1]: b, "label": number % 3} for number, (a, b) in enumerate(ROWS)])
    dataset = load_nli(path)
    assert dataset.column_names == list(names)
    expected = [(a, b.replace("\t", " ").replace("\n", " ")) for a, b in ROWS] if write is write_tsv else ROWS
    assert as_rows(dataset) == expected
    assert load_nli(str(path), columns=[names[1]]).column_names == [names[1]]


def test_lines_are_texts(tmp_path, caplog):
    (tmp_path / "lines.txt").write_text("one\n\n  \ntwo, three\r\n")
    with caplog.at_level(logging.WARNING):
        assert [text.strip() for text in load_nli(tmp_path / "lines.txt")["text"]] == ["one", "two, three"]
    assert "skipped 2 of 4 rows with a text missing" in caplog.text


def test_rows_without_texts_are_skipped_and_counted(tmp_path, caplog):
    rows = [
        {"premise": "a", "hypothesis": "b"},
        {"premise": None, "hypothesis": "b"},
        {"premise": 3, "hypothesis": "b"},
    ]
    rows += [{"premise": "a", "hypothesis": " \n"}, {"premise": "a"}, {"premise": ["a"], "hypothesis": "b"}]
    write_jsonl(tmp_path / "set.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert as_rows(load_nli(tmp_path / "set.jsonl")) == [("a", "b")]
    assert "set.jsonl: skipped 5 of 6 rows with a text missing" in caplog.text
    write_jsonl(tmp_path / "none.jsonl", rows[1:])
    with pytest.raises(ValueError, match="of 5 rows none has a text in each of premise, hypothesis"):
        load_nli(tmp_path / "none.jsonl")


HUB = {
    "pair": {"anchor": ["a1", "a2"], "positive": ["p1", "p2"]},
    "pair-class": {"premise": ["a1", "a2"], "hypothesis": ["p1", "p2"], "label": [0, 2]},
    "triplet": {"anchor": ["a1", "a2"], "positive": ["p1", "p2"], "negative": ["n1", "n2"]},
    "pair-score": {"sentence1": ["a1", "a2"], "sentence2": ["p1", "p2"], "score": [0.5, 1.0]},
}


@pytest.mark.parametrize("config", HUB)
def test_sets_of_the_hub(monkeypatch, config):
    asked = []
    rows = Dataset.from_dict(HUB[config])
    if config == "pair-class":
        label = ClassLabel(names=["entailment", "neutral", "contradiction"])
        rows = rows.cast(Features({"premise": Value("string"), "hypothesis": Value("string"), "label": label}))
    monkeypatch.setattr("unime_st.data.nli.load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    dataset = load_nli("sentence-transformers/all-nli", config, split="dev")
    assert asked == [(("sentence-transformers/all-nli", config), {"split": "dev"})]
    texts = {name: values for name, values in HUB[config].items() if name not in ("label", "score")}
    assert dataset[:] == texts
    labelled = with_teacher_labels(dataset, np.ones((2, len(texts), 3)))
    assert labelled.column_names == [*texts, "label"]
    with pytest.raises(ValueError, match=r"column (label|score) holds (int64|double)|has no column label"):
        load_nli(
            "sentence-transformers/all-nli", config, columns=["score" if "score" in rows.column_names else "label"]
        )


def test_a_local_copy_of_a_set_of_the_hub(tmp_path):
    for config in ("pair", "triplet"):
        for split in ("train", "dev"):
            (tmp_path / config).mkdir(exist_ok=True)
            for number in range(2):
                rows = Dataset.from_dict(
                    {name: [f"{split}{number} {text}" for text in texts] for name, texts in HUB[config].items()}
                )
                rows.to_parquet(tmp_path / config / f"{split}-{number:05d}-of-00002.parquet")
    assert load_nli(tmp_path, "triplet")["negative"][:] == ["train0 n1", "train0 n2", "train1 n1", "train1 n2"]
    assert load_nli(tmp_path, "pair", split="validation")["anchor"][:2] == ["dev0 a1", "dev0 a2"]
    with pytest.raises(FileNotFoundError, match="no file of the split 'test'; there are train, validation"):
        load_nli(tmp_path, "pair", split="test")
    with pytest.raises(FileNotFoundError, match=r"has no file that ends in \.parquet"):
        load_nli(tmp_path, "none")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_nli(tmp_path / "none.csv")


def test_a_folder_of_several_formats(tmp_path):
    write_csv(tmp_path / "a.csv", [{"sent0": "a", "sent1": "b", "hard_neg": "c"}])
    write_jsonl(tmp_path / "b.jsonl", [{"sent0": "d", "sent1": "e", "hard_neg": "f", "more": 1}])
    assert as_rows(load_nli(tmp_path)) == [("a", "b", "c"), ("d", "e", "f")]
    write_jsonl(tmp_path / "c.jsonl", [{"sent0": "d", "sent1": "e"}])
    with pytest.raises(ValueError, match=r"c\.jsonl has no column hard_neg; it has sent0, sent1"):
        load_nli(tmp_path)
    assert len(load_nli(tmp_path, columns=["sent0"])) == 3


def test_repetitions_and_rows_drawn(tmp_path):
    texts = [(f"a{number % 40}", f"b{number % 20}") for number in range(100)]
    write_csv(tmp_path / "set.csv", [{"text1": a, "text2": b} for a, b in texts])
    whole = as_rows(load_nli(tmp_path / "set.csv"))
    assert whole == texts
    assert as_rows(load_nli(tmp_path / "set.csv", drop_duplicates=True)) == list(dict.fromkeys(texts))
    assert as_rows(load_nli(tmp_path / "set.csv", max_rows=7)) == texts[:7]
    drawn = as_rows(load_nli(tmp_path / "set.csv", max_rows=7, seed=1, drop_duplicates=True))
    assert drawn == as_rows(load_nli(tmp_path / "set.csv", max_rows=7, seed=1, drop_duplicates=True))
    assert len(set(drawn)) == 7
    assert drawn != texts[:7]
    assert drawn != as_rows(load_nli(tmp_path / "set.csv", max_rows=7, seed=2, drop_duplicates=True))
    assert len(load_nli(tmp_path / "set.csv", max_rows=1000, seed=1)) == 100
    with pytest.raises(ValueError, match="must be 1 or more"):
        load_nli(tmp_path / "set.csv", max_rows=0)


def test_errors_list_what_is_there(tmp_path):
    write_csv(tmp_path / "set.csv", [{"first": "a", "second": "b"}])
    with pytest.raises(ValueError, match=r"columns first, second, and none of the usual names.*by `columns`"):
        load_nli(tmp_path / "set.csv")
    with pytest.raises(ValueError, match="no column third; it has first, second"):
        load_nli(tmp_path / "set.csv", columns=["first", "third"])
    (tmp_path / "set.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"set\.parquet is damaged"):
        load_nli(tmp_path / "set.parquet")
    (tmp_path / "set.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"set\.jsonl, line 2 is no JSON"):
        load_nli(tmp_path / "set.jsonl")
    (tmp_path / "bad.csv").write_text("text,more\na,b\na,b,c\n")
    with pytest.raises(ValueError, match=r"bad\.csv is damaged"):
        load_nli(tmp_path / "bad.csv")
