"""Encodes any number of inputs as a stream, in constant memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import closing
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from unime_st.arguments import require_number
from unime_st.data.corpus.window_encoder import Encoder, RecentEmbeddings, WindowEncoder
from unime_st.data.corpus.windows import read_windows

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
_NOT_FOR_STREAMS = ("output_value", "precision", "convert_to_numpy", "convert_to_tensor", "inputs")


def encode_stream(
    model: Encoder,
    inputs: Iterable[Any],
    *,
    window_size: int = 2048,
    cache_bytes: int = CACHE_BYTES,
    prefetch: bool = True,
    show_progress_bar: bool | None = None,
    **encode_options: Any,
) -> Iterator[np.ndarray]:
    """Encode any number of inputs in constant memory.

    At most two windows of inputs are in memory: the one being encoded and, with ``prefetch``, the next. An input that
    recurs is encoded once: always within a window, and across windows while it is among the ``cache_bytes`` used last.

    Args:
        model: A ``SentenceTransformer``, or anything whose ``encode`` takes a list, ``show_progress_bar`` and
            the options.
        inputs: Whatever ``encode`` takes, from a list, a column of a ``datasets`` data set or a generator; iterated
            once. Decoded images are large: give paths, or a column cast to ``Image(decode=False)``, or a small window.
        window_size: Inputs given to ``encode`` at a time, which sorts them into batches of similar inputs.
        cache_bytes: Memory for embeddings of earlier windows; 0 for none.
        prefetch: Read the next window in a thread while the model works. The thread ends with the generator.
        show_progress_bar: Show a bar of rows; None shows it when the log level is INFO or below.
        **encode_options: ``prompt``, ``prompt_name``, ``batch_size``, ``truncate_dim``, ``normalize_embeddings`` and
            whatever else ``encode`` takes that does not change the kind of result.

    Yields:
        Embeddings of each window, ``(n, D)`` float32, in the order of the inputs.

    Raises:
        BrokenInputError: A ``ValueError`` for an input that cannot be read or encoded, naming its row in the stream. An
            error that the iterable itself raises passes through, with its row as a note.
        TypeError: For an option that would change the kind of result.
        ValueError: For a window below 1, or embeddings that are not finite, naming the row.

    Example:
        >>> class Lengths:  # stands for a model
        ...     def encode(self, items, **options):
        ...         print("encoding", items)
        ...         return np.array([[len(item)] for item in items])
        >>> for embeddings in encode_stream(Lengths(), iter(["a", "bb", "a", "bb", "ccc"]), window_size=3):
        ...     print(embeddings.tolist())
        encoding ['a', 'bb']
        [[1.0], [2.0], [1.0]]
        encoding ['ccc']
        [[2.0], [3.0]]
    """
    check_arguments(model, window_size, cache_bytes, inputs, encode_options)
    encoder = WindowEncoder(model, encode_options, RecentEmbeddings(cache_bytes), np.float32)
    return _stream(encoder, inputs, window_size, prefetch, show_progress_bar)


def _stream(
    encoder: WindowEncoder, inputs: Iterable[Any], window_size: int, prefetch: bool, shown: bool | None
) -> Iterator[np.ndarray]:
    bar = progress_bar(len(inputs) if isinstance(inputs, Sized) else None, shown)
    with bar, closing(read_windows(inputs, window_size, prefetch=prefetch)) as coming:
        for window in coming:
            yield encoder(window.contents, window.keys, window.start)
            bar.update(window.size)


def check_arguments(model: Any, window_size: int, cache_bytes: int, inputs: Any, options: Mapping[str, Any]) -> None:
    """Refuse arguments that cannot be streamed."""
    if isinstance(model, str) or not hasattr(model, "encode"):
        raise TypeError(f"`model` is a {type(model).__name__}, but a model with `encode` is needed.")
    iterable = hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")
    if not iterable or isinstance(inputs, str | bytes | Mapping):
        raise TypeError(
            f"`inputs` is a {type(inputs).__name__}, but a list or another iterable of inputs is needed. Put a single "
            "input into a list; of a data set give a column."
        )
    require_number("window_size", window_size)
    require_number("cache_bytes", cache_bytes)
    if window_size < 1 or cache_bytes < 0:
        raise ValueError(
            f"`window_size={window_size}` and `cache_bytes={cache_bytes}`, but a window holds at least one input, and "
            "the cache at least nothing."
        )
    if refused := [name for name in _NOT_FOR_STREAMS if name in options]:
        raise TypeError(
            f"`{refused[0]}` is not for streams, which give float arrays, one embedding an input; quantise them "
            "afterwards with `sentence_transformers.quantize_embeddings`, with one calibration for all."
        )


def progress_bar(total: int | None, shown: bool | None, task: str = "Encoding") -> Any:
    """A bar that counts rows of a task; None shows it when the log level is INFO or below."""
    if shown is None:
        shown = logger.isEnabledFor(logging.INFO)
    return tqdm(total=total, desc=task, unit="row", disable=not shown)
