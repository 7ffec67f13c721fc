"""MMEB V2 whole: the 42 tasks of videos and visual documents, as data, and where they lie in the published folders.

Read from TIGER-AI-Lab/VLM2Vec (``experiments/public/eval``, ``src/data/eval_dataset``) and, for the folders that the
archives make, QwenLM/Qwen3-VL-Embedding (``scripts/evaluation/mmeb_v2``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from sentence_transformers import SentenceTransformer

from unime_st.arguments import require_number
from unime_st.data.mmeb import document_rows, video_rows
from unime_st.data.mmeb.eval_rows import EvalTask, instructed_pairs
from unime_st.data.mmeb.named_rows import NamedRow, Prompts, read_table, task_of
from unime_st.data.mmeb.video_rows import CLIP_FRAMES, Frames, VideoParser
from unime_st.distributed import rank
from unime_st.evaluation.mmeb.tasks import META_TASKS, Metric, MMEBTask, image_task

logger = logging.getLogger(__name__)

ANNOTATION = "annotation"
"""Folder, below the root, of the data sets that hold the rows: ``annotation/<owner>/<name>``, as on the Hub."""

IMAGE_ROWS = "ziyjiang/MMEB_Test_Instruct"
_ITS_DEFAULT = "Represent the user"  # as Qwen3-VL-Embedding's default instruction begins
FRAMES = 8
"""Frames of a video in VLM2Vec's evaluation; that of Qwen3-VL-Embedding takes 64."""

TaskPrompts = Literal["vlm2vec", "qwen3_vl_embedding"]
"""Whose words go with the tasks: VLM2Vec's stand before queries and beside candidates, Qwen3-VL-Embedding's in the
queries' system turns alone."""

OnError = Literal["raise", "report"]


@dataclass(frozen=True)
class VideoTask:
    """One video task: its rows and frames, how they are read, and what is said."""

    name: str
    group: str
    rows: str  # data set on the Hub
    frames: tuple[str, ...]  # folders of the frames, below `video-tasks/frames`; the first that is there
    parser: VideoParser
    columns: str
    query: str
    target: str = ""
    pool: Literal["local", "global"] = "local"
    labels: str | None = None  # the task's name in the file of labels
    config: str | None = None
    split: str = "test"
    most_rows: int | None = None  # the published evaluation takes these first ones
    sampling: Literal["video", "clips", "stored"] = "video"  # what is sampled, for those who read a number

    metric: Metric = "hit@1"


@dataclass(frozen=True)
class DocumentTask:
    """One task of visual documents."""

    name: str
    group: str
    rows: str
    pages: tuple[str, ...]  # folders of the pages' images, below `visdoc-tasks`
    file_of: document_rows.PageName = document_rows.page_by_id
    split: str = "test"
    metric: Metric = "ndcg@5"


_VIDEO = "Understand the content of the provided video."
_QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question: "
)
_DESCRIBED = "Find the clip that corresponds to the described scene in the given video:"
PAGE_PROMPTS = Prompts(
    "Find a document image that matches the given query:", "Understand the content of the provided document image."
)
_TEXT_TO_IMAGE = frozenset(("VisDial", "MSCOCO_t2i", "VisualNews_t2i", "WebQA", "EDIS", "Wiki-SS-NQ"))
_MVBENCH = (
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action "
    "object_existence object_interaction object_shuffle moving_direction action_localization scene_transition "
    "action_count moving_count moving_attribute state_change fine_grained_pose character_order egocentric_navigation "
    "counterfactual_inference"
)


def _labelled(name: str, query: str, rows: str | None = None) -> VideoTask:
    return VideoTask(name, "V-CLS", f"VLM2Vec/{rows or name}", (f"video_cls/{name}",), video_rows.classification,
                     "video_id pos_text", query, pool="global", labels=rows or name)  # fmt: skip


