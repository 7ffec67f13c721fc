"""Encoding window by window, each distinct input once as long as it is remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from unime_st.embedding.broken import ITEM_ERRORS, BrokenInputError, shown
from unime_st.features import forget_kept_features
from unime_st.identity.content import Content, takes_contents
from unime_st.images import PartOfFile

_ENTRY_BYTES = 256  # of a remembered embedding, besides its numbers: key, bytes objects, place in the dictionary


class Encoder(Protocol):
    """What is needed of a model: a ``SentenceTransformer`` has it."""

    def encode(self, inputs: list[Any], /, **options: Any) -> Any:
        """Embed N inputs into an array ``(N, D)``."""


class RecentEmbeddings:
    """The embeddings used last, by fingerprint, within a bound of memory.

    >>> recent = RecentEmbeddings(600)  # room for two of these
    >>> recent.add([b"a", b"b", b"c"], np.eye(3, dtype=np.float32))
    >>> recent.get(b"a"), recent.get(b"c")
    (None, array([0., 0., 1.], dtype=float32))
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self._dtype = np.dtype(np.float32)

    def get(self, key: bytes) -> np.ndarray | None:
        """Look an embedding up, without using it; see :meth:`add`."""
        row = self._rows.get(key)
        return None if row is None else np.frombuffer(row, dtype=self._dtype)

    def add(self, keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Note that these embeddings ``(n, D)`` were used, in this order; what was used longest ago makes room."""
        self._dtype = embeddings.dtype
        room = self._room(embeddings)
        for key, row in zip(keys, embeddings, strict=True):
            self._rows.pop(key, None)
            self._rows[key] = row.tobytes()
            if len(self._rows) > room:
                self._rows.popitem(last=False)

    def refill(self, used: Iterable[tuple[Sequence[bytes], np.ndarray]]) -> None:
        """Forget all; then be as if the embeddings given, latest first, had been added in the reverse order."""
        self._rows.clear()
        for keys, embeddings in used:
            self._dtype = embeddings.dtype
            room = self._room(embeddings)
            for row in reversed(range(len(keys))):
                if len(self._rows) >= room:
                    return
                if keys[row] not in self._rows:
                    self._rows[keys[row]] = embeddings[row].tobytes()
                    self._rows.move_to_end(keys[row], last=False)

    def _room(self, embeddings: np.ndarray) -> int:
        return self.max_bytes // (embeddings.shape[1] * embeddings.itemsize + _ENTRY_BYTES)


def _opened(item: Any) -> Any:
    """An input as any model takes it: a page of a file as an image."""
    if isinstance(item, Mapping) and isinstance(item.get("image"), PartOfFile):
        return {**item, "image": item["image"].open()}
    return item


class WindowEncoder:
    """Encodes windows, each distinct input once as long as it is remembered."""

    def __init__(self, model: Encoder, options: Mapping[str, Any], recent: RecentEmbeddings, dtype: Any) -> None:
        self.model, self.options, self.recent, self.dtype = model, options, recent, np.dtype(dtype)

    def __call__(self, contents: Sequence[Content], keys: Sequence[bytes], start: int) -> np.ndarray:
        """Encode a window's inputs into ``(n, D)``."""
        known = {key: row for key in keys if (row := self.recent.get(key)) is not None}
        first: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, place)
        if first:
            forget_kept_features(self.model)  # a resumed run has none of earlier windows', and must give the same bytes
            missing = [contents[place] for place in first.values()]
            known.update(zip(first, self._encode(missing, [start + place for place in first.values()]), strict=True))
        embeddings = np.stack([known[key] for key in keys])
        self.recent.add(keys, embeddings)
        return embeddings

    def _encode(self, contents: list[Content], rows: list[int]) -> np.ndarray:
        items: list[Any] = contents if takes_contents(self.model) else [_opened(content.item) for content in contents]
        try:
            found = self.model.encode(items, show_progress_bar=False, **self.options)
        except ITEM_ERRORS:
            self._find_broken(items, rows)
            raise  # no input's fault
        embeddings = np.asarray(found, dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(items):
            raise ValueError(
                f"The model gave an array of shape {embeddings.shape} for {len(items)} inputs; `encode` must give one "
                f"embedding an input, ({len(items)}, D)."
            )
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            embeddings = embeddings.astype(self.dtype, copy=False)
        broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(broken):
            raise ValueError(
                f"The embedding of row {rows[broken[0]]} ({shown(items[broken[0]])}) is not finite in {self.dtype}, as "
                f"are {len(broken) - 1} more of its window. Half precision overflows in some models: load it in "
                "bfloat16 or float32, and keep float32; if that does not help, its weights have diverged."
            )
        return embeddings

    def _find_broken(self, items: list[Any], rows: list[int]) -> None:
        """Raise for the first input that fails by itself; no forward pass where the model can do without."""
        prompt = self.options.get("prompt")
        preprocess = getattr(self.model, "preprocess", None)
        numbered = getattr(self.model, "numbers_rows", False)
        for item, row in zip(items, rows, strict=True):
            try:
                if preprocess is None:
                    self.model.encode([item], show_progress_bar=False, **self.options)
                else:
                    preprocess([item], prompt=prompt, **({"row_numbers": [row]} if numbered else {}))
            except ITEM_ERRORS as error:
                raise BrokenInputError(row, item, f"{type(error).__name__}: {error}") from error
