"""``unime mine``: pairs with hard negatives, for ``unime train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unime_st.cli.options import UsageError, add_data_options, read_pairs, say

HELP = "find hard negatives of pairs with an encoder, for `unime train`; the same command again goes on after a kill"
EXAMPLE = "unime mine photos.csv photos_encoder/encoder --output photos_mined"

_POOL = 50
_KEPT = {False: 8, True: 10}
"""Negatives of a row by whether a judge chooses them, as in the library."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_options(parser)
    parser.add_argument("model", metavar="MODEL", help="a saved encoder: Hub name or folder")
    parser.add_argument("--output", required=True, help="folder of the rows with their negatives")
    parser.add_argument("--num-negatives", type=int, help="of a row (default: 8, of a judge's 10)")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.1,
        help="candidates more similar than the positive by more than this are left out (default: %(default)s)",
    )
    parser.add_argument("--range-min", type=int, default=0, help="nearest candidates skipped (default: %(default)s)")
    parser.add_argument("--range-max", type=int, help="nearest candidates to take from (default: as many as needed)")
    parser.add_argument("--sampling-strategy", choices=["top", "random"], default="top", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random (default: %(default)s)")
    parser.add_argument("--too-few", choices=["repeat", "drop"], default="repeat", help="(default: %(default)s)")
    parser.add_argument("--search", choices=["exact", "faiss"], help="(default: by the size of the set)")
    parser.add_argument("--query-prompt", help="instruction for queries, in place of the model's own")
    parser.add_argument("--corpus-prompt", help="instruction for candidates, likewise")
    parser.add_argument(
        "--judge",
        help=f"a multimodal LLM or saved reranker that chooses among the {_POOL} nearest by UniME-V2's rule, without "
        "--margin",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Mine, let the judge choose where there is one, and say where it is."""
    from unime_st.data import judge_negatives, load_mined_negatives, load_pairs, mine_hard_negatives
    from unime_st.modules import build_reranker, load_encoder, load_reranker
    from unime_st.modules.saved import folder_of, holds_saved_encoder
    from unime_st.published import PUBLISHED_RERANKERS

    judged = given.judge is not None
    number = _KEPT[judged] if given.num_negatives is None else given.num_negatives
    if judged and number > _POOL:
        raise UsageError(f"--num-negatives {number}, but the judge chooses among {_POOL}")
    if Path(given.output).resolve() == Path(given.data).resolve():  # would be read in place of the data from then on
        raise UsageError(f"--output {given.output} is the data themselves. Give another folder.")
    pairs = read_pairs(given)
    model: Any = load_encoder(given.model, device=given.device)
    folder = Path(given.output)
    pool = mine_hard_negatives(
        pairs,
        model,
        folder / "pool" if judged else folder,
        num_negatives=_POOL if judged else number,
        margin=None if judged else given.margin,
        range_min=given.range_min,
        range_max=given.range_max,
        sampling_strategy=given.sampling_strategy,
        seed=given.seed,
        too_few="repeat" if judged else given.too_few,
        search=given.search,
        query_prompt=given.query_prompt,
        corpus_prompt=given.corpus_prompt,
        batch_size=given.batch_size,
        show_progress_bar=not given.quiet,
    )
    if judged:
        del model  # its memory is the judge's now
        try:
            is_reranker = given.judge in PUBLISHED_RERANKERS or holds_saved_encoder(folder_of(given.judge))
            judge = (load_reranker if is_reranker else build_reranker)(given.judge, device=given.device)
        except OSError as error:  # the Hub's do not say of which model they are
            raise OSError(f"The judge {given.judge!r} cannot be loaded: {error}") from error
        judge_negatives(
            load_mined_negatives(pool),
            judge,
            folder,
            num_negatives=number,
            too_few="keep" if given.too_few == "repeat" else "drop",
            batch_size=given.batch_size,
            show_progress_bar=not given.quiet,
        )
    rows = load_pairs(folder)
    say(f"{len(rows)} of {len(pairs)} rows have negatives: unime train {folder} ...")
    say(f"wrote {folder}")
    return 0
