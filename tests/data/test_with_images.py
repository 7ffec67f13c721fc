"""Data sets of one's own: every stored form of an image, bad ones named by their row and put up with."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import DataLoader

from broken_images import broken_files, broken_paths, encoded
from tiny import picture, tiny_encoder
from unime_st.data import (
    ItemReader,
    bad_image_report,
    load_mined_negatives,
    load_mmeb_train,
    mine_hard_negatives,
    with_images,
)
from unime_st.losses import HardNegativeInfoNCELoss


def content(number):
    """A picture of its own, as a PNG."""
    buffer = io.BytesIO()
    picture((number, 9, 9), (20 + number, 20)).save(buffer, "png")
    return buffer.getvalue()


def number_of(image):
    assert image.size[0] - 20 == image.getpixel((image.size[0] - 1, 0))[0]
    return image.size[0] - 20


def stored(form, contents, folder):
    """A data set (anchor, positive) whose positives are stored in one of the forms; the options to read it."""
    texts = [f"number {place}" for place in range(len(contents))]
    names = [f"{place}.png" for place in range(len(contents))]
    if form in ("path", "image of path", "absolute", "cell of path"):
        for name, one in zip(names, contents, strict=True):
            (folder / name).write_bytes(one)
    text, image = Value("string"), ImageFeature()
    bytes_ = [{"bytes": one, "path": None} for one in contents]
    struct = {"image": image, "text": text}
    positives, feature, options = {
        "path": (names, text, {"image_columns": ["positive"], "image_root": folder}),
        "image of path": ([{"bytes": None, "path": name} for name in names], image, {"image_root": folder}),
        "absolute": ([{"bytes": None, "path": str(folder / name)} for name in names], image, {"image_root": folder}),
        "cell of path": ([{"image": name, "text": None} for name in names], {"image": text, "text": text},
                         {"image_root": folder}),
        "bytes": (bytes_, image, {}),
        "bytes undecoded": (bytes_, ImageFeature(decode=False), {}),
        "cell of bytes": ([{"image": one, "text": "x"} for one in bytes_], struct, {}),
        "list of cells": ([[{"image": one, "text": "x"}] for one in bytes_], List(struct), {}),
        "cell of a list": ([{"image": [one], "text": "x"} for one in bytes_], {"image": List(image), "text": text}, {}),
    }[form]  # fmt: skip
    features = Features({"anchor": text, "positive": feature})
    return Dataset.from_dict({"anchor": texts, "positive": positives}, features=features), options


FORMS = ("path", "image of path", "absolute", "cell of path", "bytes", "bytes undecoded", "cell of bytes",
         "list of cells", "cell of a list")  # fmt: skip


def image_in(value):
    while not hasattr(value, "getpixel"):
        value = value[0] if isinstance(value, list) else value["image"]
    return value


@pytest.mark.parametrize("form", FORMS)
def test_every_stored_form_opens_and_names_its_row(form, tmp_path):
    contents = [content(number) for number in range(4)]
    good, options = stored(form, contents, tmp_path)
    rows = with_images(good, **options)
    assert [number_of(image_in(value)) for value in rows[:]["positive"]] == [0, 1, 2, 3]
    assert rows[:]["anchor"] == good["anchor"][:]
    contents[2] = broken_files()["text-bomb.png"]
    bad, options = stored(form, contents, tmp_path)
    with pytest.raises(ValueError, match=r"^pets, row 2: Cannot read image .*Decompressed data too large"):
        with_images(bad, name="pets", **options)[:]
    log = tmp_path / "log.jsonl"
    rows = with_images(bad, name="pets", max_bad_images=1, bad_images_log=log, **options)
    read = rows[:]
    assert [number_of(image_in(value)) for value in read["positive"]] == [0, 1, 3, 3]
    assert read["anchor"] == ["number 0", "number 1", "number 3", "number 3"]
    assert bad_image_report(log) == {"pets": 1}
    assert json.loads(log.read_text())["row"] == 2
    assert image_in(rows[2]["positive"]).getextrema() == ((128, 128),) * 3  # alone: grey
    shuffled = with_images(bad.select([3, 2, 0, 1, 2]), name="pets", **options)
    with pytest.raises(ValueError, match=r"^pets, row 1: "):  # as the rows given are counted
        shuffled[:]


def test_every_kind_of_bad_image_is_put_up_with(tmp_path):
    files = broken_files()
    for name, one in files.items():
        (tmp_path / name).write_bytes(one)
    (tmp_path / "good.png").write_bytes(content(7))
    names = [*files, *broken_paths(tmp_path)]
    rows = Dataset.from_dict({"anchor": [*names, "good"], "positive": [*names, "good.png"]})
    log = tmp_path / "log.jsonl"
    given = {"image_root": tmp_path, "image_columns": ["positive"], "name": "own"}
    read = with_images(rows, max_bad_images=len(names), bad_images_log=log, **given)[:]
    assert read["anchor"] == ["good"] * (len(names) + 1)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["row"], line["image"]) for line in lines] == list(enumerate(names))
    strict = with_images(rows, **given)
    for row in range(len(names)):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^own, row {row}: "):
            strict[row]
    with pytest.raises(ValueError, match=rf"{len(names)} images cannot be opened, more than"):
        with_images(rows, max_bad_images=len(names) - 1, bad_images_log=log, **given)[:]


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "/etc/hostname", "C:\\secret.png"])
def test_paths_that_lead_out_stay_errors(path, tmp_path):
    (tmp_path / "root").mkdir()
    picture("red").save(tmp_path / "secret.png")
    (tmp_path / "root" / "link.png").symlink_to("../secret.png")
    rows = Dataset.from_dict({"anchor": ["a"], "positive": [path]})
    log = {"max_bad_images": 5, "bad_images_log": tmp_path / "log"}
    for options in ({}, log):
        with pytest.raises(ValueError, match=r"^own, row 0: .*leaves the image folder"):
            with_images(rows, image_root=tmp_path / "root", image_columns=["positive"], name="own", **options)[0]
        with pytest.raises(ValueError, match=r"^own, row 0: The data set names a file.*as `image_root`"):
            with_images(rows, image_columns=["positive"], name="own", **options)[0]
    assert with_images(rows)[0] == {"anchor": "a", "positive": path}  # a string is a text


def test_a_link_that_comes_later_is_seen(tmp_path):
    (tmp_path / "root").mkdir()
    for name in ("secret.png", "root/a.png"):
        picture("red").save(tmp_path / name)
    rows = Dataset.from_dict({"a": ["a.png"]})
    opened = with_images(rows, image_root=tmp_path / "root", image_columns=["a"])
    assert opened[0]["a"].size == (40, 30)
    (tmp_path / "root" / "a.png").unlink()
    (tmp_path / "root" / "a.png").symlink_to("../secret.png")
    with pytest.raises(ValueError, match="leaves the image folder"):
        opened[0]


def test_shapes_within_and_out_of_bounds(tmp_path):
    sizes = [(200, 1), (201, 1), (600, 3), (604, 3), (2, 401), (590, 3)]
    rows = Dataset.from_dict(
        {"a": [{"bytes": encoded("png", size), "path": f"{size}"} for size in sizes]},
        features=Features({"a": ImageFeature()}),
    )

    def refused(**options):
        reader = with_images(rows, **options)
        found = []
        for row in range(len(rows)):
            try:
                reader[row]
            except ValueError as error:
                assert "max_aspect_ratio" in str(error)  # noqa: PT017
                found.append(sizes[row])
        return found

    assert refused() == [(201, 1), (604, 3), (2, 401)]
    assert refused(max_aspect_ratio=None) == []
    assert refused(max_aspect_ratio=300) == []
    assert refused(max_aspect_ratio=2) == sizes
    assert refused(image_size=8) == []  # it is what the model gets that counts
    assert refused(max_pixels=150) == []
    assert (590, 3) in refused(max_pixels=1200)  # 485 x 2 then
    with pytest.raises(ValueError, match=r"`max_aspect_ratio=0\.5`"):
        ItemReader(max_aspect_ratio=0.5)
    with pytest.raises(ValueError, match="`max_aspect_ratio=nan`"):
        ItemReader(max_aspect_ratio=float("nan"))


def test_chats_and_other_parts_pass(tmp_path):
    chat = [[{"role": "user", "content": "a cat"}]]
    reader = ItemReader()
    assert reader({"a": chat, "b": [{"text": "x", "video": "v.mp4", "image": None}]}) == {
        "a": chat, "b": [{"text": "x", "video": "v.mp4"}],
    }  # fmt: skip
    assert reader({"a": [{"bytes": None, "path": None}]}) == {"a": [None]}


def test_what_is_refused(tmp_path):
    rows = Dataset.from_dict({"a": ["x"]})
    with pytest.raises(TypeError, match=r"IterableDataset.*stream"):
        with_images(IterableDataset.from_generator(lambda: iter([{"a": "x"}])))
    with pytest.raises(ValueError, match="has a transform already"):
        with_images(rows.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="no column b; it has a"):
        with_images(rows, image_columns=["b"])
    with pytest.raises(ValueError, match="needs `bad_images_log`"):
        with_images(rows, max_bad_images=1)


def test_workers_share_the_log_and_the_transform_travels(tmp_path):
    contents = [content(number) if number % 3 else b"no image" for number in range(12)]
    contents[9] = b"no picture"
    rows, options = stored("bytes", contents, tmp_path)
    log = tmp_path / "log.jsonl"
    read = pickle.loads(pickle.dumps(with_images(rows, name="x", max_bad_images=2, bad_images_log=log, **options)))
    loader = DataLoader(read, batch_size=4, num_workers=2, collate_fn=lambda batch: batch)
    assert [number_of(row["positive"]) for batch in loader for row in batch] == [1, 1, 2, 1, 4, 5, 7, 7, 8, 10, 10, 11]
    assert bad_image_report(log) == {"x": 2}  # of equal content


@pytest.mark.parametrize(("form", "workers"), [("bytes", 0), ("cell of path", 2), ("path", 0)])
def test_training_goes_on(form, workers, tmp_path):
    contents = [content(number) for number in range(12)]
    contents[3], contents[8] = broken_files()["thin.png"], broken_files()["icc-bomb.png"]
    rows, options = stored(form, contents, tmp_path)
    model = tiny_encoder("qwen2_vl", tmp_path / "model")
    log = tmp_path / "bad.jsonl"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=1, report_to="none", use_cpu=True,
        dataloader_num_workers=workers, save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    dataset = with_images(rows, name="own", max_bad_images=2, bad_images_log=log, **options)
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=None)
    result = SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss).train()
    assert result.global_step == 3
    assert np.isfinite(result.training_loss)
    assert any((weight != before[name]).any() for name, weight in model.state_dict().items())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((line["dataset"], line["row"]) for line in lines) == [("own", 3), ("own", 8)]


@pytest.mark.parametrize("form", ["bytes", "path"])
def test_mining_over_such_a_set(form, tmp_path):
    contents = [content(number) for number in range(6)]
    contents[4] = b"no image"
    rows, options = stored(form, contents, tmp_path)
    model = tiny_encoder("qwen2_vl", tmp_path / "model")
    dataset = with_images(rows, name="own", max_bad_images=1, bad_images_log=tmp_path / "log", **options)
    folder = mine_hard_negatives(dataset, model, tmp_path / "mined", num_negatives=2, margin=None)
    mined = load_mined_negatives(folder)
    assert len(mined) == 5
    read = mined if mined.format["type"] == "custom" else with_images(mined)
    for row in read:
        own = int(row["anchor"].split()[1])
        assert number_of(image_in(row["positive"])) == own
        others = {number_of(image_in(row[f"negative_{place}"])) for place in (1, 2)}
        assert own not in others
        assert len(others) == 2
    assert bad_image_report(tmp_path / "log") == {"own": 1}


def test_mmeb_training_data_put_up_with_the_same_kinds(tmp_path):
    (tmp_path / "A").mkdir()
    images = tmp_path / "images"
    images.mkdir()
    files = broken_files()
    for name, one in files.items():
        (images / name).write_bytes(one)
    (images / "good.png").write_bytes(content(7))
    names = [*files, *broken_paths(images)]
    columns = {"qry_image_path": "", "pos_text": ""}
    table = [{"qry": f"q{row}", **columns, "pos_image_path": name} for row, name in enumerate([*names, "good.png"])]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "A" / "original-0.parquet")
    log = tmp_path / "log.jsonl"
    read = load_mmeb_train(tmp_path, max_bad_images=len(names), bad_images_log=log)[:]
    assert {item["text"] for item in read["anchor"]} == {f"q{len(names)}"}
    assert [json.loads(line)["row"] for line in log.read_text().splitlines()] == list(range(len(names)))
    kept = load_mmeb_train(tmp_path, max_aspect_ratio=None)
    assert kept[names.index("thin.png")]["positive"]["image"].size == (1093, 5)
