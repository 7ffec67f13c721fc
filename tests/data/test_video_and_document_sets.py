"""LLaVA-Hound's videos, ColPali's and VisRAG's pages: files in their layout to rows, strings to the letter."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from training_sets_data import colpali_rows, conversations, page, write_hound, write_parquet
from unime_st import build_encoder
from unime_st.data import load_colpali_train, load_llava_hound, load_visrag_train
from unime_st.identity.rows import row_identities, subset_numbers
from unime_st.losses import HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.samplers import FalseNegativeAwareBatchSampler, WeightedBatchSampler
from unime_st.videos import VideoSettings


@pytest.mark.parametrize("name", ["video_caption_300k.jsonl", "some.json"])
def test_llava_hound(tmp_path, name):
    file, frames = write_hound(tmp_path, conversations(), name)
    video = str(frames / "v_2")
    caption = "Clip 2 shows a cat."
    golden = {
        "caption": ({"video": video, "text": "Write a detailed caption of the video."}, {"text": caption}),
        "video": (
            {"text": f"Find a video that contains the following visual content: {caption}"},
            {"video": video, "text": "Understand the content of the provided video:"},
        ),
        "question": (
            {
                "video": video,
                "text": "Answer a question based on the content of a video. Write a detailed caption of the video.",
            },
            {"text": caption},
        ),
    }
    for task, (anchor, positive) in golden.items():
        rows = load_llava_hound(file, frames, task=task)
        assert len(rows) == 4
        assert rows[2] == {"anchor": anchor, "positive": positive}
        assert len({number for column in row_identities(rows) for number in column.tolist()}) >= 4
    assert (
        load_llava_hound(file, frames, task="video", max_rows=2)[:] == load_llava_hound(file, frames, task="video")[:2]
    )
    drawn = [
        load_llava_hound(file, frames, task="video", max_rows=2, shuffle_seed=n)[:]["anchor"] for n in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] or drawn[0] != drawn[3]


def test_videos_that_are_missing(tmp_path, caplog):
    file, frames = write_hound(tmp_path, conversations())
    with file.open("a") as more:
        more.write("\n" + json.dumps({**conversations(1)[0], "video": "v_none"}))
    with pytest.raises(
        FileNotFoundError, match=r"video_caption_300k\.jsonl, line 5: there is no folder 'v_none' below"
    ):
        load_llava_hound(file, frames, task="caption")
    with caplog.at_level(logging.WARNING):
        assert len(load_llava_hound(file, frames, task="caption", missing_videos="drop")) == 4
    assert "left out 1 rows without frames" in caplog.text
    assert "'v_none'" in caplog.text


@pytest.mark.parametrize("name", ["v_empty", "v_1/c00.jpeg", ".", "v\0", "v" * 300])
def test_what_holds_no_frames_is_missing_too(tmp_path, name):
    rows = conversations(2)
    file, frames = write_hound(tmp_path, rows)
    (frames / "v_empty").mkdir()
    (frames / "v_empty" / "notes.txt").touch()
    file.write_text("\n".join(json.dumps(row) for row in (rows[0], {**rows[1], "video": name})))
    with pytest.raises(FileNotFoundError, match=r"300k\.jsonl, line 2: there is no folder .* that holds frames"):
        load_llava_hound(file, frames, task="caption")
    assert len(load_llava_hound(file, frames, task="caption", missing_videos="drop")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": "v_0"}', "line 2: a row holds `video`"),
        ('{"video": "v_0", "conversations": [{"value": "a"}]}', "line 2: a row holds"),
        ('{"video": "v_0", "conversations": [{"value": 3}, {"value": "b"}]}', "line 2: a row holds"),
        ('{"video": 7, "conversations": [{"value": "a"}, {"value": "b"}]}', "line 2: `video` is 7"),
        ('{"video": "v_0", "conversations": [{"value": "a"}, {"value": "<video> "}]}', "line 2: the second turn"),
        (
            '{"video": "../v_0", "conversations": [{"value": "a"}, {"value": "b"}]}',
            r"line 2: .* leaves the video folder",
        ),
        ('{"video": ', "line 2: damaged or no JSON"),
        ("[" * 100_000, "line 2: damaged or no JSON"),
        (
            '{"video": "v_0", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
            r"line 2: the first two turns are from \['gpt', 'human'\]",
        ),
        (
            '{"video": "v_0", "conversations": [{"value": "a"}, {"value": "b \\ud800"}]}',
            "line 2: a turn is not valid UTF-8",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file, frames = write_hound(tmp_path, conversations(1))
    with file.open("a") as more:
        more.write("\n" + line)
    with pytest.raises(ValueError, match=message) as caught:
        load_llava_hound(file, frames, task="caption")
    assert str(file) in str(caught.value)


def test_a_question_that_is_empty_is_named(tmp_path):
    rows = conversations(1)
    rows[0]["conversations"][0]["value"] = "<video>\n"
    file, frames = write_hound(tmp_path, rows)
    with pytest.raises(ValueError, match=r"line 1: the first turn, the question, is empty"):
        load_llava_hound(file, frames, task="question")
    assert load_llava_hound(file, frames, task="caption")[0]["anchor"].keys() == {"video"}


def test_what_cannot_be_asked_for_of_videos(tmp_path):
    file, frames = write_hound(tmp_path, conversations(1))
    with pytest.raises(ValueError, match="`task='captions'`; choose one of 'caption', 'video', 'question'"):
        load_llava_hound(file, frames, task="captions")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_llava_hound(tmp_path / "none.jsonl", frames, task="caption")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_llava_hound(file, tmp_path / "none", task="caption")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no row"):
        load_llava_hound(tmp_path / "empty.jsonl", frames, task="caption")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_colpali(tmp_path):
    write_parquet(colpali_rows(), tmp_path / "data" / "train-00000-of-00002.parquet")
    write_parquet(colpali_rows(6), tmp_path / "data" / "train-00001-of-00002.parquet")
    rows = load_colpali_train(tmp_path)
    assert (len(rows), rows.column_names) == (10, ["anchor", "positive"])
    assert rows[2]["anchor"] == {
        "text": "Find a document image that matches the given query: What is shown in figure 2?"
    }
    assert rows[2]["positive"]["text"] == "Understand the content of the provided document image."
    assert rows[2]["positive"]["image"].size == (62, 80)
    bare = load_colpali_train(tmp_path, instructions=("", ""), max_rows=3)
    assert bare[:]["anchor"][2] == {"text": "What is shown in figure 2?"}
    assert bare[2]["positive"].keys() == {"image"}
    answers = load_colpali_train(tmp_path / "data" / "train-00001-of-00002.parquet", task="answer")
    assert (len(answers), answers[5]["positive"]) == (6, {"text": "A curve of 5."})
    assert answers[5]["anchor"]["text"] == "What is shown in figure 5?"
    assert answers[5]["anchor"]["image"].size == (65, 80)
    late = load_colpali_train(tmp_path, late_images=True, max_pixels=1000)
    assert late[2]["positive"]["image"].size() == late[2]["positive"]["image"].open().size == (27, 35)
    first, second = (column.tolist() for column in row_identities(rows))
    assert first[:4] == first[4:8] == second[:4] == second[4:8] == [0, 1, 2, 3]


def test_visrag(tmp_path):
    names = ["ArxivQA", "Manuallib", "Other", "ArxivQA"]
    rows = {"query": [f"which {n}? " for n in range(4)], "image": colpali_rows()["image"], "source": names}
    write_parquet(rows, tmp_path / "a.parquet")
    rows = load_visrag_train(tmp_path / "a.parquet")
    assert rows[1]["anchor"] == {
        "text": "This query pertains to a product manual, which contains detailed technical specifications, usage "
        "instructions, and troubleshooting steps. Find the most relevant section that answers the query: which 1?"
    }
    assert rows[1]["positive"]["text"] == "A product manual page with technical specifications and instructions."
    assert rows[1]["positive"]["image"].size == (61, 80)
    assert rows[2]["anchor"] == {"text": "which 2?"}
    assert rows[2]["positive"].keys() == {"image"}
    numbers, found = subset_numbers(rows)
    assert (numbers.tolist(), found) == ([0, 1, 2, 0], ["ArxivQA", "Manuallib", "Other"])


def test_rows_that_lack_something_are_skipped_and_counted(tmp_path, caplog):
    rows = colpali_rows()
    rows["query"][0] = " "
    rows["image"][1] = None
    rows["answer"][2] = None
    write_parquet(rows, tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING):
        assert load_colpali_train(tmp_path)[:]["anchor"][0]["text"].endswith("figure 2?")
        assert [row["text"] for row in load_colpali_train(tmp_path, task="answer")[:]["positive"]] == ["A curve of 3."]
    assert "skipped 2 of 4 rows without a text or a page" in caplog.text
    assert "skipped 3 of 4 rows" in caplog.text
    rows["query"] = [""] * 4
    write_parquet(rows, tmp_path / "none" / "a.parquet")
    with pytest.raises(ValueError, match="of 4 rows none has all its texts and a page"):
        load_colpali_train(tmp_path / "none")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no parquet file below"):
        load_visrag_train(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file '.*none\.parquet'"):
        load_visrag_train(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad\.parquet is damaged or no parquet file"):
        load_visrag_train(tmp_path / "bad.parquet")
    stored = pa.array([{"bytes": b"", "path": ""}])
    pq.write_table(pa.table({"query": ["a"], "image": stored}), tmp_path / "lacks.parquet")
    with pytest.raises(ValueError, match=r"lacks\.parquet has no column source; it has query, image"):
        load_visrag_train(tmp_path / "lacks.parquet")
    for column, cells, kind in (("query", [7], "int64"), ("answer", [["a"]], "list<"), ("image", ["a.png"], "string")):
        columns = {"query": ["a"], "image": stored, "answer": ["b"], column: cells}
        pq.write_table(pa.table(columns), tmp_path / "kinds.parquet")
        with pytest.raises(ValueError, match=rf"kinds\.parquet: column {column} holds {kind}.* are expected"):
            load_colpali_train(tmp_path / "kinds.parquet", task="answer")
    with pytest.raises(ValueError, match="`task='pages'`"):
        load_colpali_train(tmp_path, task="pages")


def test_of_several_files_the_damaged_one_is_named_and_an_empty_one_left_out(tmp_path):
    write_parquet(colpali_rows(), tmp_path / "0.parquet")
    pq.write_table(pq.read_table(tmp_path / "0.parquet")[:0], tmp_path / "1.parquet")
    assert len(load_colpali_train(tmp_path)) == 4
    with pytest.raises(ValueError, match="have no row"):
        load_colpali_train(tmp_path / "1.parquet")
    broken = bytearray((tmp_path / "0.parquet").read_bytes())
    start = broken.index(b"\x89PNG")
    broken[start - 30 : start + 300] = bytes(330)
    (tmp_path / "2.parquet").write_bytes(broken)
    with pytest.raises(ValueError, match=r"2\.parquet is damaged"):
        load_colpali_train(tmp_path)


@pytest.mark.parametrize("late", [False, True])
def test_a_damaged_page_is_named_by_file_and_row(tmp_path, late):
    rows = colpali_rows()
    write_parquet(rows, tmp_path / "0.parquet")
    rows["image"] = [{"bytes": page(n + 10), "path": f"images/{n}.png"} for n in range(4)]
    rows["image"][3]["bytes"] = b"no page at all"
    write_parquet(rows, tmp_path / "1.parquet")
    loaded = load_colpali_train(tmp_path, late_images=late)
    assert loaded[:7]["positive"]
    with pytest.raises(ValueError, match=r"row 3 of 1\.parquet: Cannot read image images/3\.png"):
        loaded[7]


@pytest.mark.parametrize("late", [None, 0])
def test_a_mix_of_sets_trains(backbone, tmp_path, late):
    """Videos, pages and answers, by weight, with one loss for each and a column of videos."""
    hound = write_hound(tmp_path / "hound", conversations(8))
    write_parquet(colpali_rows(8), tmp_path / "pages" / "a.parquet")
    sets = {
        "videos": load_llava_hound(*hound, task="video"),
        "captions": load_llava_hound(*hound, task="caption"),
        "pages": load_colpali_train(tmp_path / "pages", late_images=late is not None),
    }
    model = build_encoder(
        backbone("qwen2_vl"), device="cpu", peft_config=True, late_media=late, videos=VideoSettings(num_frames=2)
    )
    loss = HardNegativeInfoNCELoss(model, mini_batch_size=2)
    drawn = []
    forward = loss.forward
    loss.forward = lambda columns, labels=None: drawn.append(len(columns)) or forward(columns, labels)
    settings = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        batch_sampler=FalseNegativeAwareBatchSampler,
        multi_dataset_batch_sampler=WeightedBatchSampler.configured(weights=[2, 1, 3]),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer = SentenceTransformerTrainer(
        model, settings, train_dataset=sets, loss=loss, callbacks=[LossMetricsCallback(loss)]
    )
    trainer.train()
    assert drawn == [2] * 6
    assert all(value.isfinite().all() for value in model.parameters())
    assert any((before[name] != value).any() for name, value in model.named_parameters() if name in before)
