"""Parsing, logging and errors of the command ``unime``."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from unime_st.cli import check, distill, encode, evaluate, export, index, info, mine, push, search, serve, train
from unime_st.cli.options import UsageError

COMMANDS = {
    "check": check,
    "distill": distill,
    "train": train,
    "mine": mine,
    "encode": encode,
    "index": index,
    "search": search,
    "serve": serve,
    "evaluate": evaluate,
    "export": export,
    "push": push,
    "info": info,
}
"""Name -> module with ``HELP``, ``EXAMPLE``, ``add_arguments(parser)`` and ``run(given) -> exit code``."""

_TOLD = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError, IndexError)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported for it."""
    whole = argparse.ArgumentParser(prog="unime", description="Train and use embedders of texts and images.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        own = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
        own.add_argument("--quiet", action="store_true", help="say only what is asked for, warnings and errors")
        module.add_arguments(own)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code is 0, 1 for bad data or an error, 2 for a wrong command line.

    >>> main(["info", "no/such/folder"])  # the error goes to stderr
    1
    """
    try:
        given = _parsed(arguments)
    except SystemExit as leaving:  # argparse has printed help, or what is wrong
        return int(leaving.code or 0)
    logging.basicConfig(format="%(message)s")
    package = logging.getLogger("unime_st")
    level = package.level
    package.setLevel(logging.WARNING if given.quiet else logging.INFO)
    try:
        return COMMANDS[given.command].run(given)
    except UsageError as error:
        sys.stderr.write(f"unime {given.command}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on where it was\n")
        return 1
    except _TOLD as error:
        if given.traceback:
            traceback.print_exc()
        else:
            sys.stderr.write(f"unime {given.command}: error: {_named(error, given)}\n")
        return 1
    finally:
        package.setLevel(level)  # this may be called from Python, which has a level of its own


def _named(error: Exception, given: argparse.Namespace) -> str:
    """What an error says; one of the Hub's, which does not say of which model it is, after its name."""
    output = getattr(given, "output", None)
    if isinstance(error, (FileExistsError, NotADirectoryError)) and output is not None and Path(output).is_file():
        return f"--output {output} is a file. Give a folder."
    keys = ("backbone", "model", "teacher", "judge")  # of the last two errors do tell
    names = [name for name in (getattr(given, key, None) for key in keys) if isinstance(name, str)]
    unsaid = isinstance(error, OSError) and error.errno is None and not any(name in str(error) for name in names)
    return f"{names[0]}: {error}" if names and unsaid else str(error)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a text to search by may also stand behind the options, where argparse does not look for it."""
    whole = parser()
    given, rest = whole.parse_known_args(arguments)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(given, "text", "") is None:
        given.text = rest.pop()
    if rest:
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    return given
