"""A request's way to its embeddings: read in threads, encoded in batches, refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import anyio
import numpy as np
from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException

from unime_st.serve.batching import Batcher, Refusal
from unime_st.serve.limits import Limits, Room
from unime_st.serve.requests import EmbeddingsRequest, Reader, SearchRequest, inputs_of, query_of, texts_of

_OPENED_AT_ONCE = 2  # requests whose images are decoded
_LARGEST_REQUESTS = 4  # whose images may be held at once
_BY_INPUT = (ValueError, TypeError, OSError)  # what `encode` raises for an input that it does not take


class Embedded(NamedTuple):
    """An input's embedding.

    Attributes:
        vector: ``(D,)``, float32.
        tokens: Of its texts, by the model's tokenizer; instruction and images are not counted.
    """

    vector: np.ndarray
    tokens: int


class Encoder:
    """Embeds what requests hold, for many of them at a time.

    Args:
        model: Of ``load_encoder``.
        limits: Bounds of requests.
    """

    def __init__(self, model: Any, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self._pixels = Room(_LARGEST_REQUESTS * limits.max_pixels, "images")
        self._readers = anyio.CapacityLimiter(_OPENED_AT_ONCE)
        self._batcher: Batcher | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this is entered, requests are taken."""
        async with Batcher(self._encode, self.limits) as self._batcher:
            yield

    async def asked(self, asked: EmbeddingsRequest) -> list[Embedded]:
        """Embed the inputs of a request for embeddings."""
        return await self._embed(lambda reader: inputs_of(asked, reader))

    async def query(self, asked: SearchRequest) -> np.ndarray:
        """Embed a query, ``(D,)``."""
        return (await self._embed(lambda reader: query_of(asked, reader)))[0].vector

    async def _embed(self, read: Callable[[Reader], tuple[list[Any], str | None]]) -> list[Embedded]:
        assert self._batcher is not None
        with Reader(self.limits, self._pixels) as reader:
            items, instruction = await run_sync(read, reader, limiter=self._readers)
            results = await self._batcher.embed(items, instruction)
        for place, result in enumerate(results):
            if isinstance(result, Refusal):
                if not isinstance(result.error, _BY_INPUT):
                    raise result.error
                raise HTTPException(422, f"The model does not take input {place}: {result.error}")
        return results

    def _encode(self, items: list[Any], prompt: str | None) -> list[Embedded]:
        """What the thread of the model does."""
        vectors = self.model.encode(items, prompt=prompt, batch_size=len(items), show_progress_bar=False)
        texts = [texts_of(item) for item in items]
        ids = self.model.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        counts = [len(own) for own in ids["input_ids"]]
        return [Embedded(vector, count) for vector, count in zip(vectors, counts, strict=True)]
