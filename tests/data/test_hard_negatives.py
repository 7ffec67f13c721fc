"""Mining against a plain loop, and its way into the loss."""

import hashlib
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from packaging import version
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from tiny import picture, tiny_encoder
from tiny_data import COLOURS
from unime_st import functional
from unime_st.data import bad_image_report, load_mined_negatives, load_mmeb_train, mine_hard_negatives
from unime_st.data.mining import files as mining_files
from unime_st.fingerprint import content_id
from unime_st.losses import HardNegativeInfoNCELoss


def vector(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=6).astype(np.float32)


class Hashing(torch.nn.Module):
    """Embeds a text as random numbers of its own, and notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def encode(self, texts, *, prompt="", **options):
        self.asked += [prompt + text for text in texts]
        return np.stack([vector(prompt + text) for text in texts])


def cosine(a, b):
    a, b = vector(a), vector(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def training_set(rows=90, label=True, subset=True, seed=0):
    """Repeated queries and targets, targets that are queries, explicit negatives, labels, data sets."""
    draw = np.random.default_rng(seed).integers
    columns = {
        "anchor": [f"q{draw(0, 60)}" for _ in range(rows)],
        "positive": [f"t{draw(0, 50)}" if draw(0, 8) else f"q{draw(0, 60)}" for _ in range(rows)],
        "negative_1": [f"t{draw(0, 70)}" for _ in range(rows)],
    }
    columns |= {"label": [int(draw(0, 40)) for _ in range(rows)]} if label else {}
    columns |= {"subset": [f"s{row // (rows // 3)}" for row in range(rows)]} if subset else {}
    return Dataset.from_dict(columns)


def oracle(dataset, *, n, margin, low=0, high=None, by_subset=True):
    """The valid negatives of each row, hardest first, by loops over rows."""
    rows = list(dataset)
    group = [row.get("subset") if by_subset else None for row in rows]
    mined = []
    for i, row in enumerate(rows):
        right = {row["anchor"]}
        for other in rows:
            if other["anchor"] == row["anchor"] or ("label" in row and other["label"] == row["label"]):
                right.add(other["positive"])
        candidates = {
            rows[j][name] for j in range(len(rows)) if group[j] == group[i] for name in ("positive", "negative_1")
        }
        scores = {text: cosine(row["anchor"], text) for text in candidates - right}
        limit = np.inf if margin is None else cosine(row["anchor"], row["positive"]) + margin
        valid = sorted((text for text in scores if scores[text] <= limit), key=scores.get, reverse=True)
        mined.append(valid[low:high][:n])
    return mined


def negatives_of(dataset):
    names = [name for name in dataset.column_names if name.startswith("negative_")]
    return [[row[name] for name in names] for row in dataset]


@pytest.mark.parametrize("search", ["exact", "faiss"])
@pytest.mark.parametrize(
    ("kinds", "options", "expected"),
    [
        ({}, {"margin": 0.1}, {"margin": 0.1}),
        ({"label": False}, {"margin": -0.1}, {"margin": -0.1}),
        ({"subset": False}, {"margin": None, "range_min": 3, "range_max": 8}, {"margin": None, "low": 3, "high": 8}),
        ({}, {"margin": 0.3, "by_subset": False}, {"margin": 0.3, "by_subset": False}),
    ],
)
def test_mined_negatives_are_those_of_a_plain_loop(tmp_path, monkeypatch, caplog, search, kinds, options, expected):
    monkeypatch.setattr("unime_st.embedding.neighbors._BLOCK", 16)
    dataset = training_set(**kinds)
    model = Hashing()
    with caplog.at_level(logging.INFO):
        folder = mine_hard_negatives(
            dataset,
            model,
            tmp_path / "mined",
            num_negatives=5,
            rows_per_file=40,
            shard_size=16,
            search=search,
            **options,
        )
    wanted = oracle(dataset, n=5, **expected)
    kept = [row for row, texts in enumerate(wanted) if texts]
    short = [row for row in kept if len(wanted[row]) < 5]
    mined = load_mined_negatives(folder)
    assert len(list(folder.glob("part-*.parquet"))) == 3
    assert mined["anchor"][:] == [dataset[row]["anchor"] for row in kept]
    assert mined["positive"][:] == [dataset[row]["positive"] for row in kept]
    assert negatives_of(mined) == [[wanted[row][k % len(wanted[row])] for k in range(5)] for row in kept]
    names = ["anchor", "positive", *(f"negative_{k}" for k in range(1, 6))]
    assert mined.column_names == [*names, *(name for name in ("label", "subset") if name in dataset.column_names)]
    assert list(mined[0]) == [name for name in mined.column_names if name != "subset"]  # which is no negative
    assert len(kept) > 60
    distinct = set(dataset["anchor"]) | set(dataset["positive"]) | set(dataset["negative_1"])
    assert sorted(model.asked) == sorted(distinct)  # each once, whether it is a query, a target or both
    assert f"Mined negatives for {len(kept)} of 90 rows, {len(short)} of them with fewer" in caplog.text
    assert str(folder) in caplog.records[-1].getMessage()
    dropping = mine_hard_negatives(
        dataset, model, tmp_path / "dropped", num_negatives=5, too_few="drop", search=search, **options
    )
    whole = [texts for texts in wanted if len(texts) == 5]
    assert negatives_of(load_mined_negatives(dropping)) == whole
    assert short or kinds or options["margin"] == 0.3


def test_the_rule_is_the_losses(tmp_path):
    """The scores that the loss would choose with the whole set for its batch."""
    dataset = training_set(subset=False, seed=3)
    folder = mine_hard_negatives(dataset, Hashing(), tmp_path, num_negatives=6, margin=0.1)
    columns = [dataset[name][:] for name in ("anchor", "positive", "negative_1")]
    ids = [torch.tensor([content_id(text) for text in column]) for column in columns]
    embeddings = [torch.tensor(np.stack([vector(text) for text in column])) for column in columns]
    chosen = functional.hardest_valid_negatives(
        functional.cosine_scores(embeddings[0], torch.cat(embeddings[1:])), torch.arange(len(dataset)), 6, 0.1,
        candidate_ids=torch.cat(ids[1:]), query_ids=ids[0], labels=torch.tensor(dataset["label"][:]),
    ).scores  # fmt: skip
    mined = load_mined_negatives(folder)
    whole = (chosen > -torch.inf).any(dim=1).numpy()
    assert len(mined) == whole.sum()
    full = 0
    for row, scores in zip(mined, chosen[torch.from_numpy(whole)], strict=True):
        own = [cosine(row["anchor"], row[f"negative_{k}"]) for k in range(1, 7)]
        there = scores[scores > -torch.inf].tolist()
        np.testing.assert_allclose(own[: len(there)], there, atol=1e-5)
        full += len(there) == 6
    assert full > 40


def test_drawn_negatives_are_valid_and_the_same_again(tmp_path):
    dataset = training_set()
    options = {"num_negatives": 3, "sampling_strategy": "random", "range_max": 12, "margin": None}
    wanted = oracle(dataset, n=12, high=12, margin=None)
    found = [
        negatives_of(
            load_mined_negatives(mine_hard_negatives(dataset, Hashing(), tmp_path / name, seed=seed, **options))
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert found[0] == found[1] != found[2]
    for texts, valid in zip(found[0], wanted, strict=True):
        assert [text for text in valid if text in texts] == texts  # of the twelve, in their order
    assert sum(texts != valid[:3] for texts, valid in zip(found[0], wanted, strict=True)) > 60


def test_prompts_and_changed_settings(tmp_path):
    dataset, model = training_set(), Hashing()
    options = {"num_negatives": 2, "query_prompt": "Q: "}
    mine_hard_negatives(dataset, model, tmp_path, **options)
    assert {text for text in model.asked if text.startswith("Q: ")} == {f"Q: {text}" for text in dataset["anchor"]}
    again = Hashing()
    mine_hard_negatives(dataset, again, tmp_path, **options)
    assert again.asked == []
    for changed, name in (({"margin": 0.2}, "margin"), ({"corpus_prompt": "x"}, "corpus_prompt")):
        with pytest.raises(ValueError, match=rf"mined otherwise: {name} differ. Give another `output_dir`"):
            mine_hard_negatives(dataset, model, tmp_path, **options, **changed)
    with pytest.raises(ValueError, match="mined otherwise: data differ"):
        mine_hard_negatives(dataset.select(range(80)), model, tmp_path, **options)


def test_errors(tmp_path):
    dataset, model = training_set(), Hashing()
    for options, advice in (
        ({"num_negatives": 0}, "at least 1"),
        ({"num_negatives": 5, "range_max": 4}, "leave too few ranks.*Raise `range_max`"),
        ({"too_few": "keep"}, "must be one of repeat, drop"),
        ({"margin": -3.0}, "None of 90 rows has a valid negative. Raise `margin`"),
    ):
        with pytest.raises(ValueError, match=advice):
            mine_hard_negatives(dataset, model, tmp_path / str(options), **options)
    with pytest.raises(ValueError, match=r"needs the columns \(anchor, positive\) and rows"):
        mine_hard_negatives(dataset.select_columns(["anchor"]), model, tmp_path)
    with pytest.raises(ValueError, match="made by a transform"):
        mine_hard_negatives(dataset.with_transform(dict), model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has not ended.*goes on where it was"):
        load_mined_negatives(tmp_path)
    model.encode = lambda texts, **options: np.full((len(texts), 2), np.nan)
    with pytest.raises(ValueError, match=r"not finite.*or remove the row"):
        mine_hard_negatives(dataset, model, tmp_path / "nan")


@pytest.fixture
def root(tmp_path):
    """Text and image pairs in MMEB's layout: two drawings of a colour are equal but for their path."""
    (tmp_path / "images").mkdir()
    for name in ("I2T", "T2I"):
        (tmp_path / name).mkdir()
        rows = []
        for number, colour in enumerate(COLOURS):
            for copy in ("a", "b"):
                path = f"{name}{colour}{copy}.png"
                picture(colour).save(tmp_path / "images" / path)
                image, text = ("<|image_1|>", path), (f"{colour} thing {number}", "")
                query, positive = (image, text) if name == "I2T" else (text, image)
                rows.append(
                    {
                        "qry": query[0],
                        "qry_image_path": query[1],
                        "pos_text": positive[0],
                        "pos_image_path": positive[1],
                    }
                )
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "original-00000-of-00001.parquet")
    return tmp_path


