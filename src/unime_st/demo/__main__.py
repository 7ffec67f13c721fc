"""`python -m unime_st.demo`: run the recipe on the miniature and the emoji benchmark."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m unime_st.demo", description=__doc__)
    parser.add_argument("--cache", default=".demo_cache", help="packages, benchmark, features (default: %(default)s)")
    parser.add_argument("--output", default="demo_output", help="checkpoints and report (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="a few steps of everything; the numbers mean nothing")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is there, by the MMEB evaluator")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    if arguments.evaluate:
        from unime_st.demo.evaluation import main as evaluate

        evaluate(arguments.cache, arguments.output, short=arguments.short)
        return

    from unime_st.demo.pipeline import Demo
    from unime_st.demo.settings import SHORT, DemoSettings

    Demo(
        arguments.cache, arguments.output, SHORT if arguments.short else DemoSettings(), partial(print, flush=True)
    ).run()


if __name__ == "__main__":
    main()