def _retrieved(name: str, query: str, video: str, text: str, **others: Any) -> VideoTask:
    parser = video_rows.retrieval(video, text, from_path=others.pop("from_path", False))
    folders = (f"video_ret/{name}", f"video_ret/data/ziyan/video_retrieval/{name}/frames")
    rows = others.pop("rows", f"VLM2Vec/{name}")
    return VideoTask(name, "V-RET", rows, folders, parser, f"{video} {text}", query, _VIDEO, "global", **others)


def _asked(name: str, parser: VideoParser, columns: str, folders: str | None = None, **others: Any) -> VideoTask:
    frames = tuple(f"video_qa/{folder}" for folder in (folders or name).split())
    return VideoTask(name, "V-QA", f"VLM2Vec/{name}", frames, parser, columns, _QUESTION, **others)


def _moment(name: str, folders: str) -> VideoTask:
    frames = tuple(f"video_mret/{folder}" for folder in folders.split())
    return VideoTask(name, "V-MRET", f"VLM2Vec/{name}", frames, video_rows.moments, "query video_path", _DESCRIBED,
                     _VIDEO, sampling="clips")  # fmt: skip


VIDEO_TASKS: tuple[VideoTask, ...] = (
    _labelled("K700", "Recognize the category of the video content.", "Kinetics-700"),
    VideoTask(
        "SmthSmthV2", "V-CLS", "VLM2Vec/SmthSmthV2", ("video_cls/SSv2",), video_rows.local_classification,
        "video_id pos_text neg_text",
        "What actions or object interactions are being performed by the person in the video?", most_rows=1000,
    ),
    _labelled("HMDB51", "What actions or objects interactions are the person in the video doing?"),
    _labelled("UCF101", "What activities or sports are being performed by the person in the video?"),
    _labelled("Breakfast", "Recognize the breakfast type that the person is cooking in the video. "),
    _asked("MVBench", video_rows.lettered_options, "question video candidates answer", split="train", config=_MVBENCH),
    _asked("Video-MME", video_rows.listed_options, "question videoID options answer"),
    _asked("NExTQA", video_rows.five_options, "video question answer a0 a1 a2 a3 a4", config="MC"),
    _asked("EgoSchema", video_rows.joined_options, "video_idx question answer option", "EgoSchema egoschema",
           config="Subset"),
    _asked("ActivityNetQA", video_rows.yes_or_no, "video_name question answer"),
    _retrieved("DiDeMo", "Find a video that includes the following described scenes:", "video", "caption",
               from_path=True),
    _retrieved("MSR-VTT", "Find a video that contains the following visual content:", "video_id", "caption",
               config="test_1k"),
    _retrieved("MSVD", "Find the video snippet that corresponds to the given summary:", "video_id", "caption"),
    _retrieved("VATEX", "Select a video that fits the description provided:", "videoID", "enCap"),
    _retrieved("YouCook2", "Find a video that demonstrates the following action while making a recipe:", "id",
               "sentence", rows="lmms-lab/YouCook2", split="val"),
    _moment("QVHighlight", "QVHighlight"),
    _moment("Charades-STA", "Charades_STA Charades-STA"),
    VideoTask(
        "MomentSeeker", "V-MRET", "VLM2Vec/MomentSeeker", ("video_mret/MomentSeeker",),
        video_rows.moments_of_any_query, "query positive_frames negative_frames input_frames", "",
        "Understand the content of the provided video clip.", sampling="stored",
    ),
)  # fmt: skip
"""The 18 video tasks, in the published order; MomentSeeker is the set of 1,602 rows."""


def _vidore(name: str, repository: str, folder: str | None = None) -> DocumentTask:
    group = "ViDoRe V2" if "_v2" in name else "ViDoRe V1"
    return DocumentTask(f"ViDoRe_{name}", group, f"vidore/{repository}", _folders(folder or f"ViDoRe_{name}"))


def _folders(name: str) -> tuple[str, ...]:
    return f"images/{name}", name