def test_images_stay_paths_and_equal_files_are_one_content(root):
    model = tiny_encoder("qwen2_vl", root / "model")
    dataset = load_mmeb_train(root, label=True, subset_column=True)
    folder = mine_hard_negatives(dataset, model, root / "mined", num_negatives=3, margin=None, batch_size=4)
    mined = load_mined_negatives(folder, max_pixels=900)
    stored = mined.with_format(None)
    assert stored["anchor"][:] == dataset.with_format(None)["anchor"][:]
    assert stored.features["negative_1"] == stored.features["positive"]
    for row in stored:
        paths = [row[f"negative_{k}"]["image"] for k in (1, 2, 3)]
        if row["subset"] == "T2I":
            colours = [path.removeprefix("T2I")[:-5] for path in paths]
            own = row["positive"]["image"].removeprefix("T2I")[:-5]
            assert len({*colours, own}) == 4  # neither the own colour's other file, nor both files of another
        else:
            assert paths == [None] * 3
            assert len({row[f"negative_{k}"]["text"] for k in (1, 2, 3)} | {row["positive"]["text"]}) == 4
    drawn = mined[[0, 20]]
    assert drawn["anchor"][0]["image"].size[0] * drawn["anchor"][0]["image"].size[1] <= 900
    assert list(drawn["negative_2"][1]) == ["image"]
    assert list(drawn) == ["anchor", "positive", "negative_1", "negative_2", "negative_3", "label"]


