"""``unime check``: look through pairs before training on them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from unime_st.cli.options import add_data_options, read_pairs, say

HELP = "look through pairs: bad images, equal contents, lengths, memory, time; exit code 1 if they are not fit"
EXAMPLE = "unime check photos.csv --backbone Qwen/Qwen2-VL-2B-Instruct --batch-size 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    parser.add_argument("--backbone", help="whose tokens, memory and arithmetic are told; no weights are loaded")
    parser.add_argument("--batch-size", type=int, default=32, help="rows a step (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--max-seq-length", type=int, help="tokens of an input at the most")
    parser.add_argument("--max-pixels", type=int, help="of an image, for backbones that keep its resolution")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    parser.add_argument("--mini-batch-num-tokens", type=int, default=8192, help="of a pass (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(given: argparse.Namespace) -> int:
    """Check, print, and tell by the exit code."""
    from unime_st.data import check_pairs

    pairs = read_pairs(given)
    model = None if given.backbone is None else _planned(given)
    report = check_pairs(
        pairs,
        model,
        batch_size=given.batch_size,
        num_train_epochs=given.epochs,
        max_seq_length=given.max_seq_length,
        show_progress_bar=not given.quiet and not given.json,
    )
    if model is not None:
        report = replace(report, resources=_resources(model, pairs, report, given))
    say(report.to_json() if given.json else str(report))
    return 1 if report.problems else 0


def _planned(given: argparse.Namespace) -> Any:
    """The encoder to train, on the meta device."""
    from unime_st.training import PairsTraining, without_weights
    from unime_st.training.run import start_model

    settings = PairsTraining(
        per_device_train_batch_size=given.batch_size,
        rank=given.rank,
        mini_batch_num_tokens=given.mini_batch_num_tokens,
        max_pixels=given.max_pixels,
        max_seq_length=given.max_seq_length,
    )
    with without_weights():
        return start_model(given.backbone, settings, "meta")


def _resources(model: Any, pairs: Any, report: Any, given: argparse.Namespace) -> Any:
    """What training asks of a GPU; None where no row can be read."""
    from unime_st.training import plan_training

    bad = set(report.bad_rows)
    fit = [row for row in range(report.rows) if row not in bad]
    if not fit:
        return None
    return plan_training(
        model,
        pairs.select(fit),
        batch_size=given.batch_size,
        steps=int(report.plan["steps"]),
        mini_batch_num_tokens=given.mini_batch_num_tokens,
    )