_V1 = {"arxivqa": "_subsampled", "docvqa": "_subsampled", "infovqa": "_subsampled", "tabfquad": "_subsampled"}
DOCUMENT_TASKS: tuple[DocumentTask, ...] = (
    *(
        _vidore(name, f"{name}_test{_V1.get(name, '')}_beir")
        for name in (*_V1, "tatdqa", "shiftproject", "syntheticDocQA_artificial_intelligence", "syntheticDocQA_energy",
                     "syntheticDocQA_government_reports", "syntheticDocQA_healthcare_industry")
    ),
    _vidore("esg_reports_human_labeled_v2", "esg_reports_human_labeled_v2", "esg_reports_human_labeled_v2"),
    *(
        _vidore(f"{name}_multilingual", name, f"{name}_multilingual")
        for name in ("biomedical_lectures_v2", "economics_reports_v2", "esg_reports_v2")
    ),
    *(
        DocumentTask(f"VisRAG_{name}", "VisRAG", f"openbmb/VisRAG-Ret-Test-{name}", _folders(f"VisRAG_{name}"),
                     document_rows.page_by_short_name, "train")
        for name in ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
    ),
    *(
        DocumentTask(name, "VisDoc OOD", f"VLM2Vec/{rows}", _folders(name))
        for name, rows in (
            ("ViDoSeek-page", "ViDoSeek-page-fixed"), ("ViDoSeek-doc", "ViDoSeek"),
            ("MMLongBench-page", "MMLongBench-page-fixed"), ("MMLongBench-doc", "MMLongBench-doc"),
        )
    ),
)  # fmt: skip
"""The 24 tasks of visual documents, in the published order; the "-page" ones in their mended form (VLM2Vec #167)."""

V2_META_TASKS: dict[str, str] = {
    **META_TASKS,
    **{task.name: task.group for task in VIDEO_TASKS},
    **{task.name: task.group for task in DOCUMENT_TASKS},
}
"""The group of each of the 78 tasks, in the published order."""