def test_rows_with_bad_images_are_left_out_and_reported(root):
    (root / "images" / "T2Iredb.png").write_bytes(b"no image")
    (root / "images" / "T2Ireda.png").unlink()
    (root / "images" / "I2Tpinka.png").unlink()
    model = tiny_encoder("qwen2_vl", root / "model")
    log = root / "bad.jsonl"
    dataset = load_mmeb_train(root, subset_column=True, max_bad_images=3, bad_images_log=log)
    folder = mine_hard_negatives(dataset, model, root / "mined", num_negatives=2, margin=None)
    assert bad_image_report(log) == {"T2I": 2, "I2T": 1}
    assert json.loads((folder / "mined.json").read_text())["without_negatives"] == 3
    mined = load_mined_negatives(folder)
    assert len(mined) == len(dataset) - 3
    paths = [cell["image"] for row in mined.with_format(None) for cell in row.values() if isinstance(cell, dict)]
    assert not {"T2Iredb.png", "T2Ireda.png", "I2Tpinka.png"} & set(paths)
    with pytest.raises((ValueError, FileNotFoundError), match=r"T2I, row .*(Cannot read|no) image"):
        mine_hard_negatives(load_mmeb_train(root, ["T2I"]), model, root / "strict", num_negatives=2)


def test_mined_negatives_reach_the_loss(root, monkeypatch):
    model = tiny_encoder("qwen2_vl", root / "model")
    folder = mine_hard_negatives(load_mmeb_train(root), model, root / "mined", num_negatives=2, margin=None)
    mined = load_mined_negatives(folder)
    seen = []

    class Spying(HardNegativeInfoNCELoss):
        def forward(self, sentence_features, labels=None):
            columns = list(sentence_features)
            seen.extend(zip(*(column["content_id"].tolist() for column in columns), strict=True))
            return super().forward(columns, labels)

        def compute_loss(self, embeddings, targets):
            assert len(embeddings) == 4
            return super().compute_loss(embeddings, targets)

    args = SentenceTransformerTrainingArguments(
        str(root / "out"), per_device_train_batch_size=8, num_train_epochs=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = Spying(model, num_hard_negatives=2, margin=None)
    SentenceTransformerTrainer(model, args, train_dataset=mined, loss=loss).train()
    expected = [tuple(content_id(item) for item in row.values()) for row in mined]
    assert len(seen) == len(expected) == 32
    assert sorted(seen) == sorted(expected)
    assert float(loss.last_metrics["rows_without_negatives"]) == 0


def options(folder, **changes):
    return {"output_dir": folder, "num_negatives": 2, "rows_per_file": 30, **changes}


def mined_rows(folder):
    return load_mined_negatives(folder)[:]


def test_no_flipped_or_missing_byte_of_a_mined_file_is_served(tmp_path):
    """A part that is damaged is mined again, and what is loaded meanwhile is refused by name."""
    dataset, folder = training_set(rows=12), tmp_path / "mined"
    mine_hard_negatives(dataset, Hashing(), **options(folder, rows_per_file=6))
    expected, parts = mined_rows(folder), sorted(folder.glob("part-*.parquet"))
    served = refused = 0
    for path in (parts[1], folder / "mined.json"):
        good = path.read_bytes()
        for place in range(0, len(good), 3):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
            try:
                found = mined_rows(folder)
            except ValueError as error:
                refused += f"{path} is damaged" in str(error) and "with the same arguments again" in str(error)
            else:
                assert found == expected, (path, place)
                served += 1
        for length in (0, 5, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:length])
            with pytest.raises(ValueError, match=f"{path.name} is damaged"):
                mined_rows(folder)
        path.write_bytes(good)
    assert refused > 500
    assert served < refused  # of parquet's footer, much is for nobody


