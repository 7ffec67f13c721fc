"""Training pairs of document pages: ColPali's training set and VisRAG's, parquet files that hold the pages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from unime_st.arguments import require_number
from unime_st.columns import ANCHOR, POSITIVE, SUBSET
from unime_st.data.bad_images import Place
from unime_st.data.images import ItemReader
from unime_st.data.llava_hound import chosen
from unime_st.data.parquet import Origin, Source
from unime_st.data.stored_images import Stored
from unime_st.images import ENCODED_KEYS, bytes_or_path
from unime_st.prompts import PAGE_INSTRUCTIONS, VISRAG_INSTRUCTIONS

logger = logging.getLogger(__name__)

_IMAGE = "image"
_ROWS_AT_ONCE = 100


def load_colpali_train(
    source: str | Path | Sequence[str | Path],
    *,
    task: Literal["page", "answer"] = "page",
    instructions: tuple[str, str] = PAGE_INSTRUCTIONS,
    max_rows: int | None = None,
    shuffle_seed: int | None = None,
    **reader_options: Any,
) -> Dataset:
    """Load pairs in the layout of ``vidore/colpali_train_set``: parquet files with ``query``, ``image``, ``answer``.

    Other columns are left out. Rows without a query, a page or, for answers, an answer are skipped, and counted in the
    log. ``datasets`` keeps an Arrow copy of the files in its cache, which rows are read from.

    Args:
        source: Folder of the files, or one or some of them.
        task: ``"page"`` asks for the page by the query, as ColPali is trained; ``"answer"`` for the answer by page and
            query, as VLM2Vec-V2 is.
        instructions: What goes before the query, and beside the page, of the task ``"page"``; those that visual
            documents are evaluated with in MMEB-V2.
        max_rows: Rows, at most: the first ones or, with ``shuffle_seed``, some drawn at random.
        shuffle_seed: Draws ``max_rows``.
        **reader_options: ``late_images``, ``max_pixels``, ``image_size``, ``max_aspect_ratio``, ``max_bad_images`` and
            ``bad_images_log`` of :class:`~unime_st.data.ItemReader`.

    Returns:
        Rows ``anchor`` and ``positive``, each ``{"image", "text"}`` or ``{"text"}``.

    Raises:
        FileNotFoundError: There is no such file, or none in the folder.
        ValueError: A file is damaged or lacks a column, or no row is left; on drawing a row, its page cannot be read.
            Names the file, and the row.
    """
    if task not in ("page", "answer"):
        raise ValueError(f"`task={task!r}`, but it must be 'page' or 'answer'.")
    options = {"max_rows": max_rows, "shuffle_seed": shuffle_seed, **reader_options}
    names = ("query", _IMAGE) if task == "page" else ("query", _IMAGE, "answer")
    files, table = _read(source, names)
    if task == "page":
        asked, pages = ([instruction] * len(table) for instruction in instructions)
        sides = _cells(_joined(asked, table["query"])), _cells(pages, table[_IMAGE])
    else:
        sides = _cells(_texts(table["query"]), table[_IMAGE]), _cells(_texts(table["answer"]))
    columns = dict(zip((ANCHOR, POSITIVE), sides, strict=True))
    return _loaded(files, columns, _whole(table, names), **options)


def load_visrag_train(
    source: str | Path | Sequence[str | Path],
    *,
    instructions: Mapping[str, tuple[str, str]] = VISRAG_INSTRUCTIONS,
    max_rows: int | None = None,
    shuffle_seed: int | None = None,
    **reader_options: Any,
) -> Dataset:
    """Load pairs in the layout of ``openbmb/VisRAG-Ret-Train-In-domain-data``: ``query``, ``image`` and ``source``.

    The stored column ``subset`` names the set within that a row comes from, for batches of one set each
    (:class:`~unime_st.samplers.FalseNegativeAwareBatchSampler`); rows that are drawn do not have it. Rows without a
    query or a page are skipped, and counted in the log.

    Args:
        source: Folder of the parquet files, or one or some of them; ``VisRAG-Ret-Train-Synthetic-data`` too.
        instructions: Source -> what goes before its queries, and beside its pages; those of VLM2Vec-V2. A source that
            it does not name has none.
        max_rows: Rows, at most: the first ones or, with ``shuffle_seed``, some drawn at random.
        shuffle_seed: Draws ``max_rows``.
        **reader_options: As of :func:`load_colpali_train`.

    Returns:
        Rows ``anchor``, ``{"text"}``, and ``positive``, ``{"image"}`` with ``"text"`` where there is an instruction.

    Raises:
        FileNotFoundError: There is no such file, or none in the folder.
        ValueError: A file is damaged or lacks a column, or no row is left; on drawing a row, its page cannot be read.
            Names the file, and the row.
    """
    options = {"max_rows": max_rows, "shuffle_seed": shuffle_seed, **reader_options}
    files, table = _read(source, ("query", _IMAGE, "source"))
    names = _texts(table["source"])
    asked, pages = zip(*(instructions.get(name, ("", "")) for name in names), strict=True)
    columns = {
        ANCHOR: _cells(_joined(asked, table["query"])),
        POSITIVE: _cells(pages, table[_IMAGE]),
        SUBSET: pa.array(names, pa.string()),
    }
    return _loaded(files, columns, _whole(table, ("query", _IMAGE)), **options)


def _read(source: str | Path | Sequence[str | Path], names: Sequence[str]) -> tuple[Source, pa.Table]:
    """The files, and their columns, memory-mapped."""
    given = [source] if isinstance(source, str | Path) else list(source)
    files = [
        file for path in map(Path, given) for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])
    ]
    if not files:
        raise FileNotFoundError(f"There is no parquet file below {', '.join(map(str, given)) or 'nothing'}.")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {str(file)!r}. Fetch the data set's parquet files.")
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is damaged or no parquet file ({error}). Download it again.") from error
        _check_columns(file, schema, names)
    files = [file for file in files if pq.read_metadata(file).num_rows]  # `datasets` takes no empty ones
    if not files:
        raise ValueError(f"The parquet files below {', '.join(map(str, given))} have no row. Give others.")
    name = files[0].parent.name if len(files) > 1 else files[0].name
    try:
        rows = Dataset.from_parquet([str(file) for file in files], columns=list(names))
    except DatasetGenerationError as error:
        raise ValueError(
            f"{_damaged(files, names)} is damaged ({error.__cause__ or error}). Download it again."
        ) from error
    return Source(name, tuple(files)), rows.with_format("arrow")[:]


def _check_columns(file: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    """Refuse a file that lacks a column, or has one of another kind, which would be told as a text."""
    if missing := [name for name in names if name not in schema.names]:
        raise ValueError(f"{file} has no column {', '.join(missing)}; it has {', '.join(schema.names)}.")
    for name in names:
        if len(schema.get_all_field_indices(name)) > 1:
            raise ValueError(f"{file} has several columns {name}. Rename all but one.")
        kind = schema.field(name).type
        fits = _is_stored_image(kind) if name == _IMAGE else _is_text(kind)
        if not fits:
            expected = "pages as {bytes, path}" if name == _IMAGE else "texts"
            raise ValueError(f"{file}: column {name} holds {kind}, but {expected} are expected. Give another file.")


def _is_stored_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {field.name for field in kind} == ENCODED_KEYS


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)


def _damaged(files: Sequence[Path], names: Sequence[str]) -> Path:
    """Which of some files cannot be read; reads them again, so for errors only."""
    for file in files:
        try:
            for _ in pq.ParquetFile(file).iter_batches(_ROWS_AT_ONCE, columns=list(names)):
                pass
        except (pa.ArrowException, OSError):
            return file
    return files[0].parent


def _texts(column: pa.ChunkedArray) -> list[str]:
    return [(text or "").strip() for text in column.to_pylist()]


def _joined(instructions: Sequence[str], column: pa.ChunkedArray) -> list[str]:
    told = zip(instructions, _texts(column), strict=True)
    return [f"{instruction} {text}".strip() for instruction, text in told]


def _cells(texts: Sequence[str], images: pa.ChunkedArray | None = None) -> pa.ChunkedArray:
    """Cells ``{"text"}`` or ``{"image", "text"}``; what is empty becomes null, and no image is copied."""
    said = pa.array([text or None for text in texts], pa.string())
    if images is None:
        return pa.chunked_array([pa.StructArray.from_arrays([said], ["text"])])
    starts = np.cumsum([0, *map(len, images.chunks)])
    parts = zip(images.chunks, starts, strict=False)
    return pa.chunked_array(
        [
            pa.StructArray.from_arrays([chunk, said[start : start + len(chunk)]], [_IMAGE, "text"])
            for chunk, start in parts
        ]
    )


def _whole(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Which rows have a page and no empty text, ``(N,)``."""
    found = np.ones(len(table), dtype=bool)
    for name in names:
        if name != _IMAGE:
            found &= np.array([bool(text) for text in _texts(table[name])])
            continue
        fields = [pc.is_valid(pc.struct_field(table[name], field)) for field in ("bytes", "path")]
        found &= pc.or_(*fields).to_numpy()
    return found


def _loaded(
    files: Source,
    columns: dict[str, Any],
    whole: np.ndarray,
    *,
    max_rows: int | None,
    shuffle_seed: int | None,
    **reader_options: Any,
) -> Dataset:
    """The rows that lack nothing, with what opens their pages."""
    require_number("max_rows", max_rows, least=1, optional=True)
    rows = Dataset(pa.table(columns))
    if not whole.any():
        raise ValueError(f"{files.name}: of {len(rows)} rows none has all its texts and a page.")
    if not whole.all():
        logger.warning("%s: skipped %d of %d rows without a text or a page", files.name, (~whole).sum(), len(rows))
        rows = rows.select(np.flatnonzero(whole))
    return chosen(rows, max_rows, shuffle_seed).with_transform(ItemReader(origin=PageOrigin(files), **reader_options))


class PageOrigin:
    """Finds the file and row of a page by looking through the files, so for errors only."""

    def __init__(self, files: Source) -> None:
        self.origin = Origin([files], [_IMAGE])

    def __call__(self, image: Stored) -> Place:
        """Find the first row that has the page, as bytes or as a path."""
        return self.origin(bytes_or_path(image) if isinstance(image, Mapping) else image)
