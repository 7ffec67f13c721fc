"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

Settings = dict[str, tuple[str, Callable[[str], Any], Any, str]]
"""Option -> setting of a run, its type, its default, what it is."""


_PAGES = {"dpi": 144, "max_pixels": 2_000_000}
"""How pages of PDF files are rendered unless told otherwise, as ``PdfPages`` does."""


class UsageError(Exception):
    """Options that do not go together: exit code 2."""


def say(text: str) -> None:
    """Print what was asked for; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{text}\n")


def columns_of(text: str | None) -> str | list[str] | None:
    """Names of columns, parted by commas.

    >>> columns_of("image,question"), columns_of("caption"), columns_of(""), columns_of(None)
    (['image', 'question'], 'caption', [], None)
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[0] if len(names) == 1 else names


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of reading pairs, with the names of :func:`~unime_st.data.load_pairs`."""
    parser.add_argument("data", metavar="DATA", help="a .csv, .tsv, .jsonl or .parquet file, a folder of images, ...")
    group = parser.add_argument_group("how the data are read")
    group.add_argument("--query", help="its column, or several parted by commas, such as image,question")
    group.add_argument("--target", help="its column or columns, likewise")
    group.add_argument("--negatives", help='columns of explicit negatives; "" for none')
    group.add_argument("--label", help='column of the target\'s identity; "" for none')
    group.add_argument("--image-columns", help='which columns hold images; "" for none (default: by name and content)')
    group.add_argument("--bad-images", choices=["keep", "drop"], default="keep", help="(default: %(default)s)")
    group.add_argument("--empty-cells", choices=["keep", "drop"], default="keep", help="(default: %(default)s)")
    add_source_options(group)


def add_source_options(group: Any) -> None:
    """Options of opening a source, which :func:`source_options` reads."""
    group.add_argument("--image-root", help="folder of the images (default: the data's own)")
    group.add_argument("--split", help="of a saved data set with several")
    group.add_argument("--separator", help="of a .csv's cells (default: the one found)")
    group.add_argument("--encoding", default="utf-8-sig", help="of a file of text (default: UTF-8)")


def source_options(given: argparse.Namespace) -> dict[str, Any]:
    """Those options as arguments of ``load_pairs`` and ``load_inputs``."""
    return {name: getattr(given, name) for name in ("image_root", "split", "separator", "encoding")}


def read_pairs(given: argparse.Namespace) -> Any:
    """The pairs that the options above tell of."""
    from unime_st.data import load_pairs

    return load_pairs(
        given.data,
        query=columns_of(given.query),
        target=columns_of(given.target),
        negatives=columns_of(given.negatives),
        label=given.label,
        image_columns=columns_of(given.image_columns),
        bad_images=given.bad_images,
        empty_cells=given.empty_cells,
        **source_options(given),
    )


def tokens(text: str) -> int | str:
    """A number of tokens, or auto."""
    return text if text == "auto" else int(text)


def add_settings(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Options of a run's settings."""
    for option, (setting, kind, default, told) in settings.items():
        shown = "X" if kind is float else "N"
        parser.add_argument(
            option, dest=setting, type=kind, default=default, metavar=shown, help=f"{told} (default: {default})"
        )


def add_input_options(parser: Any) -> None:
    """Options of what is encoded, with the names of :func:`~unime_st.data.load_inputs`; a parser's, or a group's."""
    parser.add_argument("--columns", help="to encode, several parted by commas (default: the target's)")
    parser.add_argument("--id-column", help="tells each row's id (default: its image's path, else its text)")
    add_source_options(parser)
    parser.add_argument("--pdfs", action="store_true", help="take the pages of a folder's PDF files, each as a row")
    parser.add_argument(
        "--dpi", type=int, metavar="N", help=f"dots an inch of a PDF's pages (default: {_PAGES['dpi']})"
    )
    parser.add_argument(
        "--page-pixels", type=int, metavar="N", help=f"most of a PDF's page (default: {_PAGES['max_pixels']})"
    )


def read_inputs(data: str, given: argparse.Namespace) -> Any:
    """The inputs that the options above tell of: pages of a .pdf file, or of a folder's with ``--pdfs``, or rows."""
    from unime_st.data import PdfPages, load_inputs

    if not given.pdfs and not data.lower().endswith(".pdf"):
        if given.dpi or given.page_pixels:
            raise UsageError("--dpi and --page-pixels are of PDF files: give a .pdf file, or --pdfs with a folder")
        return load_inputs(data, columns=columns_of(given.columns), id_column=given.id_column, **source_options(given))
    for name in ("columns", "id_column", "image_root", "split", "separator"):
        if getattr(given, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is of tables and images, not of PDF files")
    asked = {"dpi": given.dpi, "max_pixels": given.page_pixels}
    return PdfPages(data, **_PAGES | {name: value for name, value in asked.items() if value is not None})