@pytest.mark.parametrize("harm", [lambda data: data[:-40], lambda data: data[:200] + b"?" + data[201:], lambda _: b""])
def test_a_damaged_file_alone_is_mined_again(tmp_path, caplog, harm):
    dataset, folder = training_set(), tmp_path / "mined"
    mine_hard_negatives(dataset, Hashing(), **options(folder))
    expected, parts = mined_rows(folder), sorted(folder.glob("part-*.parquet"))
    before = [path.read_bytes() for path in parts]
    times = [path.stat().st_mtime_ns for path in parts]
    parts[1].write_bytes(harm(before[1]))
    again = Hashing()
    mine_hard_negatives(dataset, again, **options(folder))
    assert f"{parts[1]} is damaged" in caplog.text
    assert "mined again" in caplog.text
    assert again.asked == []
    assert [path.read_bytes() for path in parts] == before
    assert [path.stat().st_mtime_ns for path in parts][::2] == times[::2]
    assert mined_rows(folder) == expected


def test_files_of_other_settings_or_places_are_not_taken(tmp_path, caplog):
    dataset = training_set()
    folder, other = (mine_hard_negatives(dataset, Hashing(), **options(tmp_path / name, margin=margin))
                     for name, margin in (("a", 0.1), ("b", -0.3)))  # fmt: skip
    expected, parts = mined_rows(folder), sorted(folder.glob("part-*.parquet"))
    assert mined_rows(other) != expected
    for source in (other / parts[0].name, parts[1]):
        parts[0].write_bytes(source.read_bytes())
        with pytest.raises(ValueError, match=rf"{parts[0].name} is damaged, or was mined with other settings"):
            mined_rows(folder)
        mine_hard_negatives(dataset, Hashing(), **options(folder))
        assert mined_rows(folder) == expected


