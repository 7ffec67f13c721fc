"""Evaluate an encoder with mteb: a benchmark such as MIEB or MTEB, or a selection of tasks.

    python examples/evaluate_mteb.py encoder --name me/my-encoder --benchmark "MIEB(lite)"
    python examples/evaluate_mteb.py encoder --name me/my-encoder --task-types STS Retrieval --languages eng

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
from mteb.cache import ResultCache

from unime_st.evaluation import Report
from unime_st.evaluation.mteb_models import eval_results, mteb_model_meta


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
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args(arguments)
    if tasks is None and not (given.benchmark or given.tasks or given.task_types):
        parser.error("nothing to evaluate on: give --benchmark, --tasks or --task-types")

    # 1. The model as mteb knows it, and the tasks.
    meta = mteb_model_meta(given.model, given.name)
    tasks = chosen_tasks(given) if tasks is None else tasks

    # 2. Evaluate. What the cache of results has for this name and these weights is not evaluated again.
    evaluated = mteb.evaluate(
        meta,
        tasks,
        encode_kwargs={"batch_size": given.batch_size},
        cache=ResultCache(given.output / "mteb"),
        raise_error=False,
    )

    # 3. Report, and metadata for the card.
    report = Report(f"mteb: {given.name}")
    add_results(report, evaluated.task_results, tasks)
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
