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
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from tiny import picture, tiny_encoder
from tiny_data import COLOURS
from unime_st import functional
from unime_st.data import bad_image_report, load_mined_negatives, load_mmeb_train, mine_hard_negatives
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
    monkeypatch.setattr("unime_st.data.mining_search._BLOCK", 16)
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
