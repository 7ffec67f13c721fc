"""Encode texts, a folder of images or PDF files of any number into files; started again after a stop, it goes on.

python examples/encode_corpus.py encoder --texts corpus.jsonl --column text --output corpus_embeddings
python examples/encode_corpus.py encoder --images photos --output photo_embeddings --format npy
python examples/encode_corpus.py encoder --pdfs papers --output page_embeddings
torchrun --nproc-per-node 8 examples/encode_corpus.py encoder --texts corpus.parquet --output corpus_embeddings
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from unime_st import load_encoder
from unime_st.data import EncodedCorpus, PdfPages, encode_corpus
from unime_st.images import IMAGE_FILES

TEXTS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def texts(path: Path, column: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Texts that are not blank, each with its line or row number, from 0; the file is read as it goes."""
    rows = load_dataset(TEXTS[path.suffix.lower()], data_files=str(path), split="train", streaming=True)
    for number, row in enumerate(rows):
        if column not in row:
            raise SystemExit(
                f"Row {number} of {path} has no column {column!r}; it has {', '.join(row)}. Give --column."
            )
        if row[column] and row[column].strip():
            yield number, {"text": row[column]}


def images(folder: Path) -> list[tuple[str, dict[str, str]]]:
    """Paths of all images below a folder, each with its path within the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES)
    return [(path.relative_to(folder).as_posix(), {"image": str(path)}) for path in paths]


def main(arguments: Sequence[str] | None = None) -> EncodedCorpus:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a saved encoder: a folder or a Hub name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--texts", type=Path, help=f"a file of texts ({', '.join(TEXTS)})")
    what.add_argument("--images", type=Path, help="a folder of images")
    what.add_argument("--pdfs", type=Path, help="a PDF file, or a folder of them; each page is a row")
    parser.add_argument("--column", default="text", help="of the texts (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the embeddings")
    parser.add_argument("--format", choices=["parquet", "npy"], default="parquet", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--prompt", help="instruction for all inputs, in place of the model's own")
    parser.add_argument("--window-size", type=int, default=2048, help="rows a file (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args(arguments)
    if given.texts and (given.texts.suffix.lower() not in TEXTS or not given.texts.is_file()):
        parser.error(f"{given.texts} is no file of texts ({', '.join(TEXTS)})")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unime_st").setLevel(logging.INFO)  # what is passed over, where the result is, a progress bar

    # 1. Inputs with their ids. Texts are read as they are needed, images opened when they are encoded.
    inputs: Any
    if given.pdfs:
        try:
            inputs = PdfPages(given.pdfs)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(str(error)) from error
    else:
        inputs = texts(given.texts, given.column) if given.texts else images(given.images)
    if given.images and not inputs:
        parser.error(f"{given.images} holds no image ({', '.join(sorted(IMAGE_FILES))})")

    # 2. Each window becomes a file, and what is there is not encoded again. Under torchrun each process has a device.
    model = load_encoder(given.model)
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
    )

    # 3. The result is read from disk as it is asked for: `load_corpus(output).rows([0, 1])`, or any reader of parquet.
    print(f"wrote {given.output}: {corpus}" if corpus.complete else f"{given.output}: other processes are at work")
    return corpus


if __name__ == "__main__":
    main()
