"""Commands on what evaluations leave: ``python -m unime_st.evaluation {compare,cache} ...``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from unime_st.embedding.cache import EmbeddingCache
from unime_st.evaluation.report.compare import compare
from unime_st.evaluation.report.report import Report

_DAY = 86400.0
_OUTDATED = ", of an earlier version: not used any more, `cache clear --outdated` deletes it"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m unime_st.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("compare", help="two folders of results: what changed, and is it chance?")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--output", type=Path, default=Path("comparison"), help="folder (default: %(default)s)")
    comparing.add_argument("--resamples", type=int, default=10_000)
    comparing.add_argument("--seed", type=int, default=0)
    comparing.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    comparing.add_argument("--intersection", action="store_true", help="compare the tasks and rows that both have")
    cache = commands.add_parser("cache", help="embeddings kept on disk").add_subparsers(dest="action", required=True)
    shown = cache.add_parser("info", help="what a cache holds")
    clearing = cache.add_parser("clear", help="delete embeddings")
    for command in (shown, clearing):
        command.add_argument("folder", type=Path)
    clearing.add_argument("--model", default="", help="beginning of a model's fingerprint; all by default")
    clearing.add_argument("--unused-for", type=float, default=0.0, help="days; all by default")
    clearing.add_argument("--outdated", action="store_true", help="only what no model finds any more")
    given = parser.parse_args(arguments)
    if given.command == "compare":
        options = {name: getattr(given, name) for name in ("resamples", "seed", "confidence", "intersection")}
        try:
            comparison = compare(given.before, given.after, **options)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        report = Report(f"{given.before.name} → {given.after.name}")
        comparison.add_to(report)
        sys.stdout.write(f"wrote {report.write(given.output)}\n")
    elif not given.folder.is_dir():
        parser.error(f"{given.folder} is no folder")
    elif given.action == "info":
        _show(EmbeddingCache(given.folder))
    else:
        kinds = {"model": given.model, "unused_for": _DAY * given.unused_for, "outdated": given.outdated}
        freed = EmbeddingCache(given.folder).clear(**kinds)
        sys.stdout.write(f"freed {freed / 1e6:.1f} MB in {given.folder}\n")


def _show(cache: EmbeddingCache) -> None:
    sections = cache.info()
    for section in sections:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(section.last_used))
        told = ", ".join(f"{key}={value}" for key, value in section.settings.items())
        prompt = f", prompt {section.prompt!r}" if section.prompt else ""
        sys.stdout.write(
            f"{section.model[:12]}  {section.items:9,} embeddings  {section.num_bytes / 1e6:9.1f} MB  used {used}"
            f"{prompt}{', ' if told else ''}{told}{_OUTDATED if section.outdated else ''}\n"
        )
    sys.stdout.write(f"{len(sections)} sections, {sum(section.num_bytes for section in sections) / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
