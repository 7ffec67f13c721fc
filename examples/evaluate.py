"""Evaluate an encoder on MMEB, on image-text retrieval and on SugarCrepe, whichever folders are given.

    python examples/evaluate.py encoder --mmeb MMEB-eval --retrieval flickr30k urban1k --output results
    python examples/evaluate.py encoder --sugarcrepe sugar-crepe/data --sugarcrepe-images val2017 --output results

Layouts: MMEB `<Task>/test-*.parquet` with images in `images/`; retrieval, images and a `metadata.jsonl`
(`{"file_name": "a.jpg", "text": ["a caption", ...]}` a line); SugarCrepe, one `<set>.json` a set.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unime_st import load_encoder
from unime_st.evaluation import (
    ImageTextRetrievalEvaluator,
    MMEBEvaluator,
    Report,
    SugarCrepeEvaluator,
    published_results,
)

MMEB_AVERAGES = ("mean", "meta_mean", "in_distribution", "out_of_distribution")


def add_mmeb(report: Report, evaluator: MMEBEvaluator, scores: dict[str, float]) -> None:
    scores = {name.removeprefix("MMEB_").removesuffix("_precision@1"): score for name, score in scores.items()}
    rows = [
        [task, evaluator.meta_tasks.get(task, "–"), len(result.right), scores[task], int(result.tied.sum())]
        for task, result in evaluator.results.items()
    ]
    report.add_table(
        "MMEB: Precision@1 by task", ["task", "meta-task", "rows", "Precision@1", "ties"], rows, percent=True
    )
    averages = [name for name in scores if name in MMEB_AVERAGES or name.startswith("meta_")]
    note = "`mean` is over tasks; `meta_mean`, over meta-tasks, is what the UniME paper prints: they do not compare."
    rows = [[name, scores[name]] for name in averages]
    report.add_table("MMEB: averages", ["average", "Precision@1"], rows, percent=True, note=note)
    if set(evaluator.tasks) == set(evaluator.meta_tasks) and evaluator.limit is None:
        published = [[row["model"], row["average"], row["overall"]] for row in published_results("mmeb")]
        report.add_table("MMEB: published", ["model", "average", "overall"], published, digits=1)
    if evaluator.errors:
        lost = [[task, message] for task, messages in evaluator.errors.items() for message in messages]
        report.add_table("MMEB: counted as wrong or left out", ["task", "why"], lost)
        print(f"WARNING: {len(lost)} rows or tasks of MMEB counted as wrong or left out; the report says why")


def add_retrieval(report: Report, evaluator: ImageTextRetrievalEvaluator, scores: dict[str, float]) -> None:
    columns = ["direction", *(f"R@{k}" for k in evaluator.ks)]
    rows = [
        [direction, *(scores[f"{evaluator.name}_{direction}_recall@{k}"] for k in evaluator.ks)]
        for direction in ("text_to_image", "image_to_text", "mean")
    ]
    report.add_table(f"Retrieval: {evaluator.name}", columns, rows, percent=True)
    queries = range(min(8, len(evaluator.texts)))
    report.add_gallery(f"Retrieval: {evaluator.name}, first captions", evaluator.top(queries=queries))


def add_sugarcrepe(report: Report, evaluator: SugarCrepeEvaluator, scores: dict[str, float]) -> None:
    rows = [[name, scores[f"sugarcrepe_{name}_accuracy"]] for name in (*evaluator.sets, *evaluator.groups)]
    rows.append(["mean of sets", scores["sugarcrepe_mean_of_sets_accuracy"]])
    report.add_table("SugarCrepe: accuracy (chance is 50)", ["set or group", "accuracy"], rows, percent=True)


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a saved encoder: a folder or a Hub name")
    parser.add_argument("--mmeb", type=Path, help="folder in MMEB-eval's layout")
    parser.add_argument("--mmeb-images", type=Path, help="its images; `images` in that folder by default")
    parser.add_argument("--tasks", nargs="+", help="of MMEB; all that are there by default")
    parser.add_argument("--limit", type=int, help="rows of each MMEB task; all by default")
    parser.add_argument("--retrieval", type=Path, nargs="+", default=[], help="folders with a metadata.jsonl")
    parser.add_argument("--sugarcrepe", type=Path, help="folder of <set>.json")
    parser.add_argument("--sugarcrepe-images", type=Path, help="COCO's val2017")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=".embedding_cache", help="embeddings (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args(arguments)
    if not (given.mmeb or given.retrieval or given.sugarcrepe):
        parser.error("nothing to evaluate on: give --mmeb, --retrieval or --sugarcrepe")
    if given.sugarcrepe and not given.sugarcrepe_images:
        parser.error("--sugarcrepe needs --sugarcrepe-images, the folder its file names lead to")

    # 1. The evaluators: ready before the model is loaded, so that a wrong folder is known at once.
    options: dict[str, Any] = {"batch_size": given.batch_size, "cache_dir": given.cache, "show_progress_bar": True}
    evaluators: list[tuple[Any, Any]] = []
    if given.mmeb:
        choice = {"image_root": given.mmeb_images, "limit": given.limit}
        mmeb = MMEBEvaluator(given.mmeb, given.tasks, on_error="report", **choice, **options)
        evaluators.append((mmeb, add_mmeb))
    evaluators += [
        (ImageTextRetrievalEvaluator.from_folder(path, **options), add_retrieval) for path in given.retrieval
    ]
    if given.sugarcrepe:
        pairs = SugarCrepeEvaluator.from_folder(given.sugarcrepe, given.sugarcrepe_images, **options)
        evaluators.append((pairs, add_sugarcrepe))

    # 2. Each writes its JSON and CSV, and a part of the report.
    model = load_encoder(given.model)
    report = Report(f"Evaluation of {given.model}")
    for evaluator, add in evaluators:
        scores = evaluator(model, output_path=str(given.output))
        add(report, evaluator, scores)
        print(f"{evaluator.primary_metric}: {scores[evaluator.primary_metric]:.4f}")
    report.add_settings({key: value for key, value in vars(given).items() if value})
    print(f"wrote {report.write(given.output)}")
    return given.output


if __name__ == "__main__":
    main()
