"""MMEB V2 in its published folders, two rows a task: frames, pages, and the data sets of the rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image

from unime_st.evaluation.mmeb.tasks import META_TASKS

STORED = 10  # frames of a video


def drawing(path: Path, seed: str, side: int = 28) -> None:
    """A picture of two colours that its seed decides."""
    digest = hashlib.sha256(seed.encode()).digest()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (side, side), tuple(digest[:3]))
    picture.paste(tuple(digest[3:6]), (digest[6] % side, digest[7] % side, side, side))
    picture.save(path)


def frames(folder: Path, count: int = STORED) -> None:
    """A folder of frames whose order is not that of their letters."""
    for number in range(count):
        drawing(folder / f"frame_{number}.jpg", f"{folder.name} {number}")


def rows(root: Path, repository: str, table: list[dict[str, Any]], config: str = "") -> None:
    Dataset.from_list(table).save_to_disk(str(root / "annotation" / repository / config))


def write_v2(root: Path) -> Path:
    """Write all 78 tasks."""
    _images(root)
    stored = root / "video-tasks" / "frames"
    _classes(root, stored / "video_cls")
    _videos(root, stored / "video_ret")
    _questions(root, stored / "video_qa")
    _moments(root, stored / "video_mret")
    _documents(root)
    return root


def _images(root: Path) -> None:
    for task in META_TASKS:
        table = [
            {
                "qry_inst": f"<|image_1|> Answer for {task}:",
                "qry_text": f"question {number}",
                "qry_img_path": f"{task}/{number}.jpg",
                "tgt_text": [f"answer {number}", "another", "a third"],
                "tgt_img_path": ["", "", ""],
            }
            for number in range(2)
        ]
        folder = root / "annotation/ziyjiang/MMEB_Test_Instruct" / task
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(table), folder / "test-00000-of-00001.parquet")
        for number in range(2):
            drawing(root / "image-tasks" / task / f"{number}.jpg", f"{task} {number}")


def _classes(root: Path, stored: Path) -> None:
    labels = {
        "K700": ["parkour", "playing_cricket"],
        "HMDB51": ["ride_bike", "wave"],
        "UCF101": ["Kayaking", "Diving"],
        "Breakfast": ["tea", "pancake"],
    }
    for task, own in labels.items():
        names = [f"{task}_{number}" for number in range(2)]
        table = [{"video_id": name, "pos_text": label} for name, label in zip(names, own, strict=True)]
        rows(root, f"VLM2Vec/{'Kinetics-700' if task == 'K700' else task}", table)
        for name in names:
            frames(stored / task / name)
    table = [
        {"video_id": number, "pos_text": "Closing something", "neg_text": ["Moving it", "Closing something"]}
        for number in (77, 78)
    ]
    rows(root, "VLM2Vec/SmthSmthV2", table)
    for row in table:
        frames(stored / "SSv2" / str(row["video_id"]))


def _videos(root: Path, stored: Path) -> None:
    tables: dict[str, list[dict[str, Any]]] = {
        "VLM2Vec/MSR-VTT": [
            {"video_id": f"video{n}", "video": f"video{n}.mp4", "caption": f"a man {n}"} for n in (7, 8)
        ],
        "VLM2Vec/MSVD": [
            {"video_id": f"clip{n}", "video": f"clip{n}.avi", "caption": [f"a dog {n}", "unused"]} for n in (1, 2)
        ],
        "VLM2Vec/DiDeMo": [{"video": f"test/1@N0_{n}.mp4", "caption": f"the sea {n}"} for n in (1, 2)],
        "lmms-lab/YouCook2": [
            {"id": f"xyz_{n}", "video_path": f"a/xyz_{n}.mp4", "sentence": f"stir {n}"} for n in (1, 2)
        ],
        "VLM2Vec/VATEX": [{"videoID": f"-v_{n}", "enCap": [f"people {n}", "unused"]} for n in (1, 2)],
    }
    for repository, table in tables.items():
        rows(root, repository, table)
    folders = {
        "MSR-VTT": ["video7", "video8"],
        "MSVD": ["clip1", "clip2"],
        "DiDeMo": ["1@N0_1", "1@N0_2"],
        "VATEX": ["-v_1", "-v_2"],
    }
    for task, names in folders.items():
        for name in names:
            frames(stored / task / name)
    for name in ("xyz_1", "xyz_2"):  # as the archive has them
        frames(stored / "data/ziyan/video_retrieval/YouCook2/frames" / name)


def _questions(root: Path, stored: Path) -> None:
    subsets = (
        "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action "
        "object_existence object_interaction object_shuffle moving_direction action_localization scene_transition "
        "action_count moving_count moving_attribute state_change fine_grained_pose character_order "
        "egocentric_navigation counterfactual_inference"
    )
    for subset in subsets.split():
        row = {"question": f"What {subset}?", "video": "a.mp4", "candidates": ["Up.", "Down."], "answer": "Down."}
        rows(root, "VLM2Vec/MVBench", [row], subset)
        frames(stored / "MVBench" / subset / "a.mp4", 3)
    options = ["A. One cat.", "B. Two cats.", "C. No cat.", "D. A dog."]
    rows(
        root,
        "VLM2Vec/Video-MME",
        [{"question": "How many?", "videoID": "yt1", "options": options, "answer": answer} for answer in "BD"],
    )
    five = {f"a{number}": f"because {number}" for number in range(5)}
    rows(root, "VLM2Vec/NExTQA", [{"video": 4740931975, "question": "why", "answer": n, **five} for n in (3, 0)])
    rows(
        root,
        "VLM2Vec/EgoSchema",
        [{"video_idx": "ego", "question": "What is done?", "answer": str(n), "option": options} for n in (2, 0)],
    )
    rows(
        root,
        "VLM2Vec/ActivityNetQA",
        [{"video_name": "abc", "question": "is it day", "answer": answer} for answer in ("yes", "no")],
    )
    for folder in ("Video-MME/yt1", "NExTQA/4740931975", "egoschema/ego", "ActivityNetQA/v_abc"):
        frames(stored / folder)


def _moments(root: Path, stored: Path) -> None:
    for task, folder in (("QVHighlight", "QVHighlight"), ("Charades-STA", "Charades_STA")):
        table = [{"query": f"she laughs {n}", "video_path": f"videos/{task}_{n}.mp4"} for n in (1, 2)]
        rows(root, f"VLM2Vec/{task}", table)
        for number in (1, 2):
            own = stored / folder / f"{task}_{number}"
            frames(own / "query")
            frames(own / "positive_0", 9)
            frames(own / "negative_0", 2)
            frames(own / "negative_1", 2)
    clips = {
        "positive_frames": [{"output_path": "m/p1.mp4"}, {"output_path": "m/p2.mp4"}],
        "negative_frames": [{"output_path": "m/n1.mp4"}],
    }
    shown = ("", "still.jpg", "m/q.mp4")
    rows(root, "VLM2Vec/MomentSeeker", [{"query": "the goal", "input_frames": name, **clips} for name in shown])
    for name in ("m_p1", "m_p2", "m_n1", "m_q"):
        frames(stored / "MomentSeeker/video_frames" / name)
    drawing(stored / "MomentSeeker/query_still.jpg", "still")


def _documents(root: Path) -> None:
    from unime_st.evaluation.mmeb.v2 import DOCUMENT_TASKS

    long = "x" * 60
    for task in DOCUMENT_TASKS:
        visrag = task.group == "VisRAG"
        ids = [f"{long}{n}.jpg" for n in range(3)] if visrag else [f"page-{n}" for n in range(3)]
        rows(root, task.rows, [{"corpus-id": own, "doc": "d"} for own in ids], "corpus")
        rows(
            root,
            task.rows,
            [{"query-id": f"q{n}", "query": f"which {n}?", "language": "fr"} for n in (0, 1)],
            "queries",
        )
        pairs = [("q0", 0, 2), ("q0", 1, 1), ("q0", 2, 0), ("q1", 2, 1)]
        rows(
            root,
            task.rows,
            [{"query-id": query, "corpus-id": ids[page], "score": score} for query, page, score in pairs],
            "qrels",
        )
        for name in ids:
            file = f"{'x' * 50}_{hashlib.md5(name.encode()).hexdigest()[:8]}.jpg" if visrag else f"{name}.png"
            drawing(root / "visdoc-tasks" / task.pages[0] / file, f"{task.name} {name}")
