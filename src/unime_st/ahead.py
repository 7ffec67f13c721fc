"""Preparing what comes next in a thread while what is there is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def made_ahead(things: Iterable[Any], make: Callable[[Any], Any], *, ahead: int) -> Iterator[Any]:
    """Yield what ``make`` makes of each thing, in order; its errors are raised at their thing.

    One thread makes up to ``ahead`` of them before they are asked for; 0 makes each when it is.

    >>> list(made_ahead("abc", str.upper, ahead=2))
    ['A', 'B', 'C']
    """
    if not ahead:
        yield from map(make, things)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as pool:
        coming: deque[Any] = deque()
        try:
            for thing in things:
                coming.append(pool.submit(make, thing))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:  # whoever asked has stopped
                future.cancel()
