"""Pairs from every format, column for column, and as the Trainer's loss takes them."""

import csv
import gc
import json
import pickle
import tracemalloc

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from tiny import picture, tiny_encoder
from unime_st.data import load_inputs, load_mined_negatives, load_pairs, mine_hard_negatives
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler

COLOURS = ("red", "green", "white", "yellow")


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")
    return folder


def rows_of(folder, end, *, columns=("caption", "image")):
    """A file of captions and images in one of the formats."""
    rows = [dict(zip(columns, (f"a {colour}, picture", f"{colour}.png"), strict=True)) for colour in COLOURS]
    path = folder / f"pairs{end}"
    if end == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif end == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif end == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if end == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def check_colours(pairs):
    """Each caption beside the image that it names."""
    assert len(pairs) == len(COLOURS)
    for row in pairs:
        colour = row["anchor"]["text"].split()[1].rstrip(",")
        shown = row["positive"]["image"]
        assert shown.getpixel((39, 0)) == picture(colour).getpixel((39, 0))
        assert set(row["anchor"]) == {"text"}
        assert set(row["positive"]) == {"image"}


@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file(end, photos):
    pairs = load_pairs(rows_of(photos, end))
    assert pairs.column_names == ["anchor", "positive"]
    check_colours(pairs)
    assert pairs[0]["anchor"]["text"] == "a red, picture"  # with its comma


def test_a_folder_of_images_with_captions_beside_them(photos):
    for colour in COLOURS:
        (photos / f"{colour}.txt").write_text(f"a {colour} picture\n")
    check_colours(load_pairs(photos))


@pytest.mark.parametrize("end", [".csv", ".jsonl"])
def test_a_folder_with_metadata_as_imagefolder_has(end, photos):
    rows_of(photos, end, columns=("text", "file_name")).rename(photos / f"metadata{end}")
    check_colours(load_pairs(photos))


def test_a_folder_with_one_table(photos):
    rows_of(photos, ".csv")
    for colour in COLOURS:
        (photos / f"{colour}.png").rename(photos.parent / f"{colour}.png")
    check_colours(load_pairs(photos, image_root=photos.parent))


@pytest.mark.parametrize("stored", ["data set", "saved", "splits", "parquet"])
def test_data_sets_that_hold_their_images(stored, photos, tmp_path):
    features = Features({"image": Image(), "text": Value("string")})
    cells = [{"bytes": (photos / f"{colour}.png").read_bytes(), "path": None} for colour in COLOURS]
    rows = Dataset.from_dict({"image": cells, "text": [f"a {colour} picture" for colour in COLOURS]}, features=features)
    source, options = rows, {}
    if stored == "saved":
        source = tmp_path / "saved"
        rows.save_to_disk(source)
    elif stored == "splits":
        source, options = tmp_path / "saved", {"split": "train"}
        DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(source)
    elif stored == "parquet":
        source = tmp_path / "rows.parquet"
        rows.to_parquet(source)
    pairs = load_pairs(source, **options)
    check_colours(pairs)
    assert pairs.with_format(None)[0]["positive"]["image"]["bytes"] == cells[0]["bytes"]  # as it is, not encoded anew
    check_colours(load_pairs(rows.select([3, 1, 0, 2])))
    check_colours(load_pairs(rows.with_transform(None)))


@pytest.mark.parametrize(
    ("columns", "query", "target"),
    [
        (["query", "document"], {"text": "0"}, {"text": "1"}),
        (["anchor", "positive"], {"text": "0"}, {"text": "1"}),
        (["title", "text"], {"text": "0"}, {"text": "1"}),
        (["text", "title"], {"text": "1"}, {"text": "0"}),
        (["image", "caption"], {"text": "1"}, {"image": "0"}),
        (["Image", "Question", "Answer"], {"image": "0", "text": "1"}, {"text": "2"}),
        (["query_text", "query_image", "target_text"], {"image": "1", "text": "0"}, {"text": "2"}),
        (["query", "image"], {"text": "0"}, {"image": "1"}),
        (["query", "image", "title"], {"text": "0"}, {"image": "1", "text": "2"}),
        (["image", "answer"], {"image": "0"}, {"text": "1"}),
        (["image", "question", "answer"], {"image": "0", "text": "1"}, {"text": "2"}),
        (["query_image", "query", "target_image"], {"image": "0", "text": "1"}, {"image": "2"}),
        (["question", "answer", "image_id"], {"text": "0"}, {"text": "1"}),
    ],
)
def test_usual_names(columns, query, target):
    rows = Dataset.from_dict({name: [str(place)] for place, name in enumerate(columns)})
    stored = load_pairs(rows, image_root=".").with_format(None)[0]
    assert {name: value for name, value in stored["anchor"].items() if value} == query
    assert {name: value for name, value in stored["positive"].items() if value} == target


