"""Small benchmarks of videos and of visual documents, made of the drawings and texts of concepts never trained on.

```
media.json                     the rows: labels, directions, names of folders and pages
moving/<row>/frame-<n>.png     a drawing that crosses a plain background in one of four directions
turning/<row>/frame-<n>.png    a drawing that fades into another
text/<row>.png                 a page with title, definition and keywords
illustrated/<row>.png          the same below the drawing
```

They go through the tasks, the evaluator and the report that MMEB V2's videos and documents go through. The miniature's
family takes no videos, so it is shown their frames as images.
"""

from __future__ import annotations

import json
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import TRAINED_VENDORS
from emoji.images import LARGEST
from emoji.packages import whole_folder
from unime_st import load_encoder
from unime_st.data.mmeb.named_rows import NamedRow, task_of
from unime_st.evaluation import MMEBEvaluator
from unime_st.evaluation.mmeb.tasks import Metric, MMEBTask
from unime_st.videos import VideoSettings

FORMAT = 1  # of the files; a change makes them again
FRAMES = 4
SHOWN = 2  # rows of each task in the report
VENDOR = TRAINED_VENDORS[0]
DIRECTIONS = {
    "from left to right": (1, 0),
    "from right to left": (-1, 0),
    "from top to bottom": (0, 1),
    "from bottom to top": (0, -1),
}
BACKGROUNDS = ("white", "lightyellow", "lightblue", "lightgray")
TASKS = {
    "video: which way?": "EmojiMoving",
    "video: what becomes what?": "EmojiTurning",
    "text→video R@1": "EmojiVideo_t2v",
    "keywords→page nDCG@5": "EmojiPages",
    "keywords→illustrated page nDCG@5": "EmojiIllustratedPages",
}
"""Column of the report -> task."""

Row = dict[str, Any]
Record = Mapping[str, Any]


def build_media(benchmark: EmojiBenchmark, root: str | Path, *, rows: int, seed: int = 0) -> Path:
    """Write videos and pages of so many concepts of the test split, unless they are there with the same settings."""
    target = Path(root)
    settings = {"format": FORMAT, "rows": rows, "seed": seed, "benchmark": benchmark.info["settings"]}
    if target.exists():
        if not (target / "media.json").is_file():
            raise FileExistsError(f"{target} exists and holds no videos and pages made here. Give another `root`.")
        if _told(target)["settings"] == settings:
            return target
    with whole_folder(target) as scratch:
        made = list(_rows(benchmark, rows, random.Random(seed)))
        for number, row in enumerate(made):
            _write(scratch, number, row, benchmark.image_root)
        (scratch / "media.json").write_text(json.dumps({"settings": settings, "rows": made}, indent=1) + "\n")
    return target


def _rows(benchmark: EmojiBenchmark, count: int, rng: random.Random) -> Iterator[Row]:
    """Concepts that have keywords, each with a direction, the concept that it becomes and a third one."""
    images, _ = benchmark.retrieval("test", VENDOR)
    said = benchmark.texts("test")
    having = [place for place, keywords in enumerate(said["keywords"]) if keywords]
    for place in rng.sample(having, min(count, len(having))):
        becomes, other = rng.sample([another for another in having if another != place], 2)
        yield {
            **{kind: texts[place] for kind, texts in said.items()},
            "image": str(images[place].relative_to(benchmark.image_root)),
            "direction": rng.choice(list(DIRECTIONS)),
            "background": rng.choice(BACKGROUNDS),
            "becomes": said["label"][becomes],
            "becomes_image": str(images[becomes].relative_to(benchmark.image_root)),
            "other": said["label"][other],
        }


def _write(folder: Path, number: int, row: Row, images: Path) -> None:
    drawn, becomes = (_opened(images / row[name]) for name in ("image", "becomes_image"))
    shares = np.linspace(0, 1, FRAMES)
    videos = {
        "moving": [_moved(drawn, row["direction"], row["background"], share) for share in shares],
        "turning": [Image.blend(drawn, becomes, share) for share in shares],
    }
    for kind, frames in videos.items():
        own = folder / kind / str(number)
        own.mkdir(parents=True)
        for place, frame in enumerate(frames):
            frame.save(own / f"frame-{place}.png", compress_level=1)
    for kind, picture in (("text", None), ("illustrated", drawn)):
        (folder / kind).mkdir(exist_ok=True)
        page(row["label"], row["definition"], row["keywords"], picture).save(folder / kind / f"{number}.png")


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((LARGEST, LARGEST), Image.Resampling.BICUBIC)


def _moved(drawn: Image.Image, direction: str, background: str, share: float) -> Image.Image:
    """The drawing at half its size, so far on its way across the middle of the background."""
    half = LARGEST // 2
    canvas, shown = (Image.new("RGB", (LARGEST, LARGEST), colour) for colour in (background, "white"))
    left, top = (int(half / 2 + way * (share - 0.5) * half) for way in DIRECTIONS[direction])
    shown.paste(drawn.resize((half, half), Image.Resampling.BICUBIC), (left, top))
    return ImageChops.multiply(canvas, shown)  # a drawing's white is the background's


