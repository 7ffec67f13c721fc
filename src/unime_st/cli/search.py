"""``unime search``: the nearest rows of a corpus."""

from __future__ import annotations

import argparse
import json
from typing import Any

from unime_st.cli.options import UsageError, say

HELP = "search a corpus by a text, an image or both: exactly below 100,000 rows, else through an index"
EXAMPLE = 'unime search photos_corpus "a red bus" --model photos_encoder/encoder --top-k 5'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("corpus", metavar="CORPUS", help="folder that `unime encode` has made")
    parser.add_argument("text", nargs="?", help="to search by")
    parser.add_argument("--image", help="path of an image to search by")
    parser.add_argument("--model", required=True, help="the encoder that the corpus was encoded with")
    parser.add_argument("--prompt", help="instruction for the query, in place of the model's own")
    parser.add_argument("--top-k", type=int, default=10, help="rows shown (default: %(default)s)")
    parser.add_argument("--id-prefix", help="search only rows whose id begins so; all of these are compared")
    parser.add_argument(
        "--method",
        choices=["auto", "exact", "index"],
        default="auto",
        help="compare all rows, or look into an index, which is built if need be (default: by the number of rows)",
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Search, and print a table."""
    from unime_st.data import load_corpus
    from unime_st.modules import load_encoder
    from unime_st.search import CorpusSearch

    if not (given.text or "").strip() and not given.image:
        raise UsageError("nothing to search by: give a text, --image, or both")
    if given.top_k < 1:
        raise UsageError(f"--top-k {given.top_k}, but at least one row is to be shown")
    corpus = load_corpus(given.corpus)
    model = load_encoder(given.model, device=given.device)
    check_same_model(corpus, model)
    search = CorpusSearch(corpus, method=given.method, show_progress_bar=not given.quiet)
    query: Any = {name: said for name, said in (("image", given.image), ("text", given.text)) if said}
    found = search.hits(
        model.encode([query], prompt=given.prompt)[0],
        given.top_k,
        id_prefix=given.id_prefix,
    )
    if given.json:
        say(json.dumps({"query": query, "results": found}, indent=1, ensure_ascii=False))
    elif not found:
        say(f"no id begins with {given.id_prefix!r}")
    for place, row in enumerate([] if given.json else found, start=1):
        say(f"{place:>3}  {row['score']:.3f}  {row.get('id', row['row'])}")
    return 0


def check_same_model(corpus: Any, model: Any) -> None:
    """Refuse a model whose embeddings do not compare with the corpus.

    Raises:
        ValueError: When the corpus was encoded with another.
    """
    from unime_st.evaluation import model_fingerprint

    if corpus.manifest["model"] != model_fingerprint(model):
        raise ValueError(
            f"{corpus.folder} was encoded with another model, whose embeddings do not compare with this one's. Give "
            "that one, or encode the corpus anew."
        )
