"""``unime index``: a corpus's index for approximate search."""

from __future__ import annotations

import argparse
from typing import Any

from unime_st.cli.options import say

HELP = "build a corpus's index for approximate search, or check the one that is there; it goes on after a kill"
EXAMPLE = "unime index photos_corpus --queries captions_corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("corpus", metavar="CORPUS", help="folder that `unime encode` has made")
    parser.add_argument(
        "--queries",
        metavar="CORPUS",
        help="encoded queries as they will be asked, to tune on and measure recall (default: rows of the corpus)",
    )
    parser.add_argument(
        "--precision",
        choices=["float16", "int8"],
        help="of the rows' copies in the index (default: as it is, float16 for a new one)",
    )
    parser.add_argument("--target-recall", type=float, default=0.97, help="recall@10 to reach (default: %(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="build anew what is there")


def run(given: argparse.Namespace) -> int:
    """Build, and tell what the index finds."""
    import numpy as np

    from unime_st.data import load_corpus
    from unime_st.search import build_index

    corpus = load_corpus(given.corpus)
    queries: Any = None
    if given.queries is not None:
        asked = load_corpus(given.queries)
        if asked.manifest["model"] != corpus.manifest["model"]:
            raise ValueError(
                f"{asked.folder} was encoded with another model than {corpus.folder}, so they do not compare. Encode "
                "the queries with the corpus's own."
            )
        queries = np.asarray(asked)
    index = build_index(
        corpus,
        precision=given.precision,
        queries=queries,
        target_recall=given.target_recall,
        rebuild=given.rebuild,
        show_progress_bar=not given.quiet,
    )
    about, found = index.about, index.about["recall@10"]
    say(f"{index.path}: {len(index)} rows, {about['nprobe']} of {about['cells']} cells looked at for a query")
    say(f"recall@10 {found['recall']:.3f} on {found['queries']} {found['of']}, against exact search")
    return 0
