"""Writes an encoded corpus into a collection of Qdrant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from unime_st.data import EncodedCorpus
from unime_st.data.corpus.stream import progress_bar
from unime_st.search.store_rows import StoreRows, refuse_more, store_rows


def write_qdrant(
    corpus: EncodedCorpus,
    client: Any,
    collection: str,
    *,
    payload: Iterable[Mapping[str, Any]] | None = None,
    batch_size: int = 1024,
    show_progress_bar: bool | None = None,
) -> int:
    """Write a corpus's vectors, ids and payload into a collection, which is made when missing.

    A point's number is its row, its vector has length 1, its payload has ``row``, ``id`` where the corpus has ids, and
    what is given. Points that are there and equal are left, others are written: called again after a kill it goes on,
    after the corpus has grown it adds, and called twice it changes nothing.

    Args:
        corpus: See :func:`~unime_st.data.load_corpus`.
        client: A ``qdrant_client.QdrantClient``, of files (``path="..."``), in memory or of a server.
        collection: Its name.
        payload: A dictionary for each row, in order.
        batch_size: Points sent at once.
        show_progress_bar: Show a bar of rows; None shows it when the log level is INFO or below.

    Returns:
        The number of points written.

    Raises:
        ImportError: Without ``qdrant-client`` (``pip install "unime_st[qdrant]"``).
        TypeError: For a payload that is no dictionary, naming its row.
        ValueError: When the collection has other dimensions or another distance, or holds rows that the corpus has not;
            for payloads that do not match the rows.

    Example:
        >>> import tempfile
        >>> from qdrant_client import QdrantClient
        >>> from unime_st.data import encode_corpus
        >>> class Points:  # stands for a model
        ...     def encode(self, items, **options):
        ...         return np.array([[float(item), 1.0] for item in items])
        >>> rows = [("a", "0"), ("b", "2")]
        >>> corpus = encode_corpus(Points(), rows, tempfile.mkdtemp(), model_name="points", with_ids=True)
        >>> client = QdrantClient(":memory:")
        >>> write_qdrant(corpus, client, "points"), write_qdrant(corpus, client, "points")
        (2, 0)
        >>> client.query_points("points", query=[3.0, 1.0], limit=1).points[0].payload
        {'row': 1, 'id': 'b'}
    """
    models = _models()
    dimension, written = corpus.shape[1], 0
    if not client.collection_exists(collection):
        client.create_collection(
            collection, vectors_config=models.VectorParams(size=dimension, distance=models.Distance.COSINE)
        )
    kind = client.get_collection(collection).config.params.vectors
    if getattr(kind, "size", None) != dimension or kind.distance != models.Distance.COSINE:
        raise ValueError(
            f"The collection {collection!r} is of {kind}, but one unnamed vector of {dimension} dimensions with the "
            "distance Cosine is needed. Give another name."
        )
    beyond = models.Filter(must=[models.FieldCondition(key="row", range=models.Range(gte=len(corpus)))])
    refuse_more(f"The collection {collection!r}", len(corpus), client.count(collection, count_filter=beyond).count)
    with progress_bar(len(corpus), show_progress_bar, "Writing to Qdrant") as bar:
        for batch in store_rows(corpus, payload, batch_size):
            if not _is_there(client, collection, batch):
                points = models.Batch(ids=list(batch.rows), vectors=batch.vectors.tolist(), payloads=batch.payload)
                client.upsert(collection, points=points, wait=True)
                written += len(batch.rows)
            bar.update(len(batch.rows))
    return written


def _models() -> Any:
    try:
        from qdrant_client import models
    except ImportError as error:
        raise ImportError('Writing to Qdrant needs its client: `pip install "unime_st[qdrant]"`.') from error
    return models


def _is_there(client: Any, collection: str, batch: StoreRows) -> bool:
    """Whether all points of a batch are in the collection as they would be written."""
    found = client.retrieve(collection, ids=list(batch.rows), with_payload=True, with_vectors=True)
    if len(found) != len(batch.rows):
        return False
    found = sorted(found, key=lambda point: point.id)
    same = [point.payload for point in found] == batch.payload
    return same and np.allclose([point.vector for point in found], batch.vectors, atol=1e-6)
