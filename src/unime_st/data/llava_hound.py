"""Training pairs of videos in LLaVA-Hound's layout: folders of frames, and a file of conversations about them."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unime_st.arguments import require_number
from unime_st.columns import ANCHOR, POSITIVE
from unime_st.data.images import ItemReader
from unime_st.images import IMAGE_FILES
from unime_st.paths import resolve_below
from unime_st.prompts import LLAVA_HOUND_INSTRUCTIONS

logger = logging.getLogger(__name__)

Task = Literal["caption", "video", "question"]
Turn = dict[str, str | None]

_PLACEHOLDER = "<video>"
_SPEAKERS = ["human", "gpt"]


def load_llava_hound(
    file: str | Path,
    frames: str | Path,
    *,
    task: Task,
    missing_videos: Literal["error", "drop"] = "error",
    max_rows: int | None = None,
    shuffle_seed: int | None = None,
) -> Dataset:
    r"""Load pairs of videos and texts in the layout of ``ShareGPTVideo/train_video_and_instruction`` (LLaVA-Hound).

    The file, .jsonl or .json, has rows ``{"id", "video", "conversations": [{"from", "value"}, ...]}``, of which the
    first turn asks, with ``<video>`` in it, and the second replies; the frames of a video are the image files in the
    folder that it names below ``frames``. Which of the frames a model sees, ``videos`` of
    :func:`~unime_st.build_encoder` says; nothing is opened here.

    The instructions are those that VLM2Vec-V2 trains with (:data:`~unime_st.prompts.LLAVA_HOUND_INSTRUCTIONS`);
    ``<video>`` is taken out of the texts, since a chat template puts the video.

    Args:
        file: Such as ``video_caption_300k.jsonl`` or ``video_240k_caption_15k.jsonl``.
        frames: Folder of the videos' folders, such as ``train_300k``.
        task: ``"caption"`` asks for the reply, by the video and the first turn; ``"video"`` for the video, by the
            reply; ``"question"`` for the reply, by the video and an instruction before the first turn.
        missing_videos: What a video without a folder, or without a frame in it, is: an error, or rows that are left out
            and counted in the log, where only some of the frames were fetched.
        max_rows: Rows, at most: the first ones or, with ``shuffle_seed``, some drawn at random.
        shuffle_seed: Draws ``max_rows``.

    Returns:
        Rows ``anchor`` and ``positive``, each ``{"video", "text"}`` or ``{"text"}``; a video is its folder's path.

    Raises:
        FileNotFoundError: There is no such file or folder, or a video has no frames; names file and line.
        ValueError: The file is damaged, a row lacks a part or is empty, or a path leaves the folder; names file and
            line. No row is left.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "frames" / "v_1").mkdir(parents=True)
        >>> (root / "frames" / "v_1" / "0.jpg").touch()
        >>> turns = [{"from": "human", "value": "<video>\nWho sings?"}, {"from": "gpt", "value": "A bird."}]
        >>> _ = (root / "qa.jsonl").write_text(json.dumps({"id": "1", "video": "v_1", "conversations": turns}))
        >>> rows = load_llava_hound(root / "qa.jsonl", root / "frames", task="question")
        >>> rows[0]["anchor"]["text"], rows[0]["positive"]
        ('Answer a question based on the content of a video. Who sings?', {'text': 'A bird.'})
    """
    if task not in LLAVA_HOUND_INSTRUCTIONS:
        raise ValueError(f"`task={task!r}`; choose one of {', '.join(map(repr, LLAVA_HOUND_INSTRUCTIONS))}.")
    if missing_videos not in ("error", "drop"):
        raise ValueError(f"`missing_videos={missing_videos!r}`, but it must be 'error' or 'drop'.")
    require_number("max_rows", max_rows, least=1, optional=True)
    path, folder = Path(file), Path(frames)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. Give that of the conversations.")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Give the one that holds a folder for each video.")
    anchors: list[Turn] = []
    positives: list[Turn] = []
    missing: list[str] = []
    known: dict[str, str | None] = {}  # folder of each video, None where there is none
    for where, row in _rows(path):
        name, asks, replies = _parts(row, where, task)
        if name not in known:
            known[name] = _folder_of(folder, name, where)
        if known[name] is None:
            if missing_videos == "error":
                raise FileNotFoundError(
                    f"{where}: there is no folder {name!r:.200} below {str(folder)!r} that holds frames. "
                    "Unpack them there, or leave such rows out with `missing_videos='drop'`."
                )
            missing.append(name)
            continue
        anchor, positive = _pair(task, known[name], asks, replies)
        anchors.append(anchor)
        positives.append(positive)
    if missing:
        logger.warning(
            "%s: left out %d rows without frames below %s, such as of %r", path, len(missing), folder, missing[0]
        )
    if not anchors:
        raise ValueError(f"{path} has no row{' with frames' if missing else ''}. Give another file.")
    kind = pa.struct([("video", pa.string()), ("text", pa.string())])
    rows = Dataset(pa.table({ANCHOR: pa.array(anchors, kind), POSITIVE: pa.array(positives, kind)}))
    return chosen(rows, max_rows, shuffle_seed).with_transform(ItemReader())


def chosen(rows: Dataset, max_rows: int | None, seed: int | None) -> Dataset:
    """The first rows, or with a seed some drawn at random, in their order."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    if seed is None:
        return rows.select(range(max_rows))
    return rows.select(np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False)))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The file's rows, and what errors call each: lines of a .jsonl, entries of a .json."""
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or no JSON ({error}). Fetch it again.") from error
        if not isinstance(found, list):
            raise ValueError(f"{path} holds a {type(found).__name__}, not a list of rows. Give another file.")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(found))
        return
    with path.open(encoding="utf-8-sig") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text after line {number}. Fetch it again.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: damaged or no JSON ({error}). Fetch the file again.") from error


