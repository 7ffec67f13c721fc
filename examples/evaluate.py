"""Evaluate an encoder on MMEB, on MMEB V2, on image-text retrieval and on SugarCrepe, whichever folders are given.

    python examples/evaluate.py encoder --mmeb MMEB-eval --retrieval flickr30k urban1k --output results
    python examples/evaluate.py encoder --mmeb-v2 MMEB-V2 --num-frames 8 --output results
    python examples/evaluate.py encoder --mmeb-v2 MMEB-V2 --num-frames 64 --mmeb-v2-prompts qwen3_vl_embedding
    python examples/evaluate.py encoder --sugarcrepe sugar-crepe/data --sugarcrepe-images val2017 --output results
    python examples/evaluate.py encoder --mmeb MMEB-eval --reranker reranker --rerank-depth 10 --output results

Layouts: MMEB `<Task>/test-*.parquet` with images in `images/`; MMEB V2, see docs/evaluate.md; retrieval, images and a
`metadata.jsonl` (`{"file_name": "a.jpg", "text": ["a caption", ...]}` a line); SugarCrepe, one `<set>.json` a set.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unime_st import ListwiseReranker, load_encoder, load_reranker
from unime_st.evaluation import ImageTextRetrievalEvaluator, MMEBEvaluator, Report, SugarCrepeEvaluator, compare
from unime_st.evaluation.report.summary import add_mmeb, add_retrieval, add_sugarcrepe


def say(evaluator: Any, scores: dict[str, float]) -> None:
    metric = evaluator.primary_metric
    print(f"{metric}: {scores[metric]:.4f}")
    if evaluator.reranker is not None:
        prefix = evaluator.name and f"{evaluator.name}_"
        after = scores[f"{prefix}reranked_{metric.removeprefix(prefix)}"]
        print(f"reranked: {after:.4f}, in {scores[f'{prefix}rerank_seconds']:.1f} s")


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a saved encoder: a folder or a Hub name")
    parser.add_argument("--mmeb", help="folder in MMEB-eval's layout, or its name on the Hub")
    parser.add_argument("--mmeb-images", type=Path, help="its images; `images` in that folder by default")
    parser.add_argument("--mmeb-v2", type=Path, help="folder of MMEB V2's 78 tasks: images, videos, visual documents")
    parser.add_argument("--num-frames", type=int, default=8, help="frames of a video of MMEB V2 (default: %(default)s)")
    parser.add_argument(
        "--mmeb-v2-prompts", choices=["vlm2vec", "qwen3_vl_embedding"], default="vlm2vec",
        help="whose words go with the tasks of MMEB V2 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", help="of MMEB or MMEB V2; all that are there by default")
    parser.add_argument("--task-list", type=Path, help="YAML file of MMEB V2's image tasks, in place of --tasks")
    parser.add_argument("--image-size", type=int, help="bring every MMEB image to this side by force, as published")
    parser.add_argument("--max-pixels", type=int, help="make larger MMEB images smaller, keeping their shape")
    parser.add_argument("--published", default="VLM2Vec-V2.0-Qwen2VL-2B", help="whose scores by task stand beside ours")
    parser.add_argument("--compare", type=Path, help="output folder of an earlier evaluation of the same rows")
    parser.add_argument("--limit", type=int, help="rows of each MMEB task; all by default")
    parser.add_argument("--retrieval", type=Path, nargs="+", default=[], help="folders with a metadata.jsonl")
    parser.add_argument("--sugarcrepe", type=Path, help="folder of <set>.json")
    parser.add_argument("--sugarcrepe-images", type=Path, help="COCO's val2017")
    parser.add_argument("--reranker", help="a saved CrossEncoder: scores are shown before and after it reranks")
    parser.add_argument("--listwise", action="store_true", help="ask the reranker for the best of a query's candidates")
    parser.add_argument("--rerank-depth", type=int, default=10, help="candidates of a query (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=".embedding_cache", help="embeddings (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args(arguments)
    if not (given.mmeb or given.mmeb_v2 or given.retrieval or given.sugarcrepe):
        parser.error("nothing to evaluate on: give --mmeb, --mmeb-v2, --retrieval or --sugarcrepe")
    if given.mmeb and given.mmeb_v2 and given.tasks:
        parser.error("--tasks is for one of --mmeb and --mmeb-v2")
    if given.listwise and not given.reranker:
        parser.error("--listwise needs --reranker, which it asks")
    if given.sugarcrepe and not given.sugarcrepe_images:
        parser.error("--sugarcrepe needs --sugarcrepe-images, the folder its file names lead to")

    # 1. The evaluators: ready before the encoder is loaded, so that a wrong folder is known at once.
    evaluators = chosen(given)

    # 2. Each writes its JSON and CSV, and a part of the report.
    model = load_encoder(given.model)
    report = Report(f"Evaluation of {given.model}")
    for evaluator, add in evaluators:
        scores = evaluator(model, output_path=str(given.output))
        add(report, evaluator, scores, model=Path(given.model).name)
        if lost := sum(len(messages) for messages in getattr(evaluator, "errors", {}).values()):
            print(f"WARNING: {lost} rows or tasks counted as wrong or left out; the report says why")
        say(evaluator, scores)
    if given.compare:
        compare(given.compare, given.output).add_to(report)
    report.add_settings({key: value for key, value in vars(given).items() if value})
    print(f"wrote {report.write(given.output)}")
    return given.output


def chosen(given: argparse.Namespace) -> list[tuple[Any, Any]]:
    """The evaluators, each with what adds it to a report."""
    options: dict[str, Any] = {"batch_size": given.batch_size, "cache_dir": given.cache, "show_progress_bar": True}
    if given.reranker:
        reranker = load_reranker(given.reranker)
        if given.listwise:
            reranker = ListwiseReranker(reranker, max_candidates=max(2, given.rerank_depth))
        options |= {"reranker": reranker, "rerank_depth": given.rerank_depth}
    evaluators: list[tuple[Any, Any]] = []
    choice = {"limit": given.limit, "image_size": given.image_size, "max_pixels": given.max_pixels, **options}
    show_mmeb = partial(add_mmeb, published=given.published)
    if given.mmeb:
        if given.task_list:
            mmeb = MMEBEvaluator.from_yaml(given.task_list, given.mmeb, on_error="report", **choice)
        else:
            mmeb = MMEBEvaluator(given.mmeb, given.tasks, image_root=given.mmeb_images, on_error="report", **choice)
        evaluators.append((mmeb, show_mmeb))
    if given.mmeb_v2:
        words = {"num_frames": given.num_frames, "task_prompts": given.mmeb_v2_prompts}
        mmeb = MMEBEvaluator.v2(given.mmeb_v2, given.tasks, on_error="report", **words, **choice)
        evaluators.append((mmeb, show_mmeb))
    evaluators += [
        (ImageTextRetrievalEvaluator.from_folder(path, **options), add_retrieval) for path in given.retrieval
    ]
    if given.sugarcrepe:
        pairs = SugarCrepeEvaluator.from_folder(given.sugarcrepe, given.sugarcrepe_images, **options)
        evaluators.append((pairs, add_sugarcrepe))
    return evaluators


if __name__ == "__main__":
    main()