def test_names_that_are_given(photos):
    rows_of(photos, ".csv", columns=("wort", "bild"))
    check_colours(load_pairs(photos / "pairs.csv", query="wort", target="bild"))  # images by what is in the column
    other_way = load_pairs(photos / "pairs.csv", query="bild", target="wort")
    assert other_way[0]["anchor"]["image"].size == (40, 30)
    words = load_pairs(photos / "pairs.csv", query="bild", target="wort", image_columns=[])
    assert words[0]["anchor"] == {"text": "red.png"}


def test_several_columns_are_joined(photos):
    rows = [{"a": "green.png", "b": "red.png", "t": "one", "u": "two", "answer": "x"}]
    rows += [{"a": None, "b": "white.png", "t": " ", "u": "three", "answer": "y"}]
    (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_pairs(photos / "rows.jsonl", query=["a", "t", "b", "u"])
    first, second = pairs[0]["anchor"], pairs[1]["anchor"]
    assert first["text"] == "one\ntwo"
    assert [image.getpixel((39, 0)) for image in first["image"]] == [(0, 128, 0), (255, 0, 0)]
    assert second["text"] == "three"
    assert [image.getpixel((39, 0)) for image in second["image"]] == [(255, 255, 255)]


@pytest.mark.parametrize("form", ["jsonl", "data set"])
def test_lists_become_rows_with_one_label(form, tmp_path):
    columns = {"question": [["a", "b"], ["c"], ["d"]], "answer": [["x", "y"], ["z"], []]}
    source = Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, List(Value("string")))))
    if form == "jsonl":
        source.to_json(tmp_path / "rows.jsonl")
        source = tmp_path / "rows.jsonl"
    pairs = load_pairs(source)
    told = [(row["anchor"].get("text"), row["positive"].get("text"), row["label"]) for row in pairs]
    assert told == [("a", "x", 0), ("a", "y", 0), ("b", "x", 0), ("b", "y", 0), ("c", "z", 1), ("d", None, 2)]
    for batch in FalseNegativeAwareBatchSampler(pairs, batch_size=2, drop_last=True):
        assert len({pairs[row]["label"] for row in batch}) == 2


def test_lists_of_stored_images(photos):
    cells = [{"bytes": (photos / f"{colour}.png").read_bytes(), "path": None} for colour in COLOURS]
    features = Features({"query": Value("string"), "image": List(Image())})
    rows = Dataset.from_dict({"query": ["q", "r"], "image": [cells[:3], cells[3:]]}, features=features)
    pairs = load_pairs(rows)
    assert [row["label"] for row in pairs] == [0, 0, 0, 1]
    shown = [row["positive"]["image"].getpixel((39, 0)) for row in pairs]
    assert shown == [picture(colour).getpixel((39, 0)) for colour in COLOURS]


def test_explicit_negatives_and_labels(tmp_path):
    columns = ["query", "target", "negative_2", "negative_1", "label"]
    (tmp_path / "rows.csv").write_text(",".join(columns) + "\na,x,n,m,p7\nb,y,,k,p8\nc,z,l,,p7\nd,w,o,,\n")
    pairs = load_pairs(tmp_path / "rows.csv")
    assert pairs.column_names == ["anchor", "positive", "negative_1", "negative_2", "label"]
    found = [(row["negative_1"]["text"], row["negative_2"]["text"], row["label"]) for row in pairs]
    assert found == [("n", "m", 0), ("k", "k", 1), ("l", "l", 0), ("o", "o", 2)]
    one = load_pairs(tmp_path / "rows.csv", num_negatives=1, label="query")
    assert one.column_names == ["anchor", "positive", "negative_1", "label"]
    assert [row["label"] for row in one] == [0, 1, 2, 3]
    assert load_pairs(tmp_path / "rows.csv", negatives=[]).column_names == ["anchor", "positive", "label"]


