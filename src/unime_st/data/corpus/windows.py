"""Cuts any number of inputs into windows, read ahead and identified by a hash of their content."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from numbers import Integral
from threading import Event
from typing import Any

from unime_st.embedding.broken import ITEM_ERRORS, BrokenInputError, shown
from unime_st.identity.content import Content


@dataclass(frozen=True)
class Window:
    """Consecutive inputs."""

    number: int  # counted over all processes
    start: int  # row number of the first input
    items: list[Any]  # empty in a window of another process
    contents: list[Content]  # what each input says
    size: int  # the number of inputs, in another process's window too

    @property
    def keys(self) -> list[bytes]:
        """Fingerprint of each input, 16 bytes."""
        return [bytes.fromhex(content.fingerprint) for content in self.contents]


def read_windows(inputs: Iterable[Any], size: int, *, prefetch: bool, **options: Any) -> Generator[Window, None, None]:
    """Cut inputs into windows as :func:`windows` does; with ``prefetch`` a thread reads one window ahead."""
    stop = Event()
    cut = windows(inputs, size, stop=stop, **options)
    return _read_ahead(cut, stop) if prefetch else cut


def windows(
    inputs: Iterable[Any],
    size: int,
    *,
    with_ids: bool = False,
    share: tuple[int, int] = (0, 1),
    stop: Event | None = None,
) -> Generator[Window, None, None]:
    """Cut inputs into windows of ``size``, the last one having fewer; ``share`` is (this process, all processes).

    Windows of other processes are counted, and not read where the inputs can be indexed. ``stop`` ends the reading.

    >>> [window.items for window in windows("abcde", 2)]
    [['a', 'b'], ['c', 'd'], ['e']]
    >>> [(window.items, window.size) for window in windows("abcde", 2, share=(1, 2))]
    [([], 2), (['c', 'd'], 2), ([], 1)]
    """
    indexed = inputs if isinstance(inputs, Sequence) else None
    source: Iterator[Any] = iter(inputs if indexed is None else range(len(indexed)))
    for number in count():
        own = number % share[1] == share[0]
        items: list[Any] = []
        contents: list[Content] = []
        taken = 0
        row = number * size
        try:
            for item in islice(source, size):
                if stop is not None and stop.is_set():
                    return
                if own:
                    items.append(item if indexed is None else indexed[item])
                taken += 1
                row += 1
        except Exception as error:
            error.add_note(f"Raised by the inputs at row {row}.")
            raise
        for item in items:
            if stop is not None and stop.is_set():
                return
            row = number * size + len(contents)
            contents.append(_told(_input(item, row) if with_ids else item, row))
        if not taken:
            return
        yield Window(number, number * size, items, contents, taken)
        if taken < size:  # the source has ended, even if it gave more when asked again
            return


def _read_ahead(windows: Iterator[Window], stop: Event) -> Generator[Window, None, None]:
    """Read the next window in a thread, which ends with this generator; an error is raised at its window."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        try:
            coming = pool.submit(next, windows, None)
            while (window := coming.result()) is not None:
                coming = pool.submit(next, windows, None)
                yield window
        finally:
            stop.set()


def _input(pair: Any, row: int) -> Any:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], (str, Integral)):
        raise TypeError(
            f"Row {row} is {shown(pair)}, but with `with_ids=True` each input is a pair (id, input) whose id is "
            "a string or an integer."
        )
    return pair[1]


def _told(item: Any, row: int) -> Content:
    try:
        return Content(item)
    except ITEM_ERRORS as error:
        raise BrokenInputError(row, item, f"{type(error).__name__}: {error}") from error
