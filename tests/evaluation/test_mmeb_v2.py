"""MMEB V2's videos and documents: every layout, golden inputs, metrics against plain Python, what is broken."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from evaluation_fakes import HashModel
from test_mmeb_oracle import TABLE, ExactModel, cosine

from mmeb_v2_data import frames, rows, write_v2
from tiny import tiny_backbone
from unime_st import build_encoder
from unime_st.data.mmeb.named_rows import NamedRow, task_of
from unime_st.evaluation import MMEBEvaluator
from unime_st.evaluation.mmeb.tasks import MMEBTask
from unime_st.evaluation.mmeb.v2 import DOCUMENT_TASKS, V2_META_TASKS, VIDEO_TASKS, v2_tasks
from unime_st.modules import build_reranker

QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question:  "
)
UNDERSTAND = "Understand the content of the provided video."
PAGE = "Understand the content of the provided document image."
OPTIONS = "A. One cat. B. Two cats. C. No cat. D. A dog."
# task -> text of the first row's query, that of its first candidate, frames of the query
GOLDEN = {
    "K700": ("Recognize the category of the video content.", "parkour", 8),
    "SmthSmthV2": (
        "What actions or object interactions are being performed by the person in the video?", "Moving it", 8
    ),
    "HMDB51": ("What actions or objects interactions are the person in the video doing?", "ride_bike", 8),
    "UCF101": ("What activities or sports are being performed by the person in the video?", "Kayaking", 8),
    "Breakfast": ("Recognize the breakfast type that the person is cooking in the video. ", "tea", 8),
    "MVBench": (f"{QUESTION}What episodic_reasoning?\nOptions:\n(A) Up.\n(B) Down.", "(A) Up.", 3),
    "Video-MME": (f"{QUESTION}How many?\nA. One cat.\nB. Two cats.\nC. No cat.\nD. A dog.", "One cat", 8),
    "NExTQA": (
        f"{QUESTION}why\nOptions:\n(A) because 0\n(B) because 1\n(C) because 2\n(D) because 3\n(E) because 4",
        "because 0", 8,
    ),
    "EgoSchema": (f"{QUESTION}What is done?{OPTIONS}", "One cat", 8),
    "ActivityNetQA": (f"{QUESTION}is it day? (A) yes; (B) no.", "yes", 8),
    "DiDeMo": ("Find a video that includes the following described scenes: the sea 1", UNDERSTAND, 0),
    "MSR-VTT": ("Find a video that contains the following visual content: a man 7", UNDERSTAND, 0),
    "MSVD": ("Find the video snippet that corresponds to the given summary: a dog 1", UNDERSTAND, 0),
    "VATEX": ("Select a video that fits the description provided: people 1", UNDERSTAND, 0),
    "YouCook2": (
        "Find a video that demonstrates the following action while making a recipe: stir 1", UNDERSTAND, 0
    ),
    "QVHighlight": (
        "Find the clip that corresponds to the described scene in the given video: she laughs 1", UNDERSTAND, 8
    ),
    "Charades-STA": (
        "Find the clip that corresponds to the described scene in the given video: she laughs 1", UNDERSTAND, 8
    ),
    "MomentSeeker": (
        "Find the clip that corresponds to the given text: the goal",
        "Understand the content of the provided video clip.", 0,
    ),
}  # fmt: skip
GOLDEN |= {
    task.name: ("Find a document image that matches the given query: which 0?", PAGE, 0) for task in DOCUMENT_TASKS
}
POOLS = {"K700": 700, "HMDB51": 51, "UCF101": 101, "Breakfast": 10}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture
def broken(world, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(world, tmp_path / "v2")


def loaded(world, name, **options):
    (task,) = v2_tasks(world, [name], **options)
    return task.load(on_error="raise")


def test_there_are_78_tasks_in_twelve_groups():
    groups = {group: list(V2_META_TASKS.values()).count(group) for group in V2_META_TASKS.values()}
    assert groups == {
        "Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4, "V-CLS": 5, "V-QA": 5, "V-RET": 5,
        "V-MRET": 3, "ViDoRe V1": 10, "ViDoRe V2": 4, "VisRAG": 6, "VisDoc OOD": 4,
    }  # fmt: skip
    assert len(V2_META_TASKS) == 78
    assert set(GOLDEN) == {task.name for task in (*VIDEO_TASKS, *DOCUMENT_TASKS)}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_inputs(world, name):
    task = loaded(world, name)
    query, candidate, count = GOLDEN[name]
    found = task.items[task.queries[0]]
    assert found["text"] == query
    assert len(found.get("video", [])) == count
    shown = task.items[task.own(0)[0]]
    assert shown["text"] == candidate
    if candidate == UNDERSTAND or "clip" in candidate:
        assert shown["video"]
        assert shown["video"][0].endswith("frame_0.jpg")
    assert ("image" in shown) == (candidate == PAGE)
    assert (task.corpus is not None) == (
        V2_META_TASKS[name] in {"V-RET", *list(V2_META_TASKS.values())[-24:]} or name in POOLS
    )
    if name in POOLS:
        assert len(task.corpus) == POOLS[name]
        assert [task.items[item]["text"] for item in task.corpus[:2]] == [
            task.items[task.own(row)[0]]["text"] for row in (0, 1)
        ]


def test_frames_are_sampled_as_published(world):
    def numbers(name, **options):
        task = loaded(world, name, **options)
        return [int(frame.rsplit("_", 1)[1].split(".")[0]) for frame in task.items[task.queries[0]]["video"]]

    assert numbers("K700") == np.linspace(0, 9, 8, dtype=int).tolist() == [0, 1, 2, 3, 5, 6, 7, 9]
    assert numbers("K700", num_frames=64) == numbers("K700", num_frames=None) == list(range(10))
    assert numbers("K700", num_frames=1) == [0]
    assert numbers("MVBench") == [0, 1, 2]  # fewer than asked for are not padded
    moments = loaded(world, "QVHighlight", num_frames=64)
    assert [len(moments.items[item]["video"]) for item in moments.own(0)] == [2, 2, 8]
    seeker = loaded(world, "MomentSeeker", num_frames=2)
    assert {len(seeker.items[item]["video"]) for item in seeker.own(0)} == {10}
    assert MMEBEvaluator.v2(world, num_frames=64).frames | {} == {
        **dict.fromkeys(V2_META_TASKS, ""), **dict.fromkeys([task.name for task in VIDEO_TASKS], "64"),
        "QVHighlight": "64, clips 8", "Charades-STA": "64, clips 8", "MomentSeeker": "all stored",
    }  # fmt: skip


RIGHT = {
    "SmthSmthV2": ["Closing something"], "MVBench": ["(B) Down."], "Video-MME": ["Two cats"], "NExTQA": ["because 3"],
    "EgoSchema": ["No cat"], "ActivityNetQA": ["yes"], "K700": ["parkour"],
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers(world, name):
    task = loaded(world, name)
    assert [task.items[item]["text"] for item in task.right_of(0)] == RIGHT[name]


def test_right_clips_videos_and_pages(world):
    seeker = loaded(world, "MomentSeeker")
    names = [seeker.items[item]["video"][0].split("/")[-2] for item in seeker.right_of(0)]
    assert names == ["m_p1", "m_p2"]
    queries = [seeker.items[item] for item in seeker.queries]
    assert [sorted(query) for query in queries] == [["text"], ["image", "text"], ["text", "video"]]
    assert [query["text"] for query in queries[1:]] == [
        "Select the video clip that aligns with the given text and image: the goal",
        "Find the clip that corresponds to the given sentence and video segment: the goal",
    ]
    moments = loaded(world, "Charades-STA")
    assert [moments.items[item]["video"][0].split("/")[-2] for item in moments.right_of(1)] == ["positive_0"]
    found = loaded(world, "DiDeMo")
    assert [found.items[item]["video"][0].split("/")[-2] for item in found.right_of(1)] == ["1@N0_2"]
    for name in ("ViDoRe_docvqa", "VisRAG_PlotQA", "MMLongBench-page"):
        pages = loaded(world, name)
        assert len(pages.corpus) == 3
        assert (pages.gains_of(0).tolist(), pages.gains_of(1).tolist()) == ([2, 1], [1])
        assert all(Path(pages.items[item]["image"]).is_file() for item in pages.corpus)


class SeesPaths(HashModel):
    """Embeds an input by what it says; frames and images by their paths."""


def test_all_78_tasks_and_their_averages(world, tmp_path):
    evaluator = MMEBEvaluator.v2(world, name="")
    metrics = evaluator(SeesPaths())
    scores = {
        task: metrics[f"{task}_{'ndcg@5' if V2_META_TASKS[task] in GRADED else 'precision@1'}"]
        for task in V2_META_TASKS
    }
    assert metrics["tasks"] == 78
    assert metrics["overall_mean"] == pytest.approx(sum(scores.values()) / 78, abs=1e-12)
    for group in dict.fromkeys(V2_META_TASKS.values()):
        own = [score for task, score in scores.items() if V2_META_TASKS[task] == group]
        name = f"meta_{group}_{'ndcg@5' if group in GRADED else 'precision@1'}"
        assert metrics[name] == pytest.approx(sum(own) / len(own), abs=1e-12)
    parts = (("image", 0, 36), ("video", 36, 54), ("visdoc", 54, 78))
    for part, start, end in parts:
        own = list(scores.values())[start:end]
        assert metrics[f"{part}_mean"] == pytest.approx(sum(own) / len(own), abs=1e-12)
    assert 0 < metrics["overall_mean"] < 1
    assert evaluator.primary_metric == "overall_mean"


GRADED = {"ViDoRe V1", "ViDoRe V2", "VisRAG", "VisDoc OOD"}


def test_two_hundred_random_tasks_against_plain_python():
    """Hit@1 and linear nDCG@5, local and global, by names: ties and several right answers among them."""
    seen = {"ties": 0, "several": 0, "partial": 0, "wrong": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shared, metric = bool(seed % 2), ("hit@1", "ndcg@5")[seed // 2 % 2]
        numbers = rng.permutation(len(TABLE))[: rng.integers(4, 14)].tolist()
        pool = {f"n{number}": {"text": f"#{number}"} for number in numbers[1:]}
        records = []
        for _ in range(int(rng.integers(1, 6))):
            own = rng.permutation(numbers[1:])[: rng.integers(1, len(numbers))].tolist()
            right = own[: rng.integers(1, min(4, len(own)) + 1)]
            gain = {f"n{number}": int(rng.integers(1, 4)) if metric == "ndcg@5" else 1 for number in right}
            listed = right if shared else rng.permutation(own).tolist()
            records.append((int(rng.choice(numbers)), [f"n{number}" for number in listed], gain))

        def read(record, pool=pool):
            return NamedRow({"text": f"#{record[0]}"}, {name: pool[name] for name in record[1]}, record[2])

        task = task_of("random", records, read, pool=pool if shared else None, shared=shared)
        evaluator = MMEBEvaluator(None, [MMEBTask("t", lambda task=task, *, on_error: task, metric)], name="")
        evaluator(ExactModel(TABLE))
        everything = list(dict.fromkeys([name for _, names, _ in records for name in names] + list(pool)))
        expected = []
        for query, names, gain in records:
            scored = [(cosine(query, int(name[1:])), name) for name in (everything if shared else names)]
            ranked = [name for _, name in sorted(scored, key=lambda one: -one[0])]  # stable, as the pool stands
            seen["ties"] += len({score for score, _ in scored}) < len(scored)
            seen["several"] += len(gain) > 1
            if metric == "hit@1":
                expected.append(float(ranked[0] in gain))
            else:
                dcg = sum(gain.get(name, 0) / math.log2(place + 2) for place, name in enumerate(ranked[:5]))
                best = sorted(gain.values(), reverse=True)[:5]
                expected.append(dcg / sum(value / math.log2(place + 2) for place, value in enumerate(best)))
            seen["partial"] += 0 < expected[-1] < 1
            seen["wrong"] += expected[-1] == 0
        np.testing.assert_allclose(evaluator.results["t"].scores, expected, rtol=0, atol=1e-9, err_msg=str(seed))
    assert min(seen.values()) > 20, seen


PUBLISHED_WAY = """
import json, math
labels, grades, found = ["a", "b", "c"], [1, 2, 1], ["b", "a", "c"]
paired = dict(zip(list(set(labels)), grades))  # the labels in the order of a hash, the grades in their own
dcg = sum(paired[name] / math.log2(place + 2) for place, name in enumerate(found))
best = sorted(paired.values(), reverse=True)
print(dcg / sum(grade / math.log2(place + 2) for place, grade in enumerate(best)))
"""


def test_published_graded_ndcg_depends_on_the_hash_seed_and_ours_does_not():
    """VLM2Vec's `evaluate` pairs grades with `list(set(labels))`; a page's own grade is the only right one."""
    command = [sys.executable, "-c", PUBLISHED_WAY]
    published = {
        round(
            float(subprocess.run(command, env={"PYTHONHASHSEED": str(seed)}, capture_output=True, check=True).stdout), 4
        )
        for seed in range(1, 9)
    }
    assert len(published) > 1
    # In the plane: the query is b itself, a is nearer than c.
    table = {"q": [1, 0], "b": [1, 0], "a": [0.8, 0.6], "c": [0, 1]}

    class Plane(HashModel):
        def vector(self, item, prompt=""):
            return np.array([*table[item["text"]], 0, 0, 0, 0], float)

    pool = {name: {"text": name} for name in "abc"}
    row = NamedRow({"text": "q"}, pool, {"a": 1, "b": 2, "c": 1})
    task = task_of("graded", [None], lambda _: row, pool=pool, shared=True)
    evaluator = MMEBEvaluator(None, [MMEBTask("t", lambda *, on_error: task, "ndcg@5")], name="")
    assert evaluator(Plane())["t_ndcg@5"] == 1.0


def test_a_copy_of_the_repository_is_read_too(tmp_path):
    folder = tmp_path / "annotation/vidore/docvqa_test_subsampled_beir"
    parts = {
        "corpus": [{"corpus-id": "1"}, {"corpus-id": "2"}],
        "queries": [{"query-id": "q", "query": "which?"}],
        "qrels": [{"query-id": "q", "corpus-id": "2", "score": 1}],
    }
    for name, table in parts.items():
        (folder / name).mkdir(parents=True)
        Dataset.from_list(table).to_parquet(folder / name / "test-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*\n" for name in parts
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    task = loaded(tmp_path, "ViDoRe_docvqa")
    assert [task.items[item]["image"].rsplit("/", 1)[1] for item in task.right_of(0)] == ["2.png"]
    assert len(task.corpus) == 2


def broken_task(root, name, **options):
    evaluator = MMEBEvaluator.v2(root, [name], on_error="report", name="", **options)
    metrics = evaluator(SeesPaths())
    return metrics, evaluator.errors.get(name, [])


def test_missing_and_empty_folders_of_frames(broken):
    stored = broken / "video-tasks/frames/video_ret/MSR-VTT"
    shutil.rmtree(stored / "video7")
    with pytest.raises(FileNotFoundError, match=r"MSR-VTT, row 0: There is no folder of frames 'video7'"):
        MMEBEvaluator.v2(broken, ["MSR-VTT"])(SeesPaths())
    metrics, (told,) = broken_task(broken, "MSR-VTT")
    assert "MSR-VTT, row 0" in told
    assert (metrics["MSR-VTT_precision@1"], metrics["unreadable_rows"]) == (0.5, 1)  # one video is left: it is right
    shutil.rmtree(stored / "video8")
    (stored / "video8").mkdir()
    metrics, told = broken_task(broken, "MSR-VTT")
    assert metrics["unreadable_rows"] == 2
    assert "MSR-VTT, row 1" in told[1]
    assert "holds no frame" in told[1]
    shutil.rmtree(broken / "video-tasks/frames/video_mret/QVHighlight/QVHighlight_2/positive_0")
    metrics, (told,) = broken_task(broken, "QVHighlight")
    assert "QVHighlight, row 1" in told
    assert "no right answer" in told


def test_an_empty_folder_of_frames_is_an_error_that_names_task_and_row(broken):
    stored = broken / "video-tasks/frames/video_ret/MSVD/clip2"
    shutil.rmtree(stored)
    stored.mkdir()
    with pytest.raises(ValueError, match=r"MSVD, row 1: The folder .*clip2' holds no frame"):
        MMEBEvaluator.v2(broken, ["MSVD"])(SeesPaths())
    metrics, (told,) = broken_task(broken, "MSVD")
    assert "MSVD, row 1" in told
    assert metrics["unreadable_rows"] == 1


def test_a_task_whose_frames_were_never_unpacked_is_wrong_in_every_row(broken):
    shutil.rmtree(broken / "video-tasks/frames/video_cls/HMDB51")
    metrics, told = broken_task(broken, "HMDB51")
    assert (metrics["HMDB51_precision@1"], metrics["unreadable_rows"]) == (0, 2)
    assert all(f"HMDB51, row {row}: There is no folder of frames" in message for row, message in enumerate(told))


@pytest.mark.parametrize(
    ("task", "file", "metric"),
    [
        ("UCF101", "video-tasks/frames/video_cls/UCF101/UCF101_1/frame_0.jpg", "precision@1"),
        ("ViDoRe_infovqa", "visdoc-tasks/images/ViDoRe_infovqa/page-2.png", "ndcg@5"),
    ],
)
def test_a_torn_frame_and_a_torn_page_are_told_by_task_and_row(broken, backbone, task, file, metric):
    """Through an encoder, which opens them."""
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    (broken / file).write_bytes((broken / file).read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"{task}, row \d: .*{Path(file).name}"):
        MMEBEvaluator.v2(broken, [task])(model)
    evaluator = MMEBEvaluator.v2(broken, [task], on_error="report", name="")
    metrics = evaluator(model)
    assert metrics["unreadable_rows"] == 1
    assert evaluator.results[task].scores[1] == 0
    assert evaluator.errors[task][0].startswith("row 1: ")
    assert all(Path(file).name in message for message in evaluator.errors[task])
    assert 0 <= metrics[f"{task}_{metric}"] <= 1


def test_qrels_that_name_no_page_and_queries_without_qrels(broken):
    table = [("q0", "page-9", 1), ("q0", "page-1", 1)]
    shutil.rmtree(broken / "annotation/vidore/tatdqa_test_beir/qrels")
    rows(broken, "vidore/tatdqa_test_beir",
         [{"query-id": query, "corpus-id": page, "score": score} for query, page, score in table], "qrels")  # fmt: skip
    with pytest.raises(ValueError, match=r"ViDoRe_tatdqa, row 0: .*'page-9', which is not in the corpus"):
        MMEBEvaluator.v2(broken, ["ViDoRe_tatdqa"])(SeesPaths())
    metrics, told = broken_task(broken, "ViDoRe_tatdqa")
    assert (metrics["ViDoRe_tatdqa_ndcg@5"], metrics["unreadable_rows"]) == (0, 2)
    assert "row 0" in told[0]
    assert "'q1' has no relevant page" in told[1]


def test_a_page_that_cannot_be_read_leaves_the_pool_and_is_told(broken):
    class Opens(SeesPaths):
        def vector(self, item, prompt=""):
            if "image" in item:
                Path(item["image"]).read_bytes()
            return super().vector(item, prompt)

    (broken / "visdoc-tasks/images/ViDoRe_infovqa/page-2.png").unlink()
    evaluator = MMEBEvaluator.v2(broken, ["ViDoRe_infovqa"], on_error="report", name="")
    metrics = evaluator(Opens())
    assert metrics["unreadable_rows"] == 1  # q1 asks for that page
    told = evaluator.errors["ViDoRe_infovqa"]
    assert told[0].startswith("row 1")
    assert told[1].startswith("left out of the pool")
    assert all("page-2.png" in message for message in told)


def test_rows_that_say_nothing_sensible_are_named(broken):
    for name, change, message in (
        ("VLM2Vec/ActivityNetQA", {"answer": "maybe"}, "ActivityNetQA, row 0: The right answer 'maybe'"),
        ("VLM2Vec/EgoSchema", {"answer": "7"}, "EgoSchema, row 0: The answer is 7, but there are 4"),
        ("VLM2Vec/SmthSmthV2", {"pos_text": "Nothing"}, "SmthSmthV2, row 0: The right answer 'Nothing'"),
        ("VLM2Vec/HMDB51", {"video_id": "../../x"}, "HMDB51, row 0: .*leaves the data folder"),
        ("VLM2Vec/Video-MME", {"answer": ""}, "Video-MME, row 0: '' is not in list"),
        ("VLM2Vec/Video-MME", {"options": ["A. One."], "answer": "D"}, "Video-MME, row 0: list index out of range"),
        ("VLM2Vec/MSVD", {"caption": []}, "MSVD, row 0: list index out of range"),
    ):
        folder = broken / "annotation" / name
        table = Dataset.load_from_disk(str(folder)).to_list()
        shutil.rmtree(folder)
        rows(broken, name, [{**table[0], **change}, *table[1:]])
        with pytest.raises(ValueError, match=message):
            MMEBEvaluator.v2(broken, [name.split("/")[1]])(SeesPaths())


def test_frames_that_lead_out_of_the_folder_and_names_too_long_are_told_by_row(broken, tmp_path):
    stored = broken / "video-tasks/frames/video_cls/UCF101"
    drawn = tmp_path / "secret.jpg"
    (stored / "UCF101_0/frame_0.jpg").rename(drawn)
    (stored / "UCF101_0/frame_0.jpg").symlink_to(drawn)
    with pytest.raises(ValueError, match=r"UCF101, row 0: .*leaves the data folder"):
        MMEBEvaluator.v2(broken, ["UCF101"])(SeesPaths())
    shutil.rmtree(broken / "annotation/VLM2Vec/UCF101")
    table = [{"video_id": "x" * 300, "pos_text": "Diving"}, {"video_id": "UCF101_1", "pos_text": "Kayaking"}]
    rows(broken, "VLM2Vec/UCF101", table)
    metrics, (told,) = broken_task(broken, "UCF101")
    assert "UCF101, row 0: There is no folder of frames" in told
    assert metrics["unreadable_rows"] == 1


def test_refusals(world, tmp_path):
    with pytest.raises(ValueError, match="no task K7"):
        MMEBEvaluator.v2(world, ["K7"])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        MMEBEvaluator.v2(tmp_path / "none")
    with pytest.raises(ValueError, match="num_frames=0"):
        MMEBEvaluator.v2(world, num_frames=0)
    with pytest.raises(FileNotFoundError, match="UCF101: there is no folder"):
        MMEBEvaluator.v2(tmp_path, ["UCF101"])(SeesPaths())
    rows(tmp_path, "VLM2Vec/UCF101", [{"video_id": "a", "label": "Diving"}])
    with pytest.raises(ValueError, match=r"has no column pos_text\. Found: video_id, label"):
        MMEBEvaluator.v2(tmp_path, ["UCF101"])(SeesPaths())


def test_frames_are_resized_as_asked(world):
    sizes = []

    class Sees(HashModel):
        def vector(self, item, prompt=""):
            sizes.extend(frame.size for frame in item.get("video", []))
            return super().vector(item.get("text"), prompt)

    MMEBEvaluator.v2(world, ["UCF101"], image_size=10)(Sees())
    assert set(sizes) == {(10, 10)}
    assert len(sizes) == 16


def test_only_the_first_thousand_of_something_something_count(tmp_path):
    frames(tmp_path / "video-tasks/frames/video_cls/SSv2/1", 1)
    row = {"video_id": 1, "pos_text": "a", "neg_text": ["a", "b"]}
    rows(tmp_path, "VLM2Vec/SmthSmthV2", [row] * 1003)
    assert len(loaded(tmp_path, "SmthSmthV2").queries) == 1000


def test_settings_tell_frames(world):
    told = json.loads(json.dumps(MMEBEvaluator.v2(world, ["K700", "VOC2007"]).get_config_dict()))
    assert told["frames"] == {"K700": "8"}


@pytest.mark.parametrize("name", ["ViDoRe_docvqa", "K700", "MSR-VTT", "QVHighlight", "MomentSeeker"])
def test_reranking_by_a_judge_of_pages_and_videos(world, tmp_path, name):
    """Its scores, asked pair by pair, decide the order among the first candidates; grades and several right answers."""
    judge = build_reranker(tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No"]), device="cpu")
    evaluator = MMEBEvaluator.v2(world, [name], name="", reranker=judge, rerank_depth=3)
    metrics = evaluator(SeesPaths())
    task, found, after = loaded(world, name), evaluator.results[name], evaluator.reranked_results[name]
    shares = []
    for place, query in enumerate(task.queries):
        shown = task.own(place) if task.corpus is None else task.corpus
        first = [int(number) for number in found.top[place][:3] if number >= 0]
        score = {at: judge.predict([(task.items[query], task.items[shown[at]])])[0] for at in first}
        ranked = sorted(first, key=lambda at: -score[at])
        assert after.top[place][: len(ranked)].tolist() == ranked
        gain = dict(zip(task.own(place).tolist(), task.gains_of(place).tolist(), strict=True))
        if found.metric == "hit@1":
            shares.append(float(gain.get(int(shown[ranked[0]]), 0) > 0))
        else:  # three pages, all of them reranked
            dcg = sum(gain.get(int(shown[at]), 0) / math.log2(at_place + 2) for at_place, at in enumerate(ranked))
            ideal = sorted(gain.values(), reverse=True)
            shares.append(dcg / sum(value / math.log2(at_place + 2) for at_place, value in enumerate(ideal)))
    np.testing.assert_allclose(after.scores, shares, atol=1e-9)
    assert metrics[f"reranked_{name}_{'ndcg@5' if found.metric == 'ndcg@5' else 'precision@1'}"] == np.mean(shares)
