"""The 36 tasks of MMEB V1, as data, and tasks that the YAML files of MMEB V2 describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from unime_st.data.mmeb.eval_rows import EvalTask, InstructedReader, read_eval_task
from unime_st.data.parquet import check_split
from unime_st.paths import resolve_below

# Meta-task -> tasks with a training set, tasks without one (VLM2Vec, arXiv 2410.05160, table 1).
_PUBLISHED: dict[str, tuple[str, str]] = {
    "Classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": ("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA VizWiz GQA TextVQA"),
    "Retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "Grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
META_TASKS: dict[str, str] = {
    task: meta for meta, parts in _PUBLISHED.items() for part in parts for task in part.split()
}
"""The meta-task of each task, in the published order."""

IN_DISTRIBUTION = frozenset(task for known, _ in _PUBLISHED.values() for task in known.split())
"""The 20 tasks with a training set in MMEB-train."""

Metric = Literal["hit@1", "ndcg@5"]


class TaskLoader(Protocol):
    """Reads a task."""

    def __call__(self, *, on_error: Literal["raise", "report"]) -> EvalTask:
        """Read the task; with "report", note broken rows in ``EvalTask.broken``."""


@dataclass(frozen=True)
class MMEBTask:
    """One task of a benchmark, of any modality: how it is read and scored."""

    name: str
    load: TaskLoader
    metric: Metric = "hit@1"  # Precision@1, or nDCG@5 with linear gains, as visual documents are scored
    modality: str = "image"  # "image", "video" or "visdoc"; tasks of one modality are averaged
    frames: str = ""  # what is shown of a video, for those who read the number: "8", or "all stored"


Parser = Callable[[str, Mapping[str, Any], Path], MMEBTask]
"""Makes a task from its name, its entry in the YAML file and the root folder."""


def image_task(
    name: str,
    entry: Mapping[str, Any],
    root: Path,
    image_root: str | Path | None = None,
    read_pairs: InstructedReader | None = None,
) -> MMEBTask:
    """Make a task in MMEB-eval's layout, with or without instructions in columns of their own.

    The ``entry`` may have ``dataset_name``, ``dataset_split``, ``target_instruction`` (before the candidates' texts,
    where the rows have none for them) and, below ``root``, ``image_root``, in whose place the argument may be any
    folder. ``read_pairs`` is that of :func:`~unime_st.data.mmeb.eval_rows.read_eval_task`.
    """
    images = image_root
    if images is None and entry.get("image_root") is not None:
        images = resolve_below(root, entry["image_root"], what="data", must_exist=False)
    check_split(entry.get("dataset_split", "test"))
    if "dataset_name" in entry:
        resolve_below(root, entry["dataset_name"], what="data", must_exist=False)

    def load(*, on_error: Literal["raise", "report"]) -> EvalTask:
        return read_eval_task(
            root,
            entry.get("dataset_name", name),
            split=entry.get("dataset_split", "test"),
            image_root=images,
            target_instruction=entry.get("target_instruction"),
            on_error=on_error,
            read_pairs=read_pairs,
        )

    return MMEBTask(name, load)


PARSERS: dict[str, Parser] = dict.fromkeys(
    ("image_cls", "image_qa", "image_i2t", "image_t2i", "image_i2i_vg"), image_task
)
"""The parser for each ``dataset_parser`` of MMEB V2's YAML files; videos and documents need further entries."""


def tasks_from_yaml(path: str | Path, root: str | Path, parsers: Mapping[str, Parser] | None = None) -> list[MMEBTask]:
    """Read a list of tasks as MMEB V2 describes them: ``name: {dataset_parser, dataset_name, image_root, ...}``."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Task lists need PyYAML, which is not installed: `pip install 'unime_st[train]'`.") from error

    known = PARSERS if parsers is None else parsers
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} holds no tasks: each is `name: {{dataset_parser: ..., dataset_name: ...}}`.")
    tasks = []
    for name, entry in entries.items():
        parser = entry.get("dataset_parser")
        if parser not in known:
            raise ValueError(
                f"{path}, task {name!r}: there is no parser {parser!r}; there are {', '.join(sorted(known))}. Leave "
                "the task out, or give a parser of your own in `parsers`."
            )
        if known[parser] is image_task and entry.get("eval_type", "local") != "local":
            raise ValueError(f"{path}, task {name!r}: {parser!r} has candidates for each row, eval_type 'local'.")
        try:
            tasks.append(known[parser](str(name), entry, Path(root)))
        except ValueError as error:
            raise ValueError(f"{path}, task {name!r}: {error}") from error
    return tasks


def found_tasks(root: Path) -> list[str]:
    """The names of the tasks below a folder: published ones in the published order, then others by name."""
    names = {path.parent.name for path in root.glob("*/test-*.parquet")}
    return [task for task in META_TASKS if task in names] + sorted(names.difference(META_TASKS))
