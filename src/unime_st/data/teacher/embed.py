"""A teacher's embeddings, computed once and kept on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from unime_st.arguments import require_count, require_path
from unime_st.columns import LABEL, LABEL_COLUMNS
from unime_st.data.teacher.identity import teacher_folder
from unime_st.data.teacher.rows import check_embeddings, checked_labels, refuse_one_text
from unime_st.embedding.missing import embed_missing
from unime_st.embedding.prompts import prompt_options
from unime_st.embedding.store import EmbeddingStore, key_array
from unime_st.embedding.waiting import PATIENCE
from unime_st.identity.content import fingerprint
from unime_st.identity.model import named_or_fingerprint

_CHUNK_NUMBERS = 1 << 28


class Teacher(Protocol):
    """What is needed of a teacher: a ``SentenceTransformer`` has it."""

    def encode(self, texts: list[str], /, *, batch_size: int, show_progress_bar: bool) -> Any:
        """Embed texts into an array ``(N, D)``; takes ``prompt`` or ``prompt_name`` too when one is asked for."""


def teacher_embeddings(
    teacher: Teacher,
    texts: Sequence[str],
    cache_dir: str | Path,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    teacher_name: str | None = None,
    batch_size: int = 32,
    shard_size: int = 4096,
    show_progress_bar: bool = False,
    patience: float = PATIENCE,
) -> np.ndarray:
    """Embed texts with a teacher, each distinct text once ever.

    Embeddings are kept below ``cache_dir`` by teacher, prompt and text, ``shard_size`` of them a file. A file appears
    whole or not at all, so a run that was killed goes on where its last file ended.

    Several processes, as torchrun or accelerate start them, share the work: each embeds its part of what is missing,
    and waits for the files of the others. The folder must be one that all of them see, and all must make this call.
    What is read is compared with checksums once, when the cache is opened (about a second per gigabyte and thread).

    Args:
        teacher: A ``SentenceTransformer``, or anything whose ``encode`` takes texts, ``batch_size``,
            ``show_progress_bar`` and, when asked for, ``prompt`` or ``prompt_name``.
        texts: ``N`` texts; repetitions cost nothing.
        cache_dir: Folder of the cache; made when missing.
        prompt: Put before each text by the teacher. None is the teacher's default, ``""`` none at all.
        prompt_name: Name of one of the teacher's own prompts, in place of ``prompt``.
        teacher_name: Identity of the teacher. None derives it from its weights and settings, which a teacher that is
            not a ``torch.nn.Module`` does not have.
        batch_size: Texts embedded at a time.
        shard_size: Texts a file: what a kill can cost each process. Texts are sorted by length before, so large files
            are no faster than small ones.
        show_progress_bar: Show how many of this process's texts are done.
        patience: Seconds without a new file after which this process embeds what another owes; the log tells of it.

    Returns:
        ``(N, D)`` float32, rows in the order of ``texts``.

    Raises:
        OSError: When the disk is full.
        TypeError: When a text is not a string, naming its row, or ``texts`` is one; when ``teacher`` has no ``encode``.
        ValueError: When both prompts are given, or the teacher has none of that name; when the teacher gives a wrong
            number of rows, a number that is not finite or only zeros, naming the row, and nothing of that file is kept;
            when there are no texts, a size is below 1, or the cache holds a damaged file, naming it.

    Example:
        >>> import tempfile
        >>> class Lengths:
        ...     def encode(self, sentences, **kwargs):
        ...         return np.array([[len(text), 1.0] for text in sentences])
        >>> folder = tempfile.mkdtemp()
        >>> teacher_embeddings(Lengths(), ["a", "bbb", "a"], folder, teacher_name="lengths").tolist()
        [[1.0, 1.0], [3.0, 1.0], [1.0, 1.0]]
    """
    store, numbers = _fill_store(
        teacher,
        texts,
        cache_dir,
        prompt=prompt,
        prompt_name=prompt_name,
        teacher_name=teacher_name,
        batch_size=batch_size,
        shard_size=shard_size,
        show_progress_bar=show_progress_bar,
        patience=patience,
    )
    return store.rows(numbers)


def with_teacher_labels(
    dataset: Dataset | Sequence[str],
    teacher: Teacher | np.ndarray,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Dataset:
    """Give a data set of texts a ``label`` column of the teacher's embeddings, as ``DistillKLLoss`` takes it.

    With a teacher, labels are read from the cache when rows are drawn, and nothing the size of the embeddings is held
    in memory. Embeddings that are given become part of the data set.

    Args:
        dataset: Rows of one or more text columns, or plain texts, which become the column ``text``.
        teacher: See :func:`teacher_embeddings`; or embeddings, ``(N, D)`` for one text column, ``(N, n, D)`` for ``n``.
        cache_dir: See :func:`teacher_embeddings`; needed with a teacher.
        **options: Further arguments of :func:`teacher_embeddings`.

    Returns:
        The text columns and ``label``: ``(D,)`` float32 for one text column, ``(n, D)`` for ``n``.

    Raises:
        ValueError: When the data set has a label column already, or embeddings do not fit its rows, are not finite or
            only zeros, naming the row; and whatever :func:`teacher_embeddings` raises.

    Example:
        >>> import tempfile
        >>> class Lengths:
        ...     def encode(self, sentences, **kwargs):
        ...         return np.array([[len(text), 1.0] for text in sentences])
        >>> pairs = Dataset.from_dict({"a": ["x", "yy"], "b": ["zzz", "x"]})
        >>> with_teacher_labels(pairs, Lengths(), tempfile.mkdtemp(), teacher_name="lengths")[1]["label"]
        tensor([[2., 1.],
                [1., 1.]])
    """
    if isinstance(dataset, Dataset):
        plain = dataset.with_format(None)
    else:
        refuse_one_text("dataset", dataset)
        plain = Dataset.from_dict({"text": list(dataset)})
    columns = plain.column_names
    taken = [name for name in columns if name in LABEL_COLUMNS]
    if taken:
        raise ValueError(f"The data set has the column {taken[0]!r}, which would be the label. Remove or rename it.")
    if isinstance(teacher, np.ndarray):
        shape = (len(plain),) if len(columns) == 1 else (len(plain), len(columns))
        if teacher.shape[:-1] != shape:
            raise ValueError(
                f"The embeddings have shape {teacher.shape}, but {len(plain)} rows of {len(columns)} text column(s) "
                f"need ({', '.join(map(str, shape))}, D)."
            )
        return _with_label(plain, checked_labels(teacher)).with_format("torch")
    if cache_dir is None:
        raise ValueError("With a teacher, `cache_dir` is needed: the folder that keeps its embeddings.")
    texts = [text for name in columns for text in plain[name][:]]
    store, numbers = _fill_store(teacher, texts, cache_dir, **options)
    by_row = numbers.reshape(len(columns), len(plain)).T  # (rows, columns)
    return _with_label(plain, by_row[:, 0] if len(columns) == 1 else by_row).with_transform(store)


def _with_label(dataset: Dataset, label: np.ndarray) -> Dataset:
    return concatenate_datasets([dataset, Dataset(pa.table({LABEL: _nested(label)}))], axis=1)


def _nested(array: np.ndarray) -> pa.ChunkedArray:
    """Rows of an array as Arrow lists, without a Python object a number; in chunks that 32-bit offsets can count."""
    rows = max(1, _CHUNK_NUMBERS // max(1, math.prod(array.shape[1:])))
    chunks = []
    for start in range(0, len(array), rows):
        part = np.ascontiguousarray(array[start : start + rows])
        values: Any = pa.array(part.reshape(-1))
        for axis in range(part.ndim - 1, 0, -1):
            length = part.shape[axis]
            offsets = np.arange(0, len(values) + 1, length, dtype=np.int32)
            values = pa.ListArray.from_arrays(offsets, values)
        chunks.append(values)
    return pa.chunked_array(chunks)


def _fill_store(
    teacher: Teacher,
    texts: Sequence[str],
    cache_dir: str | Path,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    teacher_name: str | None = None,
    batch_size: int = 32,
    shard_size: int = 4096,
    show_progress_bar: bool = False,
    patience: float = PATIENCE,
) -> tuple[EmbeddingStore, np.ndarray]:
    """Compute what is missing; return the store and the number in it of each text."""
    if not hasattr(teacher, "encode"):
        raise TypeError(f"The teacher is a {type(teacher).__name__}, which has no `encode`. Give a model or an array.")
    refuse_one_text("texts", texts)
    folder = require_path("cache_dir", cache_dir)
    if not isinstance(texts, Sized):
        raise TypeError(f"`texts` is a {type(texts).__name__}, but a list of texts is needed.")
    require_count("batch_size", batch_size)
    if not len(texts):
        raise ValueError("There are no texts to embed.")
    by_row = key_array(_text_keys(texts))
    first_rows = np.sort(np.unique(by_row, return_index=True)[1])  # of each distinct text
    options = prompt_options(teacher, prompt, prompt_name, what="teacher")
    identity = {"teacher": named_or_fingerprint(teacher, teacher_name, "teacher_name"), "prompt": ""} | options
    asked = {} if prompt is None and prompt_name is None else options  # a teacher knows its default itself
    store = EmbeddingStore(teacher_folder(folder, identity))

    def embed(places: np.ndarray) -> np.ndarray:
        chunk = [texts[row] for row in first_rows[places].tolist()]
        found = teacher.encode(chunk, batch_size=batch_size, show_progress_bar=False, **asked)
        embeddings = np.asarray(found, dtype=np.float32)
        check_embeddings(embeddings, chunk, first_rows[places], store.dimension)
        return embeddings

    embed_missing(
        store,
        by_row[first_rows],
        np.array([len(texts[row]) for row in first_rows.tolist()]),
        embed,
        shard_size=shard_size,
        description="Teacher",
        show_progress_bar=show_progress_bar,
        patience=patience,
    )
    return store, store.find(by_row)


def _text_keys(texts: Sequence[str]) -> Iterator[bytes]:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Row {row} is a {type(text).__name__}, but a text teacher embeds texts only: {text!r:.80}")
        yield bytes.fromhex(fingerprint(text))
