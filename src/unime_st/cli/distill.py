"""``unime distill``: from texts and a text teacher to an encoder, for ``unime train`` to go on from."""

from __future__ import annotations

import argparse
from typing import Any

from unime_st.cli.options import Settings, add_settings, columns_of, say, tokens

HELP = "distil a text teacher into a backbone (UniME's stage 1, LoRA); the same command again goes on after a kill"
EXAMPLE = (
    "unime distill sentences.txt --teacher Qwen/Qwen3-Embedding-0.6B --backbone Qwen/Qwen2-VL-2B-Instruct "
    "--output distilled"
)

SETTINGS: Settings = {
    "--batch-size": ("per_device_train_batch_size", int, 32, "rows a step and process: take hundreds where you can"),
    "--epochs": ("num_train_epochs", float, 1.0, "times that each row is drawn"),
    "--max-steps": ("max_steps", int, -1, "in place of epochs"),
    "--learning-rate": ("learning_rate", float, 5e-4, "of AdamW"),
    "--rank": ("rank", int, 32, "of LoRA"),
    "--temperature": ("temperature", float, 0.05, "of the loss"),
    "--mini-batch-num-tokens": ("mini_batch_num_tokens", tokens, 8192, "embedded at a time; auto: as memory has room"),
    "--max-pixels": ("max_pixels", int, None, "of an image, for stage 2; for backbones that keep its resolution"),
    "--max-seq-length": ("max_seq_length", int, None, "tokens of an input at the most"),
    "--save-steps": ("save_steps", int, None, "between checkpoints; None for 100, or a quarter of a short run"),
    "--seed": ("seed", int, 42, "of the adapters and the order"),
}
"""Option -> setting of :class:`~unime_st.training.TextDistillation`, its type, its default, what it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "data", metavar="DATA", help="texts: a .txt, .csv, .tsv, .jsonl or .parquet file, a folder of these, a Hub name"
    )
    parser.add_argument("--teacher", required=True, help="a sentence-transformers model of texts: Hub name or folder")
    parser.add_argument("--backbone", required=True, help="a multimodal LLM or a saved encoder: Hub name or folder")
    parser.add_argument("--output", required=True, help="folder of the teacher's embeddings, checkpoints and encoder")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    group = parser.add_argument_group("how the texts are read and embedded")
    group.add_argument("--columns", help="of texts, several parted by commas (default: those of a usual name)")
    group.add_argument("--name", help="config of a data set on the Hub")
    group.add_argument("--split", default="train", help="(default: %(default)s)")
    group.add_argument("--max-rows", type=int, help="the first rows, at most")
    group.add_argument("--teacher-prompt", help="before each text, in place of the teacher's default")
    group.add_argument("--teacher-batch-size", type=int, default=32, help="(default: %(default)s)")
    add_settings(parser, SETTINGS)


def run(given: argparse.Namespace) -> int:
    """Train, and say how close the student came."""
    from unime_st.data import load_nli
    from unime_st.training import TextDistillation, distill_texts

    named: Any = columns_of(given.columns)
    texts = load_nli(
        given.data,
        given.name,
        split=given.split,
        columns=[named] if isinstance(named, str) else named,
        max_rows=given.max_rows,
    )
    done = distill_texts(
        texts,
        given.teacher,
        given.backbone,
        given.output,
        TextDistillation(**{name: getattr(given, name) for name, *_ in SETTINGS.values()}),
        device=given.device,
        prompt=given.teacher_prompt,
        batch_size=given.teacher_batch_size,
        show_progress_bar=not given.quiet,
    )
    for name in ("loss", "nearest_neighbor_agreement"):
        say(f"{name}: {done.first[name]:.4f} at first, {done.last[name]:.4f} at last")
    say(f"wrote {done.encoder}")
    return 0
