"""Evaluate an encoder with mteb: a benchmark such as MIEB or MTEB, or a selection of tasks.

    python examples/evaluate_mteb.py encoder --name me/my-encoder --benchmark "MIEB(lite)"
    python examples/evaluate_mteb.py encoder --name me/my-encoder --task-types STS Retrieval --languages eng
    python examples/evaluate_mteb.py encoder --name me/my-encoder --task-types Any2AnyRetrieval --reranker reranker

Results are kept in `--output/mteb` and found again by the next run. The script writes a report, and the results as
metadata for the model's card (`card_metadata.yaml`: copy it to the top of the card, or give `--card README.md`).
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
from huggingface_hub import metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index
from mteb.abstasks import AbsTaskRetrieval
from mteb.cache import ResultCache

from unime_st import load_reranker
from unime_st.evaluation import Report
from unime_st.evaluation.mteb_models import eval_results, mteb_model_meta, mteb_reranker, rerank_with_mteb


def chosen_tasks(given: argparse.Namespace) -> list[Any]:
    if given.benchmark:
        return list(mteb.get_benchmark(given.benchmark))
    return list(mteb.get_tasks(tasks=given.tasks, task_types=given.task_types, languages=given.languages))


def add_results(report: Report, results: Sequence[Any], tasks: Sequence[Any]) -> None:
    kinds = {task.metadata.name: task.metadata.type for task in tasks}
    by_kind: dict[str, list[float]] = defaultdict(list)
    rows = []
    for result in results:
        score = result.get_score()
        by_kind[kinds[result.task_name]].append(score)
        rows.append([result.task_name, kinds[result.task_name], score])
    report.add_table("By task", ["task", "type", "main score"], rows, percent=True)
    means = {kind: sum(scores) / len(scores) for kind, scores in by_kind.items()}
    table = [[kind, len(by_kind[kind]), mean] for kind, mean in means.items()]
    note = "mteb's borda ranks and leaderboards take other averages too."
    report.add_table("By type: mean over its tasks", ["type", "tasks", "mean"], table, percent=True, note=note)
    report.add_bar_plot("By type", list(means), {"mean": [100 * mean for mean in means.values()]}, "percent")


def add_reranked(report: Report, before: Sequence[Any], after: Sequence[Any], name: str, depth: int) -> None:
    encoder = {result.task_name: result.get_score() for result in before}
    rows = [
        [result.task_name, encoder[result.task_name], score, score - encoder[result.task_name], result.evaluation_time]
        for result in after
        if result.task_name in encoder
        for score in [result.get_score()]
    ]
    columns = ["task", "encoder", "reranked", "change", "seconds"]
    note = f"Main scores, as parts of 1. {name} reranks the first {depth} of each query; mteb drops those behind them."
    report.add_table("Retrieval, reranked", columns, rows, digits=4, note=note)


def main(arguments: Sequence[str] | None = None, tasks: Sequence[Any] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a saved encoder: a folder or a Hub name")
    parser.add_argument("--name", required=True, help="organisation/model: results are filed under it")
    parser.add_argument("--benchmark", help='such as "MIEB(lite)", "MIEB(eng)" or "MTEB(eng, v2)"')
    parser.add_argument("--tasks", nargs="+", help="names of tasks")
    parser.add_argument("--task-types", nargs="+", help="such as STS, Any2AnyRetrieval, ImageClassification")
    parser.add_argument("--languages", nargs="+", help="such as eng")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    parser.add_argument("--card", type=Path, help="model card that gets the results as metadata")
    parser.add_argument("--reranker", help="a saved CrossEncoder that reranks what is found in retrieval tasks")
    parser.add_argument("--rerank-depth", type=int, default=10, help="candidates of a query (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args(arguments)
    if tasks is None and not (given.benchmark or given.tasks or given.task_types):
        parser.error("nothing to evaluate on: give --benchmark, --tasks or --task-types")

    # 1. The model as mteb knows it, and the tasks.
    meta = mteb_model_meta(given.model, given.name)
    tasks = chosen_tasks(given) if tasks is None else tasks

    # 2. Evaluate. What the cache of results has for this name and these weights is not evaluated again.
    predictions = given.output / "predictions" / str(meta.revision) if given.reranker else None
    options: dict[str, Any] = {
        "encode_kwargs": {"batch_size": given.batch_size},
        "cache": ResultCache(given.output / "mteb"),
        "prediction_folder": predictions,
    }
    evaluated = mteb.evaluate(meta, tasks, raise_error=False, **options)

    # 3. Report, and metadata for the card.
    report = Report(f"mteb: {given.name}")
    add_results(report, evaluated.task_results, tasks)
    if given.reranker:
        done = {result.task_name for result in evaluated.task_results}
        found = [task for task in tasks if isinstance(task, AbsTaskRetrieval) and task.metadata.name in done]
        for task in found:  # results of an earlier run, which kept no predictions
            if not task._predictions_path(predictions).is_file():
                mteb.evaluate(meta, task, overwrite_strategy="always", **options)
        reranker = mteb_reranker(load_reranker(given.reranker), f"unime_st/{Path(given.reranker).name}")
        depth = {"depth": given.rerank_depth, "batch_size": given.batch_size}
        reranked = rerank_with_mteb(reranker, found, predictions, **depth)
        add_reranked(report, evaluated.task_results, reranked, Path(given.reranker).name, given.rerank_depth)
    failed = {error.task_name: error.exception for error in evaluated.exceptions or []}
    if failed:
        report.add_table("Failed", ["task", "why"], [[task, str(why)] for task, why in failed.items()])
        print(f"WARNING: {len(failed)} tasks failed; the report says why")
    report.add_settings({key: value for key, value in vars(given).items() if value} | {"revision": meta.revision})
    index = eval_results_to_model_index(given.name, eval_results(evaluated.task_results, tasks))
    metadata_save(given.output / "card_metadata.yaml", {"model-index": index})
    if given.card:
        metadata_save(given.card, {**(metadata_load(given.card) or {}), "model-index": index})
    print(f"wrote {report.write(given.output)}")
    return given.output


if __name__ == "__main__":
    main()