def v2_tasks(
    root: str | Path,
    names: Sequence[str] | None = None,
    *,
    num_frames: int | None = FRAMES,
    task_prompts: TaskPrompts = "vlm2vec",
) -> list[MMEBTask]:
    """The tasks of MMEB V2 below a folder; nothing is read yet.

    Args:
        root: The folder of the unpacked data: ``image-tasks``, ``video-tasks/frames`` and ``visdoc-tasks`` as
            TIGER-Lab/MMEB-V2 has them, and ``annotation/<owner>/<name>``, the data sets of the rows, as copies of their
            repositories on the Hub or saved with ``save_to_disk``.
        names: Names of tasks; None takes all 78.
        num_frames: Frames of a video, evenly sampled from the stored ones (64 at most); None shows all. Clips show
            at most 8, and MomentSeeker all that are stored, as published.
        task_prompts: Whose words go with the tasks: "vlm2vec", or "qwen3_vl_embedding" as its authors evaluate, with
            each query's instruction in the system turn.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: There is no such task, ``num_frames`` is out of range, or ``task_prompts`` are none of these.

    Example:
        >>> [task.name for task in v2_tasks(".", ["K700", "ViDoSeek-page"])]
        ['K700', 'ViDoSeek-page']
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Give the one that holds video-tasks and {ANNOTATION}.")
    require_number("num_frames", num_frames, least=1, optional=True)
    if task_prompts not in get_args(TaskPrompts):
        raise ValueError(f"`task_prompts={task_prompts!r}`; choose {' or '.join(map(repr, get_args(TaskPrompts)))}.")
    in_system = task_prompts == "qwen3_vl_embedding"
    makers: dict[str, Callable[[], MMEBTask]] = {
        name: partial(_image_task, folder, name, in_system) for name in META_TASKS
    }
    makers |= {task.name: partial(_video_task, folder, task, num_frames, in_system) for task in VIDEO_TASKS}
    makers |= {task.name: partial(_document_task, folder, task, in_system) for task in DOCUMENT_TASKS}
    wanted = list(makers) if names is None else list(names)
    if unknown := [name for name in wanted if name not in makers]:
        raise ValueError(f"MMEB V2 has no task {', '.join(unknown)}. There are {', '.join(makers)}.")
    return [makers[name]() for name in wanted]


def warn_of_other_prompts(model: Any, task_prompts: TaskPrompts | None) -> None:
    """Tell that an encoder with Qwen3-VL-Embedding's template is given VLM2Vec's prompts."""
    encoder: Any = model[0] if isinstance(model, SentenceTransformer) else None
    template = getattr(getattr(encoder, "processor", None), "chat_template", None)
    if task_prompts == "vlm2vec" and isinstance(template, str) and _ITS_DEFAULT in template and rank() == 0:
        logger.warning(
            "The encoder reads instructions in the system turn, as Qwen3-VL-Embedding does, but MMEB V2's tasks have "
            "VLM2Vec's prompts in the user's. Its authors evaluate with `MMEBEvaluator.v2(..., "
            'task_prompts="qwen3_vl_embedding", num_frames=64)`.'
        )


def _image_task(folder: Path, name: str, in_system: bool) -> MMEBTask:
    images = _first(folder / "image-tasks", ("MMEB", "."))
    read_pairs = partial(instructed_pairs, strips_captions=name in _TEXT_TO_IMAGE) if in_system else None
    return image_task(name, {}, folder / ANNOTATION / IMAGE_ROWS, images, read_pairs)


def _video_task(folder: Path, task: VideoTask, num_frames: int | None, in_system: bool) -> MMEBTask:
    def load(*, on_error: OnError) -> EvalTask:
        records = islice(_records(folder, task), task.most_rows)
        number = None if task.sampling == "stored" else num_frames
        frames = Frames(_first(folder / "video-tasks" / "frames", task.frames), number)
        prompts = Prompts(task.query, task.target, in_system)

        def read(row: Any) -> NamedRow:
            own = task.parser(row, prompts, frames)
            return replace(own, instruction=own.instruction or prompts.instruction)

        pool = None if task.labels is None else {label: {"text": label} for label in _labels(task.labels)}
        return task_of(task.name, records, read, pool=pool, shared=task.pool == "global", on_error=on_error)

    shown = "all" if num_frames is None else str(num_frames)
    told = {"video": shown, "clips": f"{shown}, clips {CLIP_FRAMES}", "stored": "all stored"}[task.sampling]
    return MMEBTask(task.name, load, task.metric, "video", frames=told)


def _records(folder: Path, task: VideoTask) -> Any:
    """The rows of all configurations; with several, each row knows its own."""
    configs: list[str | None] = [*(task.config or "").split()] or [None]
    for config in configs:
        table = read_table(folder / ANNOTATION / task.rows, config, task.split, task.columns.split(), task.name)
        yield from ({**row, "subset": config} for row in table) if len(configs) > 1 else table


def _document_task(folder: Path, task: DocumentTask, in_system: bool) -> MMEBTask:
    prompts = replace(PAGE_PROMPTS, in_system=in_system)

    def load(*, on_error: OnError) -> EvalTask:
        def table(config: str, columns: str) -> Any:
            return read_table(folder / ANNOTATION / task.rows, config, task.split, columns.split(), task.name)

        images = _first(folder / "visdoc-tasks", task.pages)
        ids = table("corpus", "corpus-id")["corpus-id"]
        pages = document_rows.pages_of(ids, images, prompts, task.file_of)
        relevance = document_rows.relevance_of(table("qrels", "query-id corpus-id score"))

        def read(row: Any) -> Any:
            return document_rows.document_row(row, prompts, pages, relevance)

        records = table("queries", "query-id query")
        return task_of(task.name, records, read, pool=pages, shared=True, on_error=on_error)

    return MMEBTask(task.name, load, task.metric, "visdoc")


def _first(folder: Path, names: Sequence[str]) -> Path:
    """The first of the folders that is there, else the first."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def _labels(name: str) -> list[str]:
    text = files("unime_st.data.mmeb").joinpath("video_labels.json").read_text(encoding="utf-8")
    return json.loads(text)[name]
