"""``unime serve``: a page to search a corpus with, and ``/v1/embeddings``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from unime_st.cli.options import add_input_options, read_inputs, say

HELP = "open a search page over a corpus, and /v1/embeddings, on this machine"
EXAMPLE = "unime serve photos_corpus --model photos_encoder/encoder --inputs photos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("corpus", metavar="CORPUS", help="folder that `unime encode` has made")
    parser.add_argument("--model", required=True, help="the encoder that the corpus was encoded with")
    parser.add_argument(
        "--host", default="127.0.0.1", help="others than this machine need a token (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--token", help="every request must bring it; better given as UNIME_TOKEN in the environment")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs encoded at once (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=float, default=20, help="of a request (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    group = parser.add_argument_group("what the rows are shown as, with the options that `unime encode` was given")
    group.add_argument("--inputs", metavar="DATA", help="what was encoded; without it ids alone are shown")
    add_input_options(group)


def run(given: argparse.Namespace) -> int:
    """Serve until stopped."""
    try:
        from unime_st.serve import Limits, create_app
        from unime_st.serve.server import address_of, checked_hosts, listen, serve
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing. Install what serves: pip install 'unime_st[serve]'") from error
    token = given.token or os.environ.get("UNIME_TOKEN") or None
    hosts = checked_hosts(given.host, token)
    limits = Limits(batch_size=given.batch_size, max_bytes=int(given.max_megabytes * 2**20))
    from unime_st.cli.search import check_same_model
    from unime_st.data import load_corpus
    from unime_st.modules import load_encoder
    from unime_st.search import CorpusSearch

    corpus = load_corpus(given.corpus)
    inputs = read_inputs(given.inputs, given) if given.inputs else None
    with listen(given.host, given.port) as listening:  # a port that is taken shows before the model is loaded
        model: Any = load_encoder(given.model, device=given.device)
        check_same_model(corpus, model)
        name = Path(given.model).name if Path(given.model).exists() else given.model
        app = create_app(model, CorpusSearch(corpus), inputs, name=name, token=token, hosts=hosts, limits=limits)
        say(f"{len(corpus)} rows at {address_of(listening)} and {address_of(listening)}/v1/embeddings; Ctrl-C ends it")
        serve(app, listening, limits)
    return 0
