"""``unime train``: from pairs to an encoder."""

from __future__ import annotations

import argparse

from unime_st.cli.options import Settings, add_data_options, add_settings, read_pairs, say, tokens

HELP = "train an encoder on pairs (UniME's stage 2, LoRA); the same command again goes on after a kill"
EXAMPLE = "unime train photos.csv --backbone Qwen/Qwen2-VL-2B-Instruct --output photos_encoder"


SETTINGS: Settings = {
    "--batch-size": ("per_device_train_batch_size", int, 32, "rows a step and process: take hundreds where you can"),
    "--epochs": ("num_train_epochs", float, 1.0, "times that each row is drawn"),
    "--max-steps": ("max_steps", int, -1, "in place of epochs"),
    "--learning-rate": ("learning_rate", float, 1e-4, "of AdamW"),
    "--rank": ("rank", int, 16, "of LoRA"),
    "--temperature": ("temperature", float, 0.02, "of the loss"),
    "--margin": ("margin", float, 0.1, "of the false negatives' filter"),
    "--num-hard-negatives": ("num_hard_negatives", int, None, "hardest negatives kept; None keeps all"),
    "--mini-batch-num-tokens": (
        "mini_batch_num_tokens",
        tokens,
        8192,
        "embedded at a time; auto: as memory has room",
    ),
    "--held-out": ("held_out", float, 0.1, "share of the rows to evaluate on"),
    "--max-pixels": ("max_pixels", int, None, "of an image, for backbones that keep its resolution"),
    "--max-seq-length": ("max_seq_length", int, None, "tokens of an input at the most"),
    "--save-steps": ("save_steps", int, None, "between checkpoints; None for 100, or a quarter of a short run"),
    "--num-workers": ("dataloader_num_workers", int, 0, "processes that open images"),
    "--seed": ("seed", int, 42, "of the split, the adapters and the order"),
}
"""Option -> setting of :class:`~unime_st.training.PairsTraining`, its type, its default, what it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    parser.add_argument("--backbone", required=True, help="a multimodal LLM or a saved encoder: Hub name or folder")
    parser.add_argument("--output", required=True, help="folder of checkpoints, encoder and report")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    add_settings(parser, SETTINGS)


def run(given: argparse.Namespace) -> int:
    """Train, and say where everything is."""
    from unime_st.training import PairsTraining, train_pairs

    settings = {name: getattr(given, name) for name, *_ in SETTINGS.values()}
    done = train_pairs(read_pairs(given), given.backbone, given.output, PairsTraining(**settings), device=given.device)
    for name, value in done.after.items():
        if "recall@" in name:
            say(f"{name}: {done.before.get(name, float('nan')):.4f} before, {value:.4f} after")
    say(f"wrote {done.report}")
    say(f"wrote {done.encoder}")
    return 0
