"""Embedding the distinct contents of a training set into a store on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.data.mining.contents import Contents
from unime_st.embedding.missing import embed_missing
from unime_st.embedding.store import EmbeddingStore

_IMAGE_SIZE = 2000  # characters that an image counts for when inputs are sorted by size


@dataclass(kw_only=True)
class MiningEncoder:
    """Embeds the distinct contents of a set, each once, into stores below a folder, one for each prompt."""

    model: Any
    identity: str
    contents: Contents
    folder: Path
    batch_size: int
    shard_size: int
    show_progress_bar: bool
    patience: float

    def embed(
        self, keys: np.ndarray, cells: Callable[[np.ndarray], list[Any]], prompt: str | None
    ) -> tuple[EmbeddingStore, np.ndarray]:
        """Give the store, and the number in it of each key; NaN stands for a content that cannot be read."""
        reader = self.contents.reader
        images = [reader.resolution.max_pixels, reader.resolution.image_size] if reader else []
        name = hashlib.blake2b(json.dumps([self.identity, *images, prompt]).encode(), digest_size=8).hexdigest()
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        store = EmbeddingStore(self.folder / name)
        missing = np.flatnonzero(store.find(keys) < 0)
        sizes = np.zeros(len(keys), dtype=np.int64)
        for start in range(0, len(missing), self.shard_size):
            part = missing[start : start + self.shard_size]
            sizes[part] = [_size(cell) for cell in cells(part)]
        embed_missing(
            store,
            keys,
            sizes,
            lambda places: self._encode(cells(places), prompt),
            shard_size=self.shard_size,
            description="Mining",
            show_progress_bar=self.show_progress_bar,
            patience=self.patience,
        )
        return store, store.find(keys)

    def _encode(self, cells: Sequence[Any], prompt: str | None) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            inputs = list(pool.map(self.contents.read_usable, cells))
        good = np.array([item is not None for item in inputs])
        if not good.any():
            return np.full((len(cells), int(self.model.get_embedding_dimension())), np.nan, dtype=np.float32)
        options = {} if prompt is None else {"prompt": prompt}
        found = self.model.encode(
            [item for item in inputs if item is not None],
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            **options,
        )
        embeddings = np.full((len(cells), found.shape[1]), np.nan, dtype=np.float32)
        embeddings[good] = found
        broken = good & ~np.isfinite(embeddings).all(axis=1)
        if broken.any():
            raise ValueError(
                f"The model's embedding of {cells[int(np.flatnonzero(broken)[0])]!r:.200} is not finite, as are "
                f"{int(broken.sum()) - 1} more of {len(cells)}. Load the model in bfloat16 or float32, or remove the "
                "row."
            )
        return embeddings


def _size(cell: Any) -> int:
    """How long an input is, so that inputs of a like length share a batch."""
    if isinstance(cell, str):
        return len(cell)
    text = cell.get("text") if isinstance(cell, dict) else None
    image = not isinstance(cell, dict) or any(value for key, value in cell.items() if key != "text")
    return len(text or "") + _IMAGE_SIZE * image
