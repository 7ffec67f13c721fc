"""Embedding what a store lacks: shared by all processes, and going on after a kill where it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm

from unime_st import distributed
from unime_st.arguments import require_count, require_number
from unime_st.embedding.store import EmbeddingStore
from unime_st.embedding.waiting import PATIENCE, Waiting

logger = logging.getLogger(__name__)


def embed_missing(
    store: EmbeddingStore,
    keys: np.ndarray,
    sizes: np.ndarray,
    embed: Callable[[np.ndarray], np.ndarray],
    *,
    shard_size: int,
    description: str,
    show_progress_bar: bool = False,
    patience: float = PATIENCE,
) -> None:
    """Embed the inputs whose keys ``(n,)`` a store lacks; when this returns, it has all of them.

    Each process embeds its share by the keys, whatever the others have done by then, and waits for their files: a
    collective's time limit would be hit by a long wait. ``embed`` makes embeddings ``(m, D)`` of places ``(m,)`` in
    ``keys``; ``shard_size`` of them make one file, which is what a kill can cost. The largest by ``sizes`` ``(n,)`` go
    first, so that batches hold like sizes, and a run that goes on after a kill makes the batches that were left.
    """
    require_count("shard_size", shard_size, least=0)
    if shard_size < 1:
        raise ValueError(f"`shard_size={shard_size}`, but a file holds at least one embedding.")
    require_number("patience", patience, above=0, whole=False)  # now, not when it is needed
    rank, processes = own_share()
    missing = np.flatnonzero(store.find(keys) < 0)
    logger.info(
        "%s: %d of %d distinct inputs are in %s", description, len(keys) - len(missing), len(keys), store.folder
    )

    def work_off(places: np.ndarray) -> None:
        ordered = places[np.argsort(-sizes[places], kind="stable")]
        with tqdm(total=len(ordered), desc=description, unit="input", disable=not show_progress_bar) as bar:
            for start in range(0, len(ordered), shard_size):
                chunk = ordered[start : start + shard_size]
                store.add(keys[chunk], embed(chunk))
                bar.update(len(chunk))

    work_off(missing[_owners(keys[missing], processes) == rank])
    if processes == 1:
        return
    if len(owed := _wait(store, keys, missing, processes, Waiting(description, store.folder, patience))):
        work_off(owed)


def own_share() -> tuple[int, int]:
    """Rank of this process, and number of processes: those of the process group, or else what torchrun has set.

    >>> own_share()
    (0, 1)
    """
    if distributed.is_distributed() or "WORLD_SIZE" not in os.environ:
        return distributed.rank(), distributed.world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])


def _owners(keys: np.ndarray, processes: int) -> np.ndarray:
    """Process that embeds each key, the same wherever it is asked."""
    return keys.view("<u8").reshape(len(keys), 2)[:, 0] % processes


def _wait(store: EmbeddingStore, keys: np.ndarray, missing: np.ndarray, processes: int, waiting: Waiting) -> np.ndarray:
    """Wait for the files of other processes; returns what has not come when patience ends."""
    missing = missing[store.find(keys[missing]) < 0]

    def owed() -> tuple[list[int], str]:
        return np.unique(_owners(keys[missing], processes)).tolist(), f"{len(missing)} inputs"

    while len(missing) and waiting.goes_on(*owed()):
        if store.refresh():
            waiting.news()
            missing = missing[store.find(keys[missing]) < 0]
    if len(missing):
        waiting.give_up(*owed())
    return missing
