"""Calls with a bad argument each, and what came of them: what `fuzz.py` counts."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from tiny import tiny_backbone
from tiny_data import tiny_teacher, tiny_world
from unime_st import build_encoder

NAN, INF = math.nan, math.inf
_NUMBERED = re.compile(r"\b([Ii]tem|[Ii]mage|[Cc]aption) \d+\b")  # of a list of items
_SAID_OTHERWISE = {"inputs": ("row 0",), "dataset": ("columns",), "task": ("data set",)}
_REFUSALS = (ValueError, TypeError, OSError, IndexError, KeyError)


@dataclass(frozen=True)
class Case:
    """A call that should be refused.

    Attributes:
        of: The function or class.
        shown: The bad argument.
        work: The call.
        words: One of them is in a message that names what is wrong.
        harmless: Whether it may be taken: it says what it does, and does that.
    """

    of: str
    shown: str
    work: Callable[[], Any]
    words: tuple[str, ...]
    harmless: bool = False


def judged(case: Case) -> tuple[str, str]:
    """What came of it: kind, and what was said."""
    try:
        case.work()
    except _REFUSALS as error:
        said = f"{type(error).__name__}: {error}"
        named = _NUMBERED.search(said) or any(word.lower() in said.lower() for word in case.words)
        named = bool(named) and not isinstance(error, KeyError)
        return ("refused by name" if named else "refused without a name"), said
    except Exception as error:  # noqa: BLE001 (what it is, is what is asked)
        return "other error", f"{type(error).__name__}: {error}"
    return ("tolerated" if case.harmless else "silent"), "taken"


class Things:
    """Good values of the arguments that are not the bad one, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.backbone = str(tiny_backbone("qwen2_vl", root / "backbone") or root / "backbone")
        self.teacher = str(tiny_teacher(root / "teacher"))
        self.world = tiny_world(root / "world")
        self.file = root / "file.txt"
        self.file.write_text("no model")
        (root / "empty").mkdir()
        self.rows = Dataset.from_dict({"anchor": ["a", "b", "c"], "positive": ["x", "y", "z"]})
        self.image = Image.new("RGB", (30, 20), "red")
        self._model = build_encoder(self.backbone, device="cpu")

    def new(self) -> Path:
        """A folder that no other case has, whichever process asks."""
        return Path(tempfile.mkdtemp(dir=self.root)) / "new"

    def model(self) -> Any:
        return self._model


def each(of: str, call: Callable[..., Any], harmless: tuple[Any, ...] = (), **values: list[Any]) -> Iterator[Case]:
    """A case for each bad value of each argument by name; its message must name the argument or the value."""
    for name, bad in values.items():
        for value in bad:
            parts = value if isinstance(value, list | tuple) else list(value) if isinstance(value, dict) else [value]
            words = [str(part) for part in parts if isinstance(part, str | Path) and part != ""]
            words += [name, name.replace("_", " "), *_SAID_OTHERWISE.get(name, ())]
            may = any(value is one for one in harmless)
            yield Case(of, f"{name}={value!r:.60}", partial(call, **{name: value}), tuple(words), may)


def calls(
    of: str,
    call: Callable[[Any], Any],
    values: Iterable[Any],
    words: tuple[str, ...] | Callable[[Any], tuple[str, ...]],
    shown: str = "{!r:.60}",
    *,
    harmless: bool = False,
) -> Iterator[Case]:
    """A case for each bad value of a function's only argument; its message must have one of the words."""
    for value in values:
        own = words(value) if callable(words) else words
        yield Case(of, shown.format(value), partial(call, value), own, harmless)


def paths(of: str, call: Callable[[Any], Any], things: Things) -> Iterator[Case]:
    """Paths of nothing, of a file in place of a folder, of an empty folder, and what is no path."""
    places = (things.root / "nowhere", things.file, things.root / "empty")
    yield from calls(of, call, places, lambda bad: (str(bad), bad.name), "{!r:.80}")
    yield from calls(of, call, ("",), ("''", "empty", "no folder", "'.'", "path"))
    yield from calls(of, call, (None, 5, 1.5, ["a"]), lambda bad: (type(bad).__name__, "path", "str", repr(bad)))
