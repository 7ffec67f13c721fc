"""The ids of a corpus by row, and the rows by a prefix of their id."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unime_st.data import EncodedCorpus
from unime_st.files import whole_file

_AT_ONCE = 65536


class RowIds:
    """The ids of a corpus, in the order of its rows.

    Args:
        corpus: The corpus.
        path: A file that :func:`write_ids` has made of it, which is memory-mapped; None reads the corpus's own files,
            at the first use.
    """

    def __init__(self, corpus: EncodedCorpus, path: Path | None = None) -> None:
        self.corpus, self.path = corpus, path
        self._ids: Any = None

    def of_row(self, row: int) -> str | int | None:
        """The id of a row, or None in a corpus without ids."""
        return self._all()[row].as_py() if self.corpus.manifest["with_ids"] else None

    def with_prefix(self, prefix: str) -> np.ndarray:
        """Rows whose id begins so, in rising order, ``(n,)``; all of them for the empty prefix.

        Raises:
            TypeError: When the prefix is no string.
            ValueError: When the corpus has no ids, or they are integers.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"`id_prefix={prefix!r}`, but it must be a string.")
        if not self.corpus.manifest["with_ids"]:
            raise ValueError(
                f"{self.corpus.folder} has no ids, so `id_prefix={prefix!r}` chooses nothing. Encode the corpus with "
                "`with_ids=True`, or leave the prefix out."
            )
        ids = self._all()
        if not pa.types.is_string(ids.type):
            raise ValueError(
                f"The ids of {self.corpus.folder} are integers, so `id_prefix={prefix!r}` chooses nothing. Encode the "
                "corpus with ids that are strings, or leave the prefix out."
            )
        begins = prefix.encode("utf-8", "surrogatepass")  # half a character, which no id holds, finds nothing
        return np.flatnonzero(pc.starts_with(ids, pattern=begins).to_numpy())

    def _all(self) -> pa.ChunkedArray:
        if self._ids is None and self.path is not None:
            self._ids = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all().column("id")
        elif self._ids is None:
            self._ids = pa.chunked_array(list(_chunks(self.corpus)))
        return self._ids


def write_ids(path: Path, corpus: EncodedCorpus) -> None:
    """Write a corpus's ids as an Arrow file of one column, whole or not at all."""
    chunks = _chunks(corpus)
    first = next(chunks)
    with (
        whole_file(path) as partial,
        pa.ipc.new_file(str(partial), pa.schema([("id", first.type)])) as writer,
    ):
        for chunk in (first, *chunks):
            writer.write(pa.record_batch([chunk], names=["id"]))


def _chunks(corpus: EncodedCorpus) -> Iterator[pa.Array]:
    """The ids as arrays of bounded length."""
    ids = islice(corpus.ids(), len(corpus))  # the last part may have grown since the corpus was opened
    kind = None
    while some := list(islice(ids, _AT_ONCE)):
        kind = kind or (pa.string() if isinstance(some[0], str) else pa.int64())
        yield pa.array(some, kind)
