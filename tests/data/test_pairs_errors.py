"""Bad input is refused by file, line and column, with what to do."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict, Image

from tiny import picture
from unime_st.data import bad_image_report, check_pairs, load_inputs, load_pairs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("a", "b"):
        picture("red" if name == "a" else "green").save(tmp_path / f"{name}.png")
    return tmp_path


def refused(source, message, **options):
    with pytest.raises(ValueError, match=message):
        load_pairs(source, **options)


def written(folder, content, name="rows.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_missing_column_lists_those_that_are_there(folder):
    path = written(folder, "caption,photo_name\nx,a.png\n")
    refused(
        path, "rows.csv has no column 'foto', which `target` names. Its columns are: caption, photo_name", target="foto"
    )
    refused(path, "no column 'klass', which `label` names", label="klass")
    refused(path, r'no column is a query by its name. .*caption, photo_name. Name both sides: `query="..."`')
    path = written(folder, "query,image,document\nx,a.png,y\n")
    refused(path, r"is the column 'image' a part of the query or of the target\?.*`query=\[\"image\", \"query\"\]`")
    refused(path, "'query' is query and target in one", query="query", target="query")
    with pytest.raises(ValueError, match=r"no column 'x'. Its columns are: query, image, document"):
        load_inputs(path, columns="x")


def test_mixed_types(folder):
    rows = [{"query": "a", "target": "x"}, {"query": "b", "target": 7}]
    path = written(folder, "\n\n".join(map(json.dumps, rows)), "rows.jsonl")
    refused(
        path, r"rows.jsonl, line 3, column 'target' holds '7' \(of type int\), where a text .* Write it as a string"
    )
    rows = [{"query": "a", "target": "x", "label": 1}, {"query": "b", "target": "y", "label": "one"}]
    path = written(folder, "\n".join(map(json.dumps, rows)), "rows.jsonl")
    refused(path, r"rows.jsonl, line 2: labels are int and str. Write all of them in one way")
    path = written(folder, json.dumps({"query": "a", "target": "x", "label": 0.5}), "rows.jsonl")
    refused(path, r"line 1: the label is '0.5', but it says which target is meant")
    refused(Dataset.from_dict({"query": ["a"], "target": [3]}), "column 'target' holds int64, where texts or images")
    path = written(folder, '{"query": "a", "target": "b"}\n["a", "b"]', "rows.jsonl")
    refused(path, "line 2 is a list, but a row is an object")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_byte_order_marks_and_separators_are_found(separator, folder, caplog):
    content = "\ufeffcaption{0}image\r\nx, y{0}a.png\r\nz{0}b.png\r\n".replace("x, y", '"x, y"').format(separator)
    with caplog.at_level("INFO"):
        pairs = load_pairs(written(folder, content))
    assert [row["anchor"]["text"] for row in pairs] == ["x, y", "z"]
    said = {",": "", ";": "cells are parted by semicolons", "\t": "cells are parted by tabs"}[separator]
    assert said in caplog.text
    assert ("parted by" in caplog.text) == (separator != ",")


def test_a_separator_that_is_given(folder):
    path = written(folder, "query|target\na|x\nb|y\n")
    refused(path, "no column is a query by its name. Its columns are: query|target".replace("|", r"\|"))
    assert load_pairs(path, separator="|")[1]["positive"] == {"text": "y"}


def test_byte_order_mark_in_json_lines(folder):
    path = written(folder, '\ufeff{"query": "a", "target": "x"}\n', "rows.jsonl")
    assert load_pairs(path)[0] == {"anchor": {"text": "a"}, "positive": {"text": "x"}}


def test_quotes(folder):
    path = written(folder, 'query,target\na,"say ""yes"", please"\n"two\nlines",x\n')
    assert [row["positive"]["text"] for row in load_pairs(path)] == ['say "yes", please', "x"]
    path = written(folder, 'query,target\na,x\nb,"never closed\nc,y\n')
    refused(path, r"rows.csv, line 3: a quote opens or closes in the middle of a cell, or is never closed")
    path = written(folder, 'query,target\na,x\n"b" c,y\n')
    refused(path, r"rows.csv, line 3: a quote")
    tabs = written(folder, 'query\ttarget\n"a" or b\tx "y"\n', "rows.tsv")
    assert load_pairs(tabs)[0] == {"anchor": {"text": '"a" or b'}, "positive": {"text": 'x "y"'}}


def test_rows_of_another_length_and_doubled_columns(folder):
    refused(
        written(folder, "query,target\na,x\n\nb,y,z\n"),
        r"line 4 has 3 cells, but there are 2 columns \(query, target\)",
    )
    refused(written(folder, "query,target,query\na,x,b\n"), "line 1: the column 'query' is there twice")


def test_lines_are_counted_over_quoted_line_breaks(folder):
    path = written(folder, 'caption,image\n"two\nlines",a.png\nx,../b.png\n')
    refused(path, r"rows.csv, line 4, column 'image': Image path '../b.png' leaves the image folder")


@pytest.mark.parametrize("name", ["../b.png", "/etc/passwd", "C:\\b.png", "x/../../b.png", "\\\\host\\b.png"])
def test_a_path_that_leaves_the_folder(name, folder):
    path = written(folder, json.dumps({"caption": "x", "image": name}), "rows.jsonl")
    refused(path, rf"rows.jsonl, line 1, column 'image': Image path {re.escape(repr(name))} leaves the image folder")


def test_a_link_that_leaves_the_folder(folder):
    inside = folder / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(folder / "a.png")
    pairs = load_pairs(written(inside, "caption,image\nx,link.png\n"))
    with pytest.raises(ValueError, match=r"rows.csv, line 2: Image path 'link.png' leaves the image folder"):
        pairs[0]


def test_addresses_are_refused(folder):
    path = written(folder, "caption,image\nx,a.png\ny,HTTPS://a.org/b.png\n")
    refused(path, r"line 3, column 'image': 'HTTPS://a.org/b.png' is an address .* `allow_remote_images=True`")


def test_empty_sources(folder):
    refused(written(folder, ""), "rows.csv is empty. A table has a line of column names")
    refused(written(folder, b"\xef\xbb\xbf \n"), "rows.csv is empty")
    refused(written(folder, "query,target\n"), "has the columns query, target, but no row")
    refused(Dataset.from_dict({"query": [], "target": []}), "has no row")
    Dataset.from_dict({"query": [], "target": []}).to_parquet(folder / "rows.parquet")
    refused(folder / "rows.parquet", "rows.parquet has no row")
    (folder / "none").mkdir()
    refused(folder / "none", r"holds nothing: no one source of pairs. Give a file \(.csv, .tsv")


def test_other_kinds_and_encodings(folder):
    refused(
        written(folder, b"caption,image\n\xe9t\xe9,a.png\n"),
        r"is no UTF-8 text \(byte 14 is 0xe9\).*`encoding='cp1252'`",
    )
    pairs = load_pairs(folder / "rows.csv", encoding="cp1252")
    assert pairs[0]["anchor"]["text"] == "\xe9t\xe9"
    refused(written(folder, b"PAR1 or not", "rows.parquet"), "rows.parquet is damaged or no parquet")
    refused(written(folder, "query,target\na,b\n".encode("utf-16")), r"Save it as UTF-8, .*`encoding='utf-16'`")
    assert load_pairs(folder / "rows.csv", encoding="utf-16")[0]["anchor"] == {"text": "a"}
    refused(
        written(folder, '{"query": "a", "target": "\\ud800"}', "rows.jsonl"), "line 1, column 'target' holds half a"
    )
    refused(written(folder, "[]", "rows.json"), "rows.json has no row")
    refused(written(folder, "x", "rows.xlsx"), "rows.xlsx is of no kind that is read. Give a file")
    refused(written(folder, '{"query": "a"', "rows.jsonl"), "rows.jsonl, line 1 is no JSON")
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere.csv'. Give a file"):
        load_pairs(folder / "nowhere.csv")
    with pytest.raises(TypeError, match=r"`source` is a list, but it must be a path or a `datasets.Dataset`"):
        load_pairs([1])
    with pytest.raises(ValueError, match=r"`bad_images='ignore'`, but it must be 'keep' or 'drop'"):
        load_pairs(folder / "rows.csv", bad_images="ignore")


def test_folders_without_captions_and_splits(folder, tmp_path):
    (tmp_path / "datasets").mkdir(exist_ok=True)
    refused(folder, "holds 2 images, but no captions. Put a .txt of the same name beside each, or a metadata.csv")
    rows = Dataset.from_dict({"query": ["a"], "target": ["x"]})
    refused(DatasetDict({"train": rows, "test": rows}), "has the splits train, test. Give one of them as `split`")


def test_negatives_that_are_missing(folder):
    path = written(folder, "query,target,negative\na,x,n\nb,y,\n")
    refused(path, r"line 3 and 0 more of 2 rows have no negative, others up to 1. Fill negative in, .*`negatives=\[\]`")
    path = written(folder, "query,target,negative,negative_image\na,x,n,a.png\nb,y,m,b.png\n")
    refused(path, "the negatives negative, negative_image hold texts and images")


def test_lists_that_do_not_fit(folder):
    row = {"question": "a", "image": ["a.png", "b.png"], "caption": ["x"]}
    path = written(folder, json.dumps(row), "rows.jsonl")
    refused(path, "line 1: the lists of 'image' and 'caption' differ in length", target=["image", "caption"])


def test_every_row_dropped(folder):
    path = written(folder, "caption,image\nx,none.png\n")
    refused(path, "no row is left. `check_pairs` tells", bad_images="drop")


def test_paths_below_no_folder(folder):
    rows = Dataset.from_dict({"caption": ["x"], "image": ["a.png"]})
    for stored in (rows, rows.cast_column("image", Image())):
        refused(stored, r"the data set, row 0, column 'image': 'a.png' is the path of a file, .* Give `image_root`")
        assert load_pairs(stored, image_root=folder)[0]["positive"]["image"].size == (40, 30)
    away = Dataset.from_dict({"caption": ["x"], "image": ["../a.png"]}).cast_column("image", Image())
    refused(away, "row 0, column 'image': Image path '../a.png' leaves the image folder", image_root=folder)


def test_labels_that_mean_something_else(folder):
    path = written(folder, "query,target,label\na,x,1\nb,y,1\n")
    told = check_pairs(load_pairs(path)).problems
    assert told[0].startswith("All 2 rows have one label, so none is a negative of another.")
    assert not check_pairs(load_pairs(path, label="")).problems
    assert load_pairs(path, label="").column_names == ["anchor", "positive"]


def test_bad_images_are_logged_by_data_set_and_line(folder):
    path = written(folder, "caption,image\nx,a.png\ny,none.png\n")
    log = folder / "bad.jsonl"
    rows = load_pairs(path, max_bad_images=1, bad_images_log=log)[:]
    assert [item["text"] for item in rows["anchor"]] == ["x", "x"]
    assert bad_image_report(log) == {"rows.csv": 1}
    assert json.loads(log.read_text())["row"] == 3


def test_a_parquet_file_that_is_damaged_inside(folder):
    rows = Dataset.from_dict({"query": [f"q {n}" for n in range(999)], "target": ["t"] * 999})
    rows.to_parquet(folder / "rows.parquet")
    content = bytearray((folder / "rows.parquet").read_bytes())
    content[20:400] = bytes(380)
    refused(written(folder, bytes(content), "other.parquet"), r"other.parquet is damaged \(.*\). Write it again")


def test_a_folder_of_splits_and_hidden_images(folder):
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "metadata.csv").write_text("file_name,text\na.png,x\n")
    refused(folder, "has its tables in test, train. Give one of these folders")
    hidden = folder / "photos" / ".checkpoints"
    hidden.mkdir(parents=True)
    for place in (hidden, hidden.parent):
        (place / "a.png").hardlink_to(folder / "a.png")
    (hidden.parent / "a.txt").write_text("x")
    assert len(load_pairs(hidden.parent)) == 1


def test_arguments_that_nothing_reads(folder):
    path = written(folder, "caption,image\nx,a.png\ny,b.png\n")
    refused(path, "`split='train'`, but the source has no splits", split="train")
    refused(path, "`separator=';;'`, but it must be one character", separator=";;")
    refused(path, "`encoding='nonsense'` is not known", encoding="nonsense")
    with pytest.raises(ValueError, match="`max_seq_length=0`, but it must be at least 1"):
        check_pairs(load_pairs(path), max_seq_length=0)
    with pytest.raises(ValueError, match="`num_train_epochs=inf`"):
        check_pairs(load_pairs(path), num_train_epochs=float("inf"))


def test_paths_of_images_are_not_taken_for_texts(folder):
    path = written(folder, "caption,pic\nw,a.png\nx,b.png\ny,drawing.svg\nz,a.png\n")
    sides = {"query": "caption", "target": "pic"}
    refused(path, r"line 4, column 'pic' holds 'drawing.svg', but most cells .*`image_columns=\"pic\"`", **sides)
    assert load_pairs(path, **sides, image_columns=[])[2]["positive"] == {"text": "drawing.svg"}
    assert [bad.place for bad in check_pairs(load_pairs(path, **sides, image_columns="pic")).bad_images] == [
        "rows.csv, line 4"
    ]


def test_two_tables_of_one_folder(folder):
    written(folder, "file_name,text\na.png,x\n", "metadata.csv")
    written(folder, '{"file_name": "a.png", "text": "y"}\n', "metadata.jsonl")
    refused(folder, "holds metadata.csv, metadata.jsonl. Give the one to read")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"query": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_python_does_not_read(content, name, folder):
    refused(written(folder, content, name), rf"{name}.* is no JSON")


def test_columns_of_video_files_are_no_texts(folder):
    path = written(folder, "caption,video\na dog,a.mp4\na cat,sub/b.MKV\n")
    message = r"column 'video' holds 'a\.mp4': the column names video files, but tables hold texts and images"
    refused(path, message, query="caption", target="video")
    with pytest.raises(ValueError, match=message):
        load_inputs(path, columns="video")
    rows = load_pairs(path, query="caption", target="video", image_columns=[])
    assert rows[0]["positive"] == {"text": "a.mp4"}
