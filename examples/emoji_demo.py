"""The whole recipe on a miniature multimodal LLM of real parts and an emoji benchmark: `make demo`."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default=".demo_cache", help="packages, benchmark, features (default: %(default)s)")
    parser.add_argument("--output", default="demo_output", help="checkpoints and report (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="a few steps of everything; the numbers mean nothing")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is there, by the MMEB evaluator")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    from emoji.evaluation import evaluate_demo
    from emoji.pipeline import Demo
    from emoji.settings import SHORT, DemoSettings

    settings = SHORT if arguments.short else DemoSettings()
    demo = Demo(arguments.cache, arguments.output, settings, partial(print, flush=True))
    if arguments.evaluate:
        demo.say(f"report: {evaluate_demo(demo, limit=4 if arguments.short else None)}")
    else:
        demo.run()


if __name__ == "__main__":
    main()
