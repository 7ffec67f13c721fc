"""``unime check``: look through pairs before training on them."""

from __future__ import annotations

import argparse

from unime_st.cli.options import add_data_options, read_pairs, say

HELP = "look through pairs: bad images, empty cells, equal contents, lengths, steps; exit code 1 if they are not fit"
EXAMPLE = "unime check photos.csv --backbone Qwen/Qwen2-VL-2B-Instruct --batch-size 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    parser.add_argument("--backbone", help="whose tokenizer counts the texts' tokens; no weights are loaded")
    parser.add_argument("--batch-size", type=int, default=32, help="rows a step (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--max-seq-length", type=int, help="tokens of an input at the most")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(given: argparse.Namespace) -> int:
    """Check, print, and tell by the exit code."""
    from unime_st.data import check_pairs

    report = check_pairs(
        read_pairs(given),
        given.backbone,
        batch_size=given.batch_size,
        num_train_epochs=given.epochs,
        max_seq_length=given.max_seq_length,
        show_progress_bar=not given.quiet and not given.json,
    )
    say(report.to_json() if given.json else str(report))
    return 1 if report.problems else 0
