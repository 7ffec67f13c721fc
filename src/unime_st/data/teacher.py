"""A teacher's embeddings, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from unime_st.columns import LABEL, LABEL_COLUMNS
from unime_st.data.embedding_store import EmbeddingStore
from unime_st.files import write_atomically
from unime_st.fingerprint import fingerprint
from unime_st.model_identity import model_fingerprint

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """What is needed of a teacher: a ``SentenceTransformer`` has it."""

    def encode(self, texts: list[str], /, *, batch_size: int, show_progress_bar: bool) -> Any:
        """Embed texts into an array ``(N, D)``; takes ``prompt`` too when one is asked for."""
        ...


def teacher_embeddings(
    teacher: Teacher,
    texts: Sequence[str],
    cache_dir: str | Path,
    *,
    prompt: str | None = None,
    teacher_name: str | None = None,
    batch_size: int = 32,
    shard_size: int = 2048,
    show_progress_bar: bool = False,
) -> np.ndarray:
    """Embed texts with a teacher, each distinct text once ever.

    Embeddings are kept below ``cache_dir`` by teacher, prompt and text, ``shard_size`` of them a file. A file appears
    whole or not at all, so a run that was killed goes on where its last file ended, and several processes may share a
    folder (they may then compute a text twice, never read half of one).

    Args:
        teacher: A ``SentenceTransformer``, or anything whose ``encode`` takes texts, ``batch_size``, ``prompt`` and
            ``show_progress_bar``.
        texts: ``N`` texts; repetitions cost nothing.
        cache_dir: Folder of the cache; made when missing.
        prompt: Put before each text by the teacher.
        teacher_name: Identity of the teacher. None derives it from its weights and settings, which a teacher that is
            not a ``torch.nn.Module`` does not have.
        batch_size: Texts embedded at a time.
        shard_size: Texts a file: what a kill can cost.
        show_progress_bar: Show how many texts are done.

    Returns:
        ``(N, D)`` float32, rows in the order of ``texts``.

    Raises:
        TypeError: When a text is not a string, naming its row.
        ValueError: When the teacher gives a wrong number of rows or a number that is not finite, naming the row;
            nothing of that file is kept. Or when there are no texts, or the cache holds a damaged file.

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
        teacher_name=teacher_name,
        batch_size=batch_size,
        shard_size=shard_size,
        show_progress_bar=show_progress_bar,
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
        ValueError: When the data set has a label column already, or embeddings do not fit its rows; and whatever
            :func:`teacher_embeddings` raises.

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
    plain = dataset.with_format(None) if isinstance(dataset, Dataset) else Dataset.from_dict({"text": list(dataset)})
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
        return _with_label(plain, teacher.astype(np.float32)).with_format("torch")
    if cache_dir is None:
        raise ValueError("With a teacher, `cache_dir` is needed: the folder that keeps its embeddings.")
    texts = [text for name in columns for text in plain[name][:]]
    store, numbers = _fill_store(teacher, texts, cache_dir, **options)
    by_row = numbers.reshape(len(columns), len(plain)).T  # (rows, columns)
    return _with_label(plain, by_row[:, 0] if len(columns) == 1 else by_row).with_transform(store)


def _with_label(dataset: Dataset, label: np.ndarray) -> Dataset:
    feature: Any = Value(str(label.dtype))
    for _ in label.shape[1:]:
        feature = List(feature)
    column = Dataset.from_dict({LABEL: list(label)}, features=Features({LABEL: feature}))
    return concatenate_datasets([dataset, column], axis=1)


def _fill_store(
    teacher: Teacher,
    texts: Sequence[str],
    cache_dir: str | Path,
    *,
    prompt: str | None = None,
    teacher_name: str | None = None,
    batch_size: int = 32,
    shard_size: int = 2048,
    show_progress_bar: bool = False,
) -> tuple[EmbeddingStore, np.ndarray]:
    """Compute what is missing; return the store and the number in it of each text."""
    if not len(texts):
        raise ValueError("There are no texts to embed.")
    if shard_size < 1:
        raise ValueError(f"`shard_size={shard_size}`, but a file holds at least one text.")
    first_row: dict[str, int] = {}
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Row {row} is a {type(text).__name__}, but a text teacher embeds texts only: {text!r:.80}")
        first_row.setdefault(text, row)
    identity = {"teacher": teacher_name or _teacher_identity(teacher), "prompt": prompt or ""}
    store = EmbeddingStore(_folder(Path(cache_dir), identity))
    keys = {text: bytes.fromhex(fingerprint(text)) for text in first_row}
    missing = [text for text, key in keys.items() if key not in store.numbers]
    logger.info("Teacher: %d of %d distinct texts are in %s", len(keys) - len(missing), len(keys), store.folder)
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False} | (
        {"prompt": prompt} if prompt else {}
    )
    with tqdm(total=len(missing), desc="Teacher", unit="text", disable=not show_progress_bar) as bar:
        for start in range(0, len(missing), shard_size):
            chunk = missing[start : start + shard_size]
            embeddings = np.asarray(teacher.encode(chunk, **options), dtype=np.float32)
            _check(embeddings, chunk, first_row, store.dimension)
            store.add([keys[text] for text in chunk], embeddings)
            bar.update(len(chunk))
    return store, np.array([store.numbers[keys[text]] for text in texts])


def _check(embeddings: np.ndarray, texts: Sequence[str], first_row: dict[str, int], dimension: int | None) -> None:
    if (
        embeddings.ndim != 2
        or len(embeddings) != len(texts)
        or embeddings.shape[1] != (dimension or embeddings.shape[1])
    ):
        expected = f"({len(texts)}, {dimension or 'D'})"
        raise ValueError(
            f"The teacher gave embeddings of shape {embeddings.shape} for {len(texts)} texts, expected {expected}. One "
            "row a text is needed; another dimension than the cache's needs another `teacher_name`."
        )
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        text = texts[broken[0]]
        raise ValueError(
            f"The teacher's embedding of row {first_row[text]} ({text!r:.80}) is not finite, as are "
            f"{len(broken) - 1} more of {len(texts)}. Half precision overflows in some teachers: load it in bfloat16 "
            "or float32, or remove the row."
        )


def _folder(cache_dir: Path, identity: dict[str, str]) -> Path:
    """Folder of one teacher and prompt, with a readable note of what it is."""
    folder = cache_dir / hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "identity.json").exists():
        write_atomically(folder / "identity.json", json.dumps(identity, indent=1).encode())
    return folder


def _teacher_identity(teacher: Any) -> str:
    """Hash what decides a teacher's embeddings: its weights, the settings of its modules, and its own prompts."""
    if not isinstance(teacher, torch.nn.Module):
        raise TypeError(f"A {type(teacher).__name__} has no weights to know it by. Give `teacher_name`.")
    names = ("max_seq_length", "prompts", "default_prompt_name")
    settings = [f"{name}={getattr(teacher, name, None)}" for name in names]
    return hashlib.blake2b("".join([model_fingerprint(teacher), *settings]).encode(), digest_size=16).hexdigest()
