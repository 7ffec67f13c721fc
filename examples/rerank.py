"""Order candidates by how well they answer a query, each a text or an image.

python examples/rerank.py reranker --query-text "a red bus" photos/*.jpg
python examples/rerank.py reranker --listwise --query-image bus.jpg --query-text "what colour is it?" red blue "a boat"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unime_st import ListwiseReranker, load_reranker


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reranker", help="a saved CrossEncoder")
    parser.add_argument("candidates", nargs="+", help="texts, or paths of images")
    parser.add_argument("--query-text")
    parser.add_argument("--query-image", type=Path)
    parser.add_argument("--listwise", action="store_true", help="ask for the best of all candidates, in one prompt")
    parser.add_argument("--top", type=int, help="show so many; all by default")
    given = parser.parse_args(arguments)
    query = {"text": given.query_text, "image": given.query_image and str(given.query_image)}
    query = {name: value for name, value in query.items() if value}
    if not query:
        parser.error("give --query-text, --query-image or both")
    reranker = load_reranker(given.reranker)
    if given.listwise:
        reranker = ListwiseReranker(reranker, max_candidates=max(2, len(given.candidates)))
    found = reranker.rank(query, list(given.candidates), top_k=given.top)
    for entry in found:
        print(f"{entry['score']:.4f} {given.candidates[entry['corpus_id']]}")
    return found


if __name__ == "__main__":
    main()
