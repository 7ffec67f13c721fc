"""The rows of MMEB V2's video tasks as published: which frames, which words, which candidates.

A parser takes a record, the prompts of its task and the folder of its frames. Words are put together as VLM2Vec does
(``instruction + " " + text``, after the video), or as Qwen3-VL-Embedding's authors do (the text alone, the instruction
being in the system turn); the place of the video is the chat template's to decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unime_st.data.mmeb.frames import stored_frames
from unime_st.data.mmeb.named_rows import Input, NamedRow, Prompts, Record, with_text
from unime_st.paths import resolve_below

CLIP_FRAMES = 8
"""Frames of a clip in moment retrieval, whatever the number of frames of the video."""


@dataclass(frozen=True)
class Frames:
    """Where a task's frames are and how many of a video are shown; None shows all that are stored."""

    root: Path
    number: int | None

    def video(self, name: str, text: str, number: int | None = None) -> Input:
        """An input that shows a video beside a text, if there is one."""
        return with_text({"video": stored_frames(self.root, name, number or self.number)}, text)


VideoParser = Callable[[Record, Prompts, Frames], NamedRow]


def classification(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """A video among all labels of the task."""
    label = row["pos_text"]
    return NamedRow(frames.video(row["video_id"], prompts.asking()), {label: {"text": label}}, {label: 1})


def local_classification(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """A video among the row's own labels (Something-Something V2)."""
    return NamedRow(frames.video(str(row["video_id"]), prompts.asking()), _texts(row["neg_text"]), {row["pos_text"]: 1})


def retrieval(video: str, text: str, *, from_path: bool = False) -> VideoParser:
    """A caption (the first, where there are several) among the videos of all rows; the columns that hold them."""

    def read(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
        name = PurePosixPath(row[video]).stem if from_path else row[video]
        caption = row[text] if isinstance(row[text], str) else row[text][0]
        return NamedRow({"text": prompts.asking(caption)}, {name: frames.video(name, prompts.of_target)}, {name: 1})

    return read


def yes_or_no(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """ActivityNetQA: the answer is yes or no."""
    query = prompts.asking(f"{row['question']}? (A) yes; (B) no.")
    return NamedRow(frames.video(f"v_{row['video_name']}", query), _texts(["yes", "no"]), {row["answer"]: 1})


def lettered_options(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """MVBench: options are lettered in the question and as candidates; the answer is given as its text."""
    options = _lettered(row["candidates"])
    answer = options[row["candidates"].index(row["answer"])]  # a ValueError names what is missing
    query = _with_options(prompts.asking(row["question"]), options)
    return NamedRow(frames.video(f"{row['subset']}/{row['video']}", query), _texts(options), {answer: 1})


def five_options(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """NExTQA: options are lettered in the question; the answer is given as a number.

    Candidates are lettered as Qwen3-VL-Embedding's authors evaluate, not as VLM2Vec's do.
    """
    options = [row[f"a{number}"] for number in range(5)]
    lettered = _lettered(options)
    query = _with_options(prompts.asking(row["question"]), lettered)
    shown = lettered if prompts.in_system else options
    return NamedRow(frames.video(str(row["video"]), query), _texts(shown), {shown[_place(row, 5)]: 1})


def joined_options(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """EgoSchema: the options follow the question; candidates lose their letters.

    Between question and options is a space as Qwen3-VL-Embedding's authors evaluate, and nothing as VLM2Vec's do.
    """
    options = row["option"]
    query = prompts.asking(f"{row['question']}{' ' if prompts.in_system else ''}{' '.join(options)}")
    right = options[_place(row, len(options))]
    return NamedRow(frames.video(row["video_idx"], query), _without_letters(options), {right: 1})


def listed_options(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """Video-MME: the options follow the question, each in a line; candidates lose their letters."""
    options = row["options"]
    query = "\n".join([prompts.asking(row["question"]), *options])
    right = options[list("ABCD").index(row["answer"])]
    return NamedRow(frames.video(row["videoID"], query), _without_letters(options), {right: 1})


def moments(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """QVHighlight, Charades-STA: the clip of a video that a text describes, among the folders of its clips.

    The published code takes the last ``positive*`` folder in the order of the file system for the right one; here all
    of them are right.
    """
    name = PurePosixPath(row["video_path"]).stem
    query = frames.video(f"{name}/query", prompts.asking(row["query"]))
    folder = resolve_below(frames.root, name, what="data", must_exist=False)
    clips = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "query")
    found = {f"{name}/{clip}": frames.video(f"{name}/{clip}", prompts.of_target, CLIP_FRAMES) for clip in clips}
    return NamedRow(query, found, {f"{name}/{clip}": 1 for clip in clips if clip.startswith("positive")})


_MOMENT_SEEKER = {
    "text": "Find the clip that corresponds to the given text:",
    "image": "Select the video clip that aligns with the given text and image:",
    "video": "Find the clip that corresponds to the given sentence and video segment:",
}


def moments_of_any_query(row: Record, prompts: Prompts, frames: Frames) -> NamedRow:
    """MomentSeeker: a text, alone or beside an image or a video, and several right clips; all stored frames."""

    def clip(path: str) -> str:
        return f"video_frames/{path.replace('/', '_').split('.mp4')[0]}"

    shown = row["input_frames"] or ""
    kind = {".mp4": "video", ".jpg": "image"}.get(shown[-4:], "text")
    own = replace(prompts, query=_MOMENT_SEEKER[kind])
    query: Input = {"text": own.asking(row["query"])}
    if kind == "video":
        query = frames.video(clip(shown), query["text"])
    elif kind == "image":
        query = {"image": str(resolve_below(frames.root, f"query_{shown}", must_exist=False)), **query}
    right = [clip(entry["output_path"]) for entry in row["positive_frames"]]
    names = [*right, *(clip(entry["output_path"]) for entry in row["negative_frames"])]
    return NamedRow(query, {name: frames.video(name, prompts.of_target) for name in names}, dict.fromkeys(right, 1),
                    own.instruction)  # fmt: skip


def _texts(texts: list[str]) -> dict[str, Input]:
    return {text: {"text": text} for text in texts}


def _lettered(options: list[str]) -> list[str]:
    return [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]


def _with_options(question: str, options: list[str]) -> str:
    return "\n".join([question, "Options:", *options]).rstrip()


def _without_letters(options: list[str]) -> dict[str, Input]:
    """Candidates by their whole option; ``A. a dog.`` is the text ``a dog``, and one without a letter stays."""
    return {
        option: {"text": option[option.find(". ") :].strip(". ") if ". " in option else option} for option in options
    }


def _place(row: Record, count: int) -> int:
    place = int(row["answer"])
    if not 0 <= place < count:
        raise ValueError(f"The answer is {place}, but there are {count} options, from 0. Mend or remove the row.")
    return place
