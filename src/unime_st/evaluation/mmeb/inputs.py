"""The tasks that an evaluation on MMEB encodes, and the distinct inputs of all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download

from unime_st.data.mmeb.eval_rows import EvalTask
from unime_st.embedding.distinct import name_of
from unime_st.evaluation.mmeb.tasks import MMEBTask, found_tasks, image_task


def as_tasks(
    root: str | Path | None,
    tasks: Sequence[str | MMEBTask] | None,
    image_root: str | Path | None,
    target_instructions: Mapping[str, str] | None = None,
) -> list[MMEBTask]:
    """The tasks of :class:`~unime_st.evaluation.MMEBEvaluator`, which are names below a folder, or ready-made tasks."""
    if wrong := [task for task in tasks or [] if not isinstance(task, str | MMEBTask)]:
        raise TypeError(f"`tasks` holds {wrong[0]!r}; give names or `MMEBTask`s.")
    names = [task for task in tasks or [] if isinstance(task, str)]
    if root is None and (tasks is None or names):
        raise ValueError("`root=None`, but tasks are given by name or not at all. Give the folder that holds them.")
    folder = _folder(root, image_root) if root is not None else Path()
    if root is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Give the one that holds <Task>/test-*.parquet.")
    wanted = list(tasks) if tasks is not None else list(found_tasks(folder))
    if not wanted:
        raise FileNotFoundError(f"No task to evaluate: {root} holds no <Task>/test-*.parquet, or `tasks` is empty.")
    images = None if image_root is None else Path(image_root).absolute()
    told = target_instructions or {}
    return [
        image_task(task, {"target_instruction": told.get(task)}, folder, images) if isinstance(task, str) else task
        for task in wanted
    ]


def _folder(root: str | Path, image_root: str | Path | None) -> Path:
    """The benchmark's folder; a data set on the Hub is downloaded, without its images."""
    folder = Path(root)
    if folder.is_dir() or not isinstance(root, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", root):
        return folder
    if image_root is None:
        raise ValueError(
            f"{root!r} is no folder here, so it is taken for a data set on the Hub. Its images come in an archive: "
            "fetch and unpack that, and give the folder as `image_root`."
        )
    return Path(snapshot_download(root, repo_type="dataset", allow_patterns="*/test-*.parquet"))


def distinct_inputs(
    read: Mapping[str, tuple[EvalTask, np.ndarray]],
) -> tuple[list[Any], list[tuple[str, int]], dict[str, np.ndarray]]:
    """The inputs of the drawn rows, each once over all tasks where that is known without reading files.

    Also the task and row where each occurs first, and the place of each task's items among the inputs (0 if not
    needed).
    """
    items: list[Any] = []
    owner: list[tuple[str, int]] = []
    known: dict[Any, int] = {}
    places: dict[str, np.ndarray] = {}
    for task, (own, rows) in read.items():
        place = places[task] = np.zeros(len(own.items), dtype=np.int64)
        drawn = set(rows.tolist())
        seen = np.zeros(len(own.items), dtype=bool)
        for number, row in enumerate(own.rows.tolist()):
            if row not in drawn:
                continue
            needed = own.own(number) if own.corpus is None else np.concatenate([own.own(number), own.corpus])
            for item in (int(own.queries[number]), *needed[~seen[needed]].tolist()):
                if not seen[item]:
                    seen[item] = True
                    content = own.asked(item)
                    key = name_of(content) or (task, item)
                    if key not in known:
                        known[key] = len(items)
                        items.append(content)
                        owner.append((task, row))
                    place[item] = known[key]
    return items, owner, places