def test_lists_of_negatives(tmp_path):
    rows = [{"query": "a", "target": ["x", "y"], "negatives": ["k", "l"]}]
    rows += [{"query": "b", "target": "z", "negatives": "m"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_pairs(tmp_path / "rows.jsonl")
    told = [(row["positive"]["text"], row["negative_1"]["text"], row["negative_2"]["text"]) for row in found]
    assert told == [("x", "k", "l"), ("y", "k", "l"), ("z", "m", "m")]


def test_a_text_that_names_a_file_stays_a_text(photos, monkeypatch):
    monkeypatch.chdir(photos)
    pairs = load_pairs(Dataset.from_dict({"query": ["what is red.png?", "red.png"], "target": ["a", "b"]}),
                       image_columns=[])  # fmt: skip
    assert pairs[1]["anchor"] == {"text": "red.png"}


def test_addresses_pass_when_asked_for(photos):
    rows = Dataset.from_dict({"caption": ["a", "b"], "image": ["https://a.org/b.png", "red.png"]})
    pairs = load_pairs(rows, image_root=photos, allow_remote_images=True)
    assert pairs[0]["positive"] == {"image": "https://a.org/b.png"}
    assert pairs[1]["positive"]["image"].size == (40, 30)


def test_dropped_rows_keep_the_lines_of_the_others(photos):
    (photos / "rows.csv").write_text("caption,image\na,red.png\n,green.png\nc,none.png\nd,white.png\n")
    pairs = load_pairs(photos / "rows.csv", bad_images="drop", empty_cells="drop")
    assert [row["anchor"]["text"] for row in pairs] == ["a", "d"]
    (photos / "white.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\.csv, line 5: There is no image 'white\.png'"):
        pairs[1]


def test_they_go_to_workers(photos):
    pairs = load_pairs(rows_of(photos, ".csv"))
    check_colours(pickle.loads(pickle.dumps(pairs)))


def test_training_on_them_changes_weights_and_needs_the_images(photos, tmp_path):
    rows_of(photos, ".csv")
    pairs = load_pairs(photos / "pairs.csv")
    model = tiny_encoder("qwen2_vl", tmp_path / "model", peft_config=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, batch_sampler=FalseNegativeAwareBatchSampler,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model)
    SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss).train()
    changed = {name for name, weight in model.state_dict().items() if (weight != before[name]).any()}
    assert changed
    assert all("lora" in name for name in changed)
    seen = model.encode([row["positive"] for row in pairs])
    assert all(abs(seen[0] - other).max() > 1e-4 for other in seen[1:])  # a model that ignores its image fails


def test_inputs_to_encode(photos):
    rows_of(photos, ".csv")
    (photos / "ids.csv").write_text("id,title,image\np1,a bus,red.png\np2,,green.png\np3,,\n")
    found = list(load_inputs(photos / "ids.csv", columns=["image", "title"], id_column="id"))
    assert [name for name, _ in found] == ["p1", "p2"]
    assert found[0][1] == {"image": str(photos / "red.png"), "text": "a bus"}
    assert [name for name, _ in load_inputs(photos / "pairs.csv")] == [f"{colour}.png" for colour in COLOURS]
    assert dict(load_inputs(photos / "pairs.csv", columns="caption"))["a red, picture"] == {"text": "a red, picture"}
    (photos / "pairs.csv").unlink()
    assert len(load_inputs(photos)) == 4


def test_negatives_are_mined_over_them(photos, tmp_path):
    rows_of(photos, ".csv")
    model = tiny_encoder("qwen2_vl", tmp_path / "model")
    folder = mine_hard_negatives(
        load_pairs(photos / "pairs.csv"), model, tmp_path / "mined", num_negatives=2, margin=None
    )
    mined = load_mined_negatives(folder)
    assert mined.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    for row in mined:
        shown = [row[name]["image"].getpixel((39, 0)) for name in mined.column_names[1:]]
        assert len(set(shown)) == 3
        assert shown[0] == picture(row["anchor"]["text"].split()[1].rstrip(",")).getpixel((39, 0))


def test_images_in_a_file_stay_in_the_file(tmp_path):
    features = Features({"image": Image(), "text": Value("string")})
    images = [{"bytes": bytes([number]) * 1_000_000, "path": None} for number in range(60)]
    rows = Dataset.from_dict({"image": images, "text": [f"t{number}" for number in range(60)]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    del rows, images
    gc.collect()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        pairs = load_pairs(tmp_path / "saved")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + pa.total_allocated_bytes() - before < 10_000_000
    assert pairs.with_format(None)[7]["positive"]["image"]["bytes"] == bytes([7]) * 1_000_000
    assert len(pickle.dumps(pairs.format["format_kwargs"]["transform"])) < 1_000_000


def test_long_cells(tmp_path):
    (tmp_path / "rows.csv").write_text(f"query,target\n{'a' * 300_000},b\nc,d\n")
    assert len(load_pairs(tmp_path / "rows.csv")[0]["anchor"]["text"]) == 300_000
    assert csv.field_size_limit() == 131072  # as it was
