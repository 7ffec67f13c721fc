"""One model for many requests at once: inputs that arrive together are encoded together."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from unime_st.serve.limits import Limits, Room

logger = logging.getLogger(__name__)

Encode = Callable[[list[Any], str | None], Sequence[Any]]


class Refusal(NamedTuple):
    """What the model says of an input that it does not take."""

    error: Exception


@dataclass
class _Waiting:
    item: Any
    prompt: str | None
    done: asyncio.Future[Any]


class Batcher:
    """Gathers inputs for a moment, or until there are enough, and has them encoded by a thread of its own.

    While the thread is at work, what arrives waits, first come, first served, so batches grow with the load.

    Args:
        encode: ``(inputs, prompt) -> results``, one for each; called in one thread, never twice at once.
        limits: Batch size, wait, and how many may wait.
    """

    def __init__(self, encode: Encode, limits: Limits) -> None:
        self.encode = encode
        self.batch_size, self.max_wait = limits.batch_size, limits.max_wait
        self.room = Room(limits.max_waiting, "inputs")
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "encode")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to take inputs."""
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop, once the batch at hand is done; who still waits is not answered."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for one in self._waiting:
            one.done.cancel()
        self._thread.shutdown()

    async def embed(self, items: Sequence[Any], prompt: str | None = None) -> list[Any]:
        """Encode a request's inputs, in whatever batches.

        Returns:
            For each its result, or a :class:`Refusal`.

        Raises:
            HTTPException: 503, when too many inputs wait already.
        """
        self.room.take(len(items))
        try:
            loop = asyncio.get_running_loop()
            waiting = [_Waiting(item, prompt, loop.create_future()) for item in items]
            self._waiting.extend(waiting)
            self._arrived.set()
            return list(await asyncio.gather(*(one.done for one in waiting)))
        except asyncio.CancelledError:  # the client has gone, and what it sent is no longer held
            self._waiting = deque(one for one in self._waiting if not one.done.done())
            raise
        finally:
            self.room.give_back(len(items))

    async def _run(self) -> None:
        while True:
            batch = [one for one in await self._gather() if not one.done.done()]  # some clients are gone
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._encode_all, batch)
            for one, result in zip(batch, await work, strict=True):
                if not one.done.done():
                    one.done.set_result(result)

    async def _gather(self) -> list[_Waiting]:
        """Wait for a first input, and for others as long as that is worth while."""
        while not self._waiting:
            await self._next_arrival()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait):
                while len(self._waiting) < self.batch_size:
                    await self._next_arrival()
        return [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]

    async def _next_arrival(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _encode_all(self, batch: list[_Waiting]) -> list[Any]:
        """Encode a batch, one call for each prompt in it."""
        results: list[Any] = [Refusal(RuntimeError("not encoded"))] * len(batch)
        for prompt in dict.fromkeys(one.prompt for one in batch):
            places = [place for place, one in enumerate(batch) if one.prompt == prompt]
            found = self._encode_each([batch[place].item for place in places], prompt)
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return results

    def _encode_each(self, items: list[Any], prompt: str | None) -> list[Any]:
        """Encode inputs together or, where one of them is refused, one by one: the others are not to blame."""
        try:
            return [result for _, result in zip(items, self.encode(items, prompt), strict=True)]
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the answer to who asked)
            if len(items) == 1:
                return [Refusal(error)]
            logger.info("a batch of %d inputs is encoded one by one: %s", len(items), error)
            return [result for item in items for result in self._encode_each([item], prompt)]