def _parts(row: Any, where: str, task: Task) -> tuple[str, str, str]:
    """A row's video, what its first turn asks without the placeholder, and what the second replies."""
    try:
        name, turns = row["video"], row["conversations"]
        speakers = [turn.get("from", speaker) for turn, speaker in zip(turns, _SPEAKERS, strict=False)]
        asks, replies = (turn["value"].replace(_PLACEHOLDER, "").strip() for turn in turns[:2])
        (asks + replies).encode()
    except UnicodeEncodeError as error:  # as broken JSON has it
        raise ValueError(f"{where}: a turn is not valid UTF-8 ({error}). Mend the row.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: a row holds `video`, the name of its folder of frames, and `conversations`, a list of two "
            'turns {"from", "value"} or more. Give another file, or mend the row.'
        ) from error
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: `video` is {name!r}, but it must be the name of a folder. Mend the row.")
    if speakers != _SPEAKERS:
        raise ValueError(
            f"{where}: the first two turns are from {speakers}, but must be from {_SPEAKERS}: one asks, the other "
            "replies. Mend the row."
        )
    if not replies:
        raise ValueError(f"{where}: the second turn, the reply, is empty. Remove the row.")
    if task == "question" and not asks:
        raise ValueError(f"{where}: the first turn, the question, is empty. Remove the row.")
    return name, asks, replies


def _folder_of(root: Path, name: str, where: str) -> str | None:
    """A video's folder; None where there is none, or no frame in it."""
    try:
        path = resolve_below(root, name, what="video", must_exist=False)
        with os.scandir(path) as found:
            return str(path) if any(Path(entry.name).suffix.lower() in IMAGE_FILES for entry in found) else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ENAMETOOLONG:
            return None
        raise


def _pair(task: Task, video: str | None, asks: str, replies: str) -> tuple[Turn, Turn]:
    of_query, of_target = LLAVA_HOUND_INSTRUCTIONS[task]
    if task == "video":
        return {"video": None, "text": f"{of_query} {replies}"}, {"video": video, "text": of_target}
    text = f"{of_query} {asks}".strip()
    return {"video": video, "text": text or None}, {"video": None, "text": replies}