@pytest.mark.parametrize("content", ['{"a"', "[]", "", '"x"', "\xff"])
def test_damaged_settings_are_named_and_a_folder_may_be_claimed_again(tmp_path, content):
    dataset, folder = training_set(), tmp_path / "mined"
    mine_hard_negatives(dataset, Hashing(), **options(folder))
    expected = mined_rows(folder)
    settings = folder / "settings.json"
    settings.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"settings\.json is damaged .*Delete it and call again"):
        mine_hard_negatives(dataset, Hashing(), **options(folder))
    settings.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    mine_hard_negatives(dataset, Hashing(), **options(folder))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before
    settings.unlink()
    mine_hard_negatives(dataset, Hashing(), **options(folder, margin=-0.3))  # nothing of before is taken over
    assert mined_rows(folder) != expected


def test_of_two_runs_at_once_the_second_is_refused(tmp_path, monkeypatch):
    """Both look before either has written."""
    dataset, folder, real = training_set(), tmp_path / "mined", mining_files.create_exclusively
    refused = []

    def late(path, content):
        monkeypatch.setattr(mining_files, "create_exclusively", real)
        mine_hard_negatives(dataset, Hashing(), **options(folder, margin=-0.3))
        return real(path, content)

    monkeypatch.setattr(mining_files, "create_exclusively", late)
    try:
        mine_hard_negatives(dataset, Hashing(), **options(folder))
    except ValueError as error:
        refused.append(str(error))
    assert "mined otherwise: margin differ" in refused[0]
    expected = mine_hard_negatives(dataset, Hashing(), **options(tmp_path / "alone", margin=-0.3))
    assert mined_rows(folder) == mined_rows(expected)
    assert {path.name for path in folder.iterdir() if path.name.startswith("settings")} == {"settings.json"}


def test_results_of_before_are_told_of(tmp_path, caplog):
    """Without checksums: rows are read, and going on is refused with the reason."""
    dataset, folder = training_set(), tmp_path / "mined"
    mine_hard_negatives(dataset, Hashing(), **options(folder))
    expected = mined_rows(folder)
    for path in folder.glob("part-*"):
        table = pq.read_table(path)
        kept = {key: value for key, value in table.schema.metadata.items() if key != b"mining_checksum"}
        pq.write_table(table.replace_schema_metadata(kept), path)
    for name, gone in (("mined.json", ("format", "settings", "checksum")), ("settings.json", ("format", "images"))):
        note = json.loads((folder / name).read_text())
        note = {key: value for key, value in note.items() if key not in gone}
        (folder / name).write_text(json.dumps(note | ({"model": "0" * 64} if "model" in note else {})))
    assert mined_rows(folder) == expected
    assert "earlier version, without checksums" in caplog.text
    with pytest.raises(ValueError, match=r"model differ.*made by an earlier version of unime_st"):
        mine_hard_negatives(dataset, Hashing(), **options(folder))


