"""Keeps the neighbours that a guide found on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from unime_st.files import checksum, remove_leftovers, write_atomically
from unime_st.samplers.guide.embeddings import GuideEmbeddings
from unime_st.samplers.guide.neighbors import Neighbors, find_neighbors

logger = logging.getLogger(__name__)

_VERSION = 2  # raise it when the results of find_neighbors change
_ARRAYS = ("pairs", "hardest", "twins")
_DAMAGE = (
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    SyntaxError,
    TokenError,
    OverflowError,
    MemoryError,
)


class NeighborStore:
    """A folder of :class:`~unime_st.samplers.guide.neighbors.Neighbors`, each under a digest of all that it depends on.

    The files are ``neighbors-<digest>.<array>.npy`` and, written last, ``neighbors-<digest>.json`` with checksums of
    all; without it the arrays do not count, so a killed process leaves nothing that would be taken for whole. Results
    that are damaged, or older than the checksums, are computed again, and the log says so.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_or_find(self, queries: GuideEmbeddings, targets: GuideEmbeddings, **options: Any) -> Neighbors:
        """Load the result kept for the same embeddings and options, or compute and keep it."""
        digest = _digest(queries, targets, options)
        record = self._path(digest, "json")
        if record.exists() and (kept := self._load(digest)) is not None:
            logger.info("The guide's neighbours are taken from %s.", record)
            return kept
        found = find_neighbors(queries, targets, **options)
        if self.folder.exists():
            remove_leftovers(self.folder)
        record.unlink(missing_ok=True)  # first, for it must not vouch for other arrays
        for name in _ARRAYS:
            write_atomically(self._path(digest, f"{name}.npy"), getattr(found, name))
        settings = {name: value for name, value in options.items() if name != "groups"}
        told = {"recall": found.recall, "rows": queries.rows, **settings}
        told["arrays"] = checksum(*(getattr(found, name) for name in _ARRAYS))
        write_atomically(record, json.dumps({**told, "checksum": checksum(json.dumps(told))}, indent=1))
        return found

    def _load(self, digest: str) -> Neighbors | None:
        """The kept result; None, and a line in the log, when it is damaged."""
        record = self._path(digest, "json")
        try:
            told = json.loads(record.read_bytes())
            own = told.pop("checksum", None)
            arrays = {name: np.load(self._path(digest, f"{name}.npy"), allow_pickle=False) for name in _ARRAYS}
            if own is None and "arrays" not in told:
                why = "it is of an earlier version, without checksums"
            elif own != checksum(json.dumps(told)) or told["arrays"] != checksum(*arrays.values()):
                why = "its checksum, or that of an array beside it, is another"
            else:
                return Neighbors(**arrays, recall=told["recall"])
        except FileNotFoundError as error:
            why = str(error)
        except _DAMAGE as error:
            why = f"it or an array beside it is damaged: {error}"
        logger.warning("%s is not used (%s): the guide's neighbours are found again.", record, why)
        return None

    def _path(self, digest: str, ending: str) -> Path:
        return self.folder / f"neighbors-{digest}.{ending}"


def _digest(queries: GuideEmbeddings, targets: GuideEmbeddings, options: dict[str, Any]) -> str:
    groups = options.get("groups")
    told = {
        **options,
        "version": _VERSION,
        "queries": queries.digest(),
        "targets": targets.digest(),
        "groups": None if groups is None else hashlib.blake2b(groups.tobytes(), digest_size=16).hexdigest(),
    }
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