def page(title: str, definition: str, keywords: str, picture: Image.Image | None = None) -> Image.Image:
    """A page of 320 x 400 pixels: title, a picture if there is one, definition, keywords."""
    made = Image.new("RGB", (320, 400), "white")
    draw = ImageDraw.Draw(made)
    draw.multiline_text((20, 16), textwrap.fill(title, 26), "black", ImageFont.load_default(20))
    if picture is not None:
        made.paste(picture, (80, 90))
    below = "\n\n".join(textwrap.fill(text, 40) for text in (definition, f"See also: {keywords}.") if text)
    draw.multiline_text((20, 90 if picture is None else 264), below, "black", ImageFont.load_default(14), spacing=5)
    return made


def media_tasks(root: Path) -> list[MMEBTask]:
    """The tasks, as the evaluator takes them."""
    rows = list(enumerate(_told(root)["rows"]))

    def video(kind: str, row: Record, **text: str) -> Row:
        folder = root / kind / str(row["number"])
        return {"video": [str(folder / f"frame-{place}.png") for place in range(FRAMES)], **text}

    def moving(row: Record) -> NamedRow:
        query = video("moving", row, text="Which way does the drawing move?")
        return _choice(query, list(DIRECTIONS), row["direction"])

    def turning(row: Record) -> NamedRow:
        one, two, other = (row[name] for name in ("label", "becomes", "other"))
        pairs = [(one, two), (two, one), (one, other), (other, two)]
        told = [f"{before} turns into {after}" for before, after in pairs]
        return _choice(video("turning", row, text="What turns into what?"), told, told[0])

    def to_video(row: Record) -> NamedRow:
        name = str(row["number"])
        return NamedRow({"text": row["label"]}, {name: video("moving", row)}, {name: 1})

    def to_page(kind: str) -> Callable[[Record], NamedRow]:
        def read(row: Record) -> NamedRow:
            name = f"{row['number']}.png"
            return NamedRow({"text": row["keywords"]}, {name: {"image": str(root / kind / name)}}, {name: 1})

        return read

    def task(name: str, read: Callable[[Record], NamedRow], modality: str, *, shared: bool) -> MMEBTask:
        def load(*, on_error: Literal["raise", "report"]) -> Any:
            records = ({"number": number, **row} for number, row in rows)
            return task_of(name, records, read, shared=shared, on_error=on_error)

        metric: Metric = "ndcg@5" if modality == "visdoc" else "hit@1"
        return MMEBTask(name, load, metric, modality, frames=str(FRAMES) if modality == "video" else "")

    return [
        task("EmojiMoving", moving, "video", shared=False),
        task("EmojiTurning", turning, "video", shared=False),
        task("EmojiVideo_t2v", to_video, "video", shared=True),
        task("EmojiPages", to_page("text"), "visdoc", shared=True),
        task("EmojiIllustratedPages", to_page("illustrated"), "visdoc", shared=True),
    ]


def _choice(query: Row, texts: list[str], right: str) -> NamedRow:
    """A query that chooses among texts, the right one first, as in MMEB: a tie would be right."""
    ordered = [right, *(text for text in texts if text != right)]
    return NamedRow(query, {text: {"text": text} for text in ordered}, {right: 1})


def galleries(checkpoint: Path, root: Path, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Task -> its first rows with what the checkpoint finds, as entries of a report's gallery."""
    evaluator, model = evaluator_of(checkpoint, root, cache)
    evaluator(model)
    return {task: evaluator.top(task, 4, places=range(SHOWN), with_right=True) for task in TASKS.values()}


def guessing(rows: int) -> dict[str, float]:
    """Column -> the score, in [0, 1], that guessing has on average.

    >>> round(float(guessing(80)["keywords→page nDCG@5"]), 3)
    0.037
    """
    ndcg = sum(1 / np.log2(rank + 1) for rank in range(1, min(5, rows) + 1)) / rows
    levels = (1 / len(DIRECTIONS), 1 / 4, 1 / rows, ndcg, ndcg)
    return dict(zip(TASKS, levels, strict=True))


def evaluator_of(checkpoint: Path, root: Path, cache: Path) -> tuple[MMEBEvaluator, Any]:
    """The evaluator and the encoder, which shows the frames of a video as images."""
    model = load_encoder(checkpoint, device="cpu", videos=VideoSettings(num_frames=FRAMES, as_images=True))
    tasks = media_tasks(root)
    evaluator = MMEBEvaluator(
        None, tasks, meta_tasks={}, name="media", cache_dir=cache, show_progress_bar=True, write_csv=False
    )
    return evaluator, model


def evaluate_media(checkpoint: Path, root: Path, cache: Path) -> dict[str, list[float]]:
    """Column -> the score of each row, in [0, 1]."""
    evaluator, model = evaluator_of(checkpoint, root, cache)
    evaluator(model)
    return {column: evaluator.results[task].scores.tolist() for column, task in TASKS.items()}


def _told(root: Path) -> dict[str, Any]:
    return json.loads((root / "media.json").read_text(encoding="utf-8"))
