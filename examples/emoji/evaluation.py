"""`make eval-demo`: the miniature on the whole emoji benchmark, by the evaluator and the report a user runs on MMEB."""

from __future__ import annotations

import json
import time
from pathlib import Path

from emoji.benchmark import EmojiBenchmark
from emoji.pipeline import Demo
from emoji.settings import MEANS_NOTHING
from unime_st import load_encoder
from unime_st.evaluation import MMEBEvaluator, Report
from unime_st.evaluation.mmeb.tasks import MMEBTask, image_task
from unime_st.evaluation.report.summary import add_mmeb
from unime_st.files import write_atomically

KINDS = {"trained": "", "heldout": ", held-out vendor"}
"""Folder of the benchmark -> what is added to its tasks' names."""


def emoji_tasks(benchmark: EmojiBenchmark, split: str = "test") -> tuple[list[MMEBTask], dict[str, str]]:
    """All tasks of a split, over drawings of trained and held-out vendors, and their meta-tasks."""
    tasks, metas = [], {}
    for kind, addition in KINDS.items():
        for task, meta in benchmark.meta_tasks.items():
            root, images = benchmark.eval_root(split, kind), benchmark.image_root.absolute()
            tasks.append(image_task(f"{task}{addition}", {"dataset_name": task}, root, images))
            metas[f"{task}{addition}"] = meta
    return tasks, metas


def evaluate_demo(demo: Demo, *, limit: int | None = None) -> Path:
    """Evaluate the demo's last checkpoint, or the one before training if nothing was trained yet; returns the report.

    What a run has encoded, the next finds in the cache; killed, it goes on where it was.
    """
    fetched, benchmark = demo.benchmark()
    trained = demo.output / "unime-emoji-miniature"
    checkpoint = trained if (trained / "modules.json").is_file() else demo.start(fetched, benchmark)
    tasks, metas = emoji_tasks(benchmark)
    model = load_encoder(str(checkpoint), device="cpu")
    evaluator = MMEBEvaluator(
        None,
        tasks,
        meta_tasks=metas,
        limit=limit,
        name="emoji",
        cache_dir=demo.cache / "embeddings",
        show_progress_bar=True,
    )
    folder = demo.output / "evaluation"
    started = time.monotonic()
    metrics = evaluator(model, output_path=str(folder))
    seconds = time.monotonic() - started
    rows = sum(len(result.rows) for result in evaluator.results.values())
    demo.say(f"{rows} rows of {len(tasks)} tasks evaluated in {seconds:.1f} s")
    report = Report(f"Emoji benchmark: {checkpoint.name}")
    if demo.settings.is_short:
        report.add_text(MEANS_NOTHING)
    chances = [task["chance"] for kind in KINDS for task in benchmark.info["eval"]["test"][kind].values()]
    report.add_text(
        "The tasks of the emoji benchmark, in MMEB's layout, on concepts never trained on; chance is "
        f"{100 * sum(chances) / len(chances):.1f} % on average."
    )
    add_mmeb(report, evaluator, metrics, model=checkpoint.name)
    report.add_settings({"checkpoint": checkpoint.name, **evaluator.get_config_dict()})
    write_atomically(folder / "seconds.json", json.dumps({"evaluation": round(seconds, 2), "rows": rows}) + "\n")
    return report.write(folder)
