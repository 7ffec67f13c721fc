"""Writes an encoded corpus into a table of LanceDB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from unime_st.data import EncodedCorpus
from unime_st.data.corpus.stream import progress_bar
from unime_st.search.store_rows import StoreRows, refuse_more, store_rows


def write_lancedb(
    corpus: EncodedCorpus,
    connection: Any,
    table: str,
    *,
    payload: Iterable[Mapping[str, Any]] | None = None,
    batch_size: int = 8192,
    show_progress_bar: bool | None = None,
) -> int:
    """Write a corpus's vectors, ids and payload into a table, which is made when missing.

    Its columns are ``row``, ``id`` where the corpus has ids, ``vector`` (float32, of length 1), and those of the
    payload. Rows that are there and equal are left, others are written: called again after a kill it goes on, after the
    corpus has grown it adds, and called twice it changes nothing.

    Args:
        corpus: See :func:`~unime_st.data.load_corpus`.
        connection: Of ``lancedb.connect("folder")``.
        table: Its name.
        payload: A dictionary for each row, in order, with the same keys and kinds of values in all.
        batch_size: Rows written at once; each batch is a version of the table.
        show_progress_bar: Show a bar of rows; None shows it when the log level is INFO or below.

    Returns:
        The number of rows written.

    Raises:
        TypeError: For a payload that is no dictionary, naming its row.
        ValueError: When the table has other columns or dimensions, or holds rows that the corpus has not; for payloads
            that do not match the rows, or each other.

    Example:
        >>> import tempfile
        >>> import lancedb
        >>> from unime_st.data import encode_corpus
        >>> class Points:  # stands for a model
        ...     def encode(self, items, **options):
        ...         return np.array([[float(item), 1.0] for item in items])
        >>> rows = [("a", "0"), ("b", "2")]
        >>> corpus = encode_corpus(Points(), rows, tempfile.mkdtemp(), model_name="points", with_ids=True)
        >>> connection = lancedb.connect(tempfile.mkdtemp())
        >>> write_lancedb(corpus, connection, "points"), write_lancedb(corpus, connection, "points")
        (2, 0)
        >>> connection.open_table("points").search([3.0, 1.0]).distance_type("cosine").limit(1).to_list()[0]["id"]
        'b'
    """
    opened, written = _opened(connection, table), 0
    if opened is not None and "row" in opened.schema.names:
        refuse_more(f"The table {table!r}", len(corpus), opened.count_rows(f"row >= {len(corpus)}"))
    with progress_bar(len(corpus), show_progress_bar, "Writing to LanceDB") as bar:
        for batch in store_rows(corpus, payload, batch_size):
            rows = _table_of(batch, corpus, None if opened is None else opened.schema, table)
            if opened is None:
                opened = connection.create_table(table, data=rows)
                written += len(rows)
            else:
                written += _put(opened, rows, batch)
            bar.update(len(batch.rows))
    return written


def _opened(connection: Any, name: str) -> Any:
    """The table, or None where there is none."""
    try:
        return connection.open_table(name)
    except (FileNotFoundError, ValueError) as error:
        if "not found" in str(error).lower():
            return None
        raise


def _put(opened: Any, rows: pa.Table, batch: StoreRows) -> int:
    """Write a batch unless it is there; how many rows were written."""
    place = f"row >= {batch.rows.start} AND row < {batch.rows.stop}"
    there = opened.search().where(place).limit(2 * len(rows)).to_arrow().select(rows.column_names).sort_by("row")
    if _equal(there, rows):
        return 0
    if len(there):
        opened.merge_insert("row").when_matched_update_all().when_not_matched_insert_all().execute(rows)
    else:
        opened.add(rows)
    return len(rows)


def _equal(there: pa.Table, rows: pa.Table) -> bool:
    if len(there) != len(rows) or not there.drop_columns("vector").equals(rows.drop_columns("vector")):
        return False
    one, other = (np.asarray(table["vector"].combine_chunks().flatten()) for table in (there, rows))
    return bool(np.array_equal(one, other))


def _table_of(batch: StoreRows, corpus: EncodedCorpus, schema: pa.Schema | None, name: str) -> pa.Table:
    """A batch as it goes into a table of a schema."""
    kept = pa.Table.from_pylist(batch.payload)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(batch.vectors.reshape(-1)), corpus.shape[1])
    rows = kept.append_column("vector", vectors)
    if schema is None:
        return rows
    if sorted(rows.column_names) != sorted(schema.names) or schema.field("vector").type != vectors.type:
        raise ValueError(
            f"The table {name!r} has the columns {', '.join(schema.names)}, but rows from {batch.rows.start} on have "
            f"{', '.join(rows.column_names)}, the vector of {corpus.shape[1]} dimensions. Give another name, or a "
            "payload with the same keys for every row."
        )
    try:
        return rows.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"Rows from {batch.rows.start} on do not fit the columns of the table {name!r}: {error}. "
                         "Give a payload with values of one kind for every row.") from error  # fmt: skip
