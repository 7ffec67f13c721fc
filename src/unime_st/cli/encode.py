"""``unime encode``: a table or a folder of images into a corpus of embeddings."""

from __future__ import annotations

import argparse
from typing import Any

from unime_st.cli.options import columns_of, say

HELP = "encode a column of a table, or a folder of images, into files; the same command again goes on after a kill"
EXAMPLE = "unime encode photos photos_encoder/encoder --output photos_corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data", metavar="DATA", help="a table, a folder of images, ...")
    parser.add_argument("model", metavar="MODEL", help="a saved encoder: Hub name or folder")
    parser.add_argument("--output", required=True, help="folder of the corpus")
    parser.add_argument("--columns", help="to encode, several parted by commas (default: the target's)")
    parser.add_argument("--id-column", help="tells each row's id (default: its image's path, else its text)")
    parser.add_argument("--image-root", help="folder of the images (default: the data's own)")
    parser.add_argument("--split", help="of a saved data set with several")
    parser.add_argument("--separator", help="of a .csv's cells (default: the one found)")
    parser.add_argument("--encoding", default="utf-8-sig", help="of a file of text (default: UTF-8)")
    parser.add_argument("--format", choices=["parquet", "npy"], default="parquet", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--prompt", help="instruction for all inputs, in place of the model's own")
    parser.add_argument("--window-size", type=int, default=2048, help="rows a file (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Encode, and say what there is."""
    from unime_st.data import encode_corpus, load_inputs
    from unime_st.modules import load_encoder

    inputs = load_inputs(
        given.data,
        columns=columns_of(given.columns),
        id_column=given.id_column,
        image_root=given.image_root,
        split=given.split,
        separator=given.separator,
        encoding=given.encoding,
    )
    model: Any = load_encoder(given.model, device=given.device)
    corpus = encode_corpus(
        model,
        inputs,
        given.output,
        output_format=given.format,
        dtype=given.dtype,
        window_size=given.window_size,
        with_ids=True,
        batch_size=given.batch_size,
        prompt=given.prompt,
        show_progress_bar=not given.quiet,
    )
    say(f"{given.output}: {' + '.join(inputs.columns)} of {corpus}")
    return 0