def test_how_images_are_read_is_part_of_the_settings(root):
    model = tiny_encoder("qwen2_vl", root / "model")
    mine_hard_negatives(load_mmeb_train(root), model, root / "mined", num_negatives=2, margin=None)
    with pytest.raises(ValueError, match="mined otherwise: images differ"):
        mine_hard_negatives(load_mmeb_train(root, max_pixels=900), model, root / "mined", num_negatives=2, margin=None)


@pytest.mark.parametrize(
    ("changes", "error", "advice"),
    [
        ({"margin": float("nan")}, ValueError, "`margin=nan`, but it must be a number"),
        ({"margin": "0.1"}, TypeError, "`margin='0.1'`"),
        ({"num_negatives": 2.5}, TypeError, r"`num_negatives=2\.5`, but it must be a whole number"),
        ({"num_negatives": True}, TypeError, "`num_negatives=True`"),
        ({"range_min": -1}, ValueError, "leave too few ranks"),
        ({"rows_per_file": 0}, ValueError, "a file holds at least one row"),
        ({"batch_size": 0}, ValueError, "`batch_size=0`, but it must be at least 1"),
        ({"shard_size": 0}, ValueError, "`shard_size=0`, but it must be at least 1"),
        ({"patience": float("nan")}, ValueError, "`patience=nan`"),
    ],
)
def test_silent_arguments_are_refused(tmp_path, changes, error, advice):
    model = Hashing()
    with pytest.raises(error, match=advice):
        mine_hard_negatives(training_set(), model, **options(tmp_path / "mined", **changes))
    assert not model.asked
    assert not (tmp_path / "mined").exists()


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("positive", ["x", None, "z"]),
        ("anchor", ["x", None, None]),
        ("positive", [{"text": "x", "image": "a.png"}, {"text": None, "image": None}, {"text": "z", "image": None}]),
    ],
)
def test_missing_queries_and_positives_are_refused_by_row(tmp_path, name, cells):
    columns = {"anchor": ["a", "b", "c"], "positive": ["x", "y", "z"]} | {name: cells}
    with pytest.raises(ValueError, match=rf"Row 1 has no '{name}' \(None\).*leave those rows out"):
        mine_hard_negatives(Dataset.from_dict(columns), Hashing(), tmp_path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "", "é"]),
        pa.array([b"a", None, b""], pa.large_binary()),
        pa.array([{"image": "x", "text": None}, None, {"image": None, "text": "y"}]),
        pa.array([[1, 2], None, [], [3]]),
        pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        pa.array([True, None]),
        pa.array(["a", "b", "b"]).dictionary_encode(),
        pa.array([None, None]),
        pa.array([1, None], pa.timestamp("s")),
    ],
)
def test_a_checksum_goes_by_values_alone(column, tmp_path):
    def of(*chunks):
        return mining_files._checksum("name", "settings", "{}", pa.table({"c": pa.chunked_array(chunks)}))

    known = of(column)
    assert of(column[:1], column[1:]) == known
    assert of(pa.concat_arrays([column, column])[len(column) :]) == known
    if pa.types.is_fixed_size_list(column.type) and version.parse(pa.__version__) < version.parse("26"):
        return  # it cannot read what it has written
    pq.write_table(pa.table({"c": column}), tmp_path / "t.parquet")
    assert of(*pq.read_table(tmp_path / "t.parquet").column("c").chunks) == known
    others = [of(column[1:]), of(column, column), of(column[::-1]) if column.null_count < len(column) else "other"]
    assert len({known, *others}) == 4
