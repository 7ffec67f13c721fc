"""``unime evaluate``: an encoder on pairs of one's own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unime_st.cli.options import UsageError, add_data_options, read_pairs, say

HELP = "evaluate an encoder on pairs: recall@k between images and texts, or of other targets by their queries"
EXAMPLE = "unime evaluate photos_encoder/encoder test.csv --output results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="a saved encoder, or with --backbone a multimodal LLM")
    add_data_options(parser)
    parser.add_argument("--backbone", action="store_true", help="MODEL is a multimodal LLM that was not trained yet")
    parser.add_argument("--output", help="folder of the metrics and a report (default: print only)")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.add_argument("--reranker", help="a saved CrossEncoder: metrics are told before and after it reranks")
    parser.add_argument("--listwise", action="store_true", help="ask the reranker for the best of a query's candidates")
    parser.add_argument("--rerank-depth", type=int, default=10, help="candidates of a query (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Evaluate, and print the metrics."""
    from unime_st.data import check_pairs
    from unime_st.modules import ListwiseReranker, build_encoder, load_encoder, load_reranker
    from unime_st.training import evaluation_report, pairs_evaluator

    if given.listwise and not given.reranker:
        raise UsageError("--listwise needs --reranker, which it asks")
    pairs = read_pairs(given)
    check_pairs(pairs).raise_for_problems()
    options: dict[str, Any] = {"name": Path(given.data).stem, "batch_size": given.batch_size}
    if given.reranker:
        reranker = load_reranker(given.reranker, device=given.device)
        lists = {"max_candidates": max(2, given.rerank_depth)}  # of fewer the evaluator tells
        options["reranker"] = ListwiseReranker(reranker, **lists) if given.listwise else reranker
        options["rerank_depth"] = given.rerank_depth
    evaluator = pairs_evaluator(pairs, **options)
    model = (build_encoder if given.backbone else load_encoder)(given.model, device=given.device)
    if given.output:
        Path(given.output).mkdir(parents=True, exist_ok=True)
    found: Any = evaluator(model, output_path=given.output)
    metrics = {name: float(value) for name, value in found.items()}
    if given.json:
        say(json.dumps(metrics, indent=1))
    else:
        for name, value in metrics.items():
            say(f"{name}: {value:.4f}")
    if given.output:
        page = evaluation_report(given.output, evaluator, metrics, model=Path(given.model).name, data=given.data)
        if not given.json:
            say(f"wrote {page}")
    return 0
