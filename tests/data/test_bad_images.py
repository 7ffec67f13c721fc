"""Missing and damaged images at training time: reported by data set, and put up with up to a limit."""

import json
import logging
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import DataLoader

from tiny import picture, tiny_encoder
from tiny_data import COLOURS
from unime_st.columns import SUBSET, training_columns
from unime_st.data import ItemReader, bad_image_report, load_mmeb_train
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler

ROWS = 8


@pytest.fixture
def root(tmp_path):
    """Two data sets of `ROWS` rows: images to texts and texts to images; five images do not open."""
    for name in ("I2T", "T2I"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / name).mkdir()
        rows = []
        for number in range(ROWS):
            path = f"{name}/{number}.png"
            picture(COLOURS[number], (20 + number, 20)).save(tmp_path / "images" / path)
            query, positive = ("<|image_1|>\nWhich?", path), (f"{name} {number}", "")
            if name == "T2I":
                query, positive = positive, query
            rows.append(
                {
                    "qry": query[0],
                    "qry_image_path": query[1],
                    "pos_text": positive[0],
                    "pos_image_path": positive[1],
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "original-00000-of-00001.parquet")
    for path in ("I2T/0.png", "I2T/3.png", "T2I/1.png"):
        (tmp_path / "images" / path).unlink()
    (tmp_path / "images" / "I2T" / "4.png").write_bytes(b"no image")
    whole = (tmp_path / "images" / "T2I" / "7.png").read_bytes()
    (tmp_path / "images" / "T2I" / "7.png").write_bytes(whole[: len(whole) - 40])
    return tmp_path


def load(root, limit=5, **options):
    return load_mmeb_train(root, max_bad_images=limit, bad_images_log=root / "logs" / "bad.jsonl", **options)


def numbers(batch):
    """Which rows a batch holds, told by their texts, anchors and positives checked to go together."""
    found = []
    for anchor, positive in zip(batch["anchor"], batch["positive"], strict=True):
        text = next(item["text"] for item in (anchor, positive) if item["text"] != "Which?")
        image = next(item["image"] for item in (anchor, positive) if "image" in item)
        assert image.size[0] - 20 == int(text.split()[1])
        found.append(text)
    return found


def test_rows_with_bad_images_become_copies_of_others(root, caplog):
    dataset = load(root)
    with caplog.at_level(logging.WARNING):
        assert numbers(dataset[:ROWS]) == [f"I2T {number}" for number in (1, 1, 2, 5, 5, 5, 6, 7)]
        assert numbers(dataset[[15, 14, 9]]) == ["T2I 6", "T2I 6", "T2I 6"]  # after the last comes the first
    assert "I2T, row 4 of original-00000-of-00001.parquet: Cannot read image" in caplog.text
    lines = [json.loads(line) for line in (root / "logs" / "bad.jsonl").read_text().splitlines()]
    assert [(line["dataset"], line["row"], line["image"]) for line in lines] == [
        ("I2T", 0, "I2T/0.png"), ("I2T", 3, "I2T/3.png"), ("I2T", 4, "I2T/4.png"),
        ("T2I", 7, "T2I/7.png"), ("T2I", 1, "T2I/1.png"),
    ]  # fmt: skip
    assert "no image 'I2T/0.png'" in lines[0]["error"]
    assert "Cannot read image" in lines[3]["error"]
    assert bad_image_report(root / "logs" / "bad.jsonl") == {"I2T": 3, "T2I": 2}
    dataset[:ROWS], load(root)[:ROWS]  # neither the same reader nor another run writes them again
    assert len((root / "logs" / "bad.jsonl").read_text().splitlines()) == 5


def test_labels_and_lists_move_with_their_row(root):
    batch = load(root, label=True)[:ROWS]
    assert batch["label"][0] == batch["label"][1] != batch["label"][2]
    reader = ItemReader(root / "images", max_bad_images=1, bad_images_log=root / "log")
    cells = [[{"image": f"I2T/{number}.png"}, {"text": "x"}] for number in (3, 5)]
    read = reader({"candidates": cells, "label": [3, 5]})
    assert read["label"] == [5, 5]
    assert [item["image"].size[0] for item, _ in read["candidates"]] == [25, 25]
    assert bad_image_report(root / "log") == {"unknown": 1}


def test_more_than_the_limit_is_an_error_that_counts(root):
    dataset = load(root, limit=3)
    dataset[:ROWS]
    advice = (
        r"4 images cannot be opened, more than `max_bad_images=3` allows: I2T 3, T2I 1\. .*delete that log, or raise"
    )
    with pytest.raises(ValueError, match=advice):
        dataset[ROWS:]
    with pytest.raises(ValueError, match=advice):  # a run that is started again is no cheaper
        load(root, limit=3)[:ROWS]
    assert load(root, limit=4)[:ROWS]
    with (root / "logs" / "bad.jsonl").open("a") as log:
        log.write('{"dataset": "I2T", "ima')  # a full disk
    assert bad_image_report(root / "logs" / "bad.jsonl") == {"I2T": 3, "T2I": 1}


def test_what_stays_an_error(root):
    with pytest.raises(FileNotFoundError, match=r"I2T, row 0 of .*no image 'I2T/0.png'"):
        load_mmeb_train(root)[:ROWS]
    with pytest.raises(ValueError, match=r"None of the 2 rows .* Larger batches"):
        load(root)[[0, 3]]
    with pytest.raises(ValueError, match="needs `bad_images_log`"):
        load_mmeb_train(root, max_bad_images=2)
    with pytest.raises(ValueError, match="must be 0 or more"):
        load(root, limit=-1)
    with pytest.raises(ValueError, match="leaves the image folder"):
        ItemReader(root / "images", max_bad_images=9, bad_images_log=root / "log")({"a": [{"image": "../x.png"}]})


def test_a_row_drawn_alone_shows_grey(root):
    item = load(root)[0]["anchor"]
    assert item["text"] == "Which?"
    assert item["image"].getextrema() == ((128, 128),) * 3
    assert bad_image_report(root / "logs" / "bad.jsonl") == {"I2T": 1}


def test_looking_ahead(root):
    with pytest.raises(FileNotFoundError, match=r"I2T, row 0 of .*no image"):
        load(root, limit=0, check_images=True)
    log = root / "logs" / "bad.jsonl"
    load(root, check_images=True)
    assert bad_image_report(log) == {"I2T": 2, "T2I": 1}
    load(root, check_images="open")
    assert bad_image_report(log) == {"I2T": 3, "T2I": 2}
    with pytest.raises(ValueError, match="more than `max_bad_images=4`"):
        load(root, limit=4, check_images="open")


def test_workers_share_the_log(root):
    dataset = pickle.loads(pickle.dumps(load(root, subset_column=True)))
    assert dataset.column_names[-1] == SUBSET
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=lambda rows: rows)
    rows = [row for batch in loader for row in batch]
    assert len(rows) == 2 * ROWS
    assert {tuple(row) for row in rows} == {("anchor", "positive")}
    assert bad_image_report(root / "logs" / "bad.jsonl") == {"I2T": 3, "T2I": 2}
    limited = DataLoader(load(root, limit=2), batch_size=4, num_workers=2, collate_fn=lambda rows: rows)
    with pytest.raises(ValueError, match=r"5 images cannot be opened, more than `max_bad_images=2`"):
        list(limited)


def test_subsets_are_stored_and_never_drawn(root):
    dataset = load(root, subset_column=True, label=True)
    assert dataset.with_format(None)[SUBSET][:] == ["I2T"] * ROWS + ["T2I"] * ROWS
    assert list(dataset[1]) == ["anchor", "positive", "label"]
    assert training_columns(dataset.column_names).negatives == ()
    dataset[:ROWS]
    assert bad_image_report(root / "logs" / "bad.jsonl") == {"I2T": 3}


def test_training_goes_on(root):
    dataset = load(root, subset_column=True)
    model = tiny_encoder("qwen2_vl", root / "model")
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=2, margin=None, mini_batch_size=2)
    args = SentenceTransformerTrainingArguments(
        str(root / "out"), per_device_train_batch_size=8, num_train_epochs=2, report_to="none", use_cpu=True,
        dataloader_num_workers=1, save_strategy="no", disable_tqdm=True, batch_sampler=FalseNegativeAwareBatchSampler,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss)
    result = trainer.train()
    assert result.global_step >= 2
    assert 0 < result.training_loss < 100
    assert bad_image_report(root / "logs" / "bad.jsonl") == {"I2T": 3, "T2I": 2}
