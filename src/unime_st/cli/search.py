"""``unime search``: the nearest rows of a corpus, compared with all of them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from unime_st.cli.options import UsageError, say

HELP = "search a corpus by a text, an image or both; every row is compared"
EXAMPLE = 'unime search photos_corpus "a red bus" --model photos_encoder/encoder --top-k 5'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("corpus", metavar="CORPUS", help="folder that `unime encode` has made")
    parser.add_argument("text", nargs="?", help="to search by")
    parser.add_argument("--image", help="path of an image to search by")
    parser.add_argument("--model", required=True, help="the encoder that the corpus was encoded with")
    parser.add_argument("--prompt", help="instruction for the query, in place of the model's own")
    parser.add_argument("--top-k", type=int, default=10, help="rows shown (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Search, and print a table."""
    from unime_st.data import load_corpus
    from unime_st.modules import load_encoder

    if not (given.text or "").strip() and not given.image:
        raise UsageError("nothing to search by: give a text, --image, or both")
    if given.top_k < 1:
        raise UsageError(f"--top-k {given.top_k}, but at least one row is to be shown")
    corpus = load_corpus(given.corpus)
    model = load_encoder(given.model, device=given.device)
    check_same_model(corpus, model)
    query: Any = {name: said for name, said in (("image", given.image), ("text", given.text)) if said}
    found = nearest(corpus, model.encode([query], prompt=given.prompt)[0], given.top_k)
    if given.json:
        say(json.dumps({"query": query, "results": found}, indent=1, ensure_ascii=False))
    else:
        for place, row in enumerate(found, start=1):
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


def nearest(corpus: Any, query: Any, k: int) -> list[dict[str, Any]]:
    """The k rows of highest cosine, exactly, reading one part of the corpus at a time; of equal ones the first."""
    import numpy as np

    query = np.asarray(query, dtype=np.float32)
    scores, start = [], 0
    for part in corpus.parts():
        rows = np.asarray(part, dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
        cosines = rows @ query / np.maximum(lengths, 1e-12)
        best = np.argsort(-cosines, kind="stable")[:k]
        scores += [(-float(cosines[row]), start + int(row)) for row in best]
        start += len(rows)
    chosen = sorted(scores)[:k]
    wanted = {row for _, row in chosen}
    ids: dict[int, Any] = {}
    if corpus.manifest["with_ids"]:
        ids = {row: name for row, name in enumerate(corpus.ids()) if row in wanted}
    return [
        {"row": row, **({"id": ids[row]} if row in ids else {}), "score": round(-score, 6)} for score, row in chosen
    ]
