"""``unime encode``: a table, a folder of images or PDF files into a corpus of embeddings."""

from __future__ import annotations

import argparse
from typing import Any

from unime_st.cli.options import add_input_options, read_inputs, say

HELP = "encode a table's column, images, or pages of PDFs, into files; the same command again goes on after a kill"
_ROWS, _PAGES = 2048, 64  # a file; a page takes much longer than a row

EXAMPLE = "unime encode photos photos_encoder/encoder --output photos_corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data", metavar="DATA", help="a table, a folder of images, a .pdf file, ...")
    parser.add_argument("model", metavar="MODEL", help="a saved encoder: Hub name or folder")
    parser.add_argument("--output", required=True, help="folder of the corpus")
    add_input_options(parser)
    parser.add_argument("--format", choices=["parquet", "npy"], default="parquet", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--prompt", help="instruction for all inputs, in place of the model's own")
    parser.add_argument(
        "--window-size", type=int, help=f"rows a file, which a kill may cost (default: {_ROWS}; of PDF files {_PAGES})"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Encode, and say what there is."""
    from unime_st.data import PdfPages, encode_corpus
    from unime_st.modules import load_encoder

    inputs = read_inputs(given.data, given)
    model: Any = load_encoder(given.model, device=given.device)
    pages = isinstance(inputs, PdfPages)
    corpus = encode_corpus(
        model,
        inputs,
        given.output,
        output_format=given.format,
        dtype=given.dtype,
        window_size=(_PAGES if pages else _ROWS) if given.window_size is None else given.window_size,
        with_ids=True,
        batch_size=given.batch_size,
        prompt=given.prompt,
        show_progress_bar=not given.quiet,
    )
    if pages and inputs.damaged:
        say(f"{len(inputs.damaged)} damaged files or pages passed over, named above")
    say(f"{given.output}: {'pages' if pages else ' + '.join(inputs.columns)} of {corpus}")
    return 0
