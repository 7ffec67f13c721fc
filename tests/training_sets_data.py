"""Files in the layouts of LLaVA-Hound, ColPali's training set and VisRAG's."""

import io
import json

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from tiny import picture

ASKED = "Write a detailed caption of the video.\n<video>"


def turns(asks, replies):
    return [{"from": "human", "value": asks}, {"from": "gpt", "value": replies}]


def conversations(count=4):
    return [
        {"id": f"v_{n}_0", "video": f"v_{n}", "conversations": turns(ASKED, f"Clip {n} shows a cat.")}
        for n in range(count)
    ]


def write_hound(folder, rows, name="video_caption_300k.jsonl"):
    for row in rows:
        frames = folder / "train_300k" / row["video"]
        frames.mkdir(parents=True, exist_ok=True)
        for number in range(5):
            picture(("red", "green", "white", "pink")[number % 4], (40, 30)).save(frames / f"c{number:02d}.jpeg")
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
    (folder / name).write_text(text)
    return folder / name, folder / "train_300k"


def page(number):
    buffer = io.BytesIO()
    picture("white", (60 + number, 80)).save(buffer, "png")
    return buffer.getvalue()


def colpali_rows(count=4):
    return {
        "image": [{"bytes": page(n), "path": f"images/{n}.png"} for n in range(count)],
        "image_filename": [f"images/{n}.png" for n in range(count)],
        "query": [f"What is shown in figure {n}?" for n in range(count)],
        "answer": [f"A curve of {n}." for n in range(count)],
        "source": ["arxiv_qa"] * count,
        "options": [None] * count,
        "page": [str(n) for n in range(count)],
        "model": ["gpt4V"] * count,
        "prompt": ["A long prompt."] * count,
        "answer_type": ["free"] * count,
    }


def write_parquet(rows, file):
    """As the Hub has them: the image column is marked as images in the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = Features({name: ImageFeature() if name == "image" else Value("string") for name in rows})
    Dataset.from_dict(rows, features=features).to_parquet(str(file))
