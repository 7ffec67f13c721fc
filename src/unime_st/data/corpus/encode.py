"""Encodes corpora that do not fit in memory into files that survive a kill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unime_st.arguments import require_path
from unime_st.data.corpus.encoded import FORMAT_VERSION, EncodedCorpus, claimed
from unime_st.data.corpus.parts import FORMATS
from unime_st.data.corpus.run import CorpusRun
from unime_st.data.corpus.stream import CACHE_BYTES, check_arguments, progress_bar
from unime_st.data.corpus.window_encoder import Encoder, RecentEmbeddings, WindowEncoder
from unime_st.data.corpus.windows import read_windows
from unime_st.embedding.missing import own_share
from unime_st.embedding.prompts import prompt_options
from unime_st.identity.model import named_or_fingerprint

_CHANGES_NO_EMBEDDING = (
    "batch_size",
    "batch_num_tokens",
    "num_workers",
    "device",
    "pool",
    "chunk_size",
    "prompt",
    "prompt_name",
)


def encode_corpus(
    model: Encoder,
    inputs: Iterable[Any],
    output_dir: str | Path,
    *,
    output_format: Literal["parquet", "npy"] = "parquet",
    dtype: Literal["float32", "float16"] = "float32",
    window_size: int = 2048,
    with_ids: bool = False,
    model_name: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    prefetch: bool = True,
    show_progress_bar: bool | None = None,
    **encode_options: Any,
) -> EncodedCorpus:
    """Encode a corpus into files, in constant memory; a run that was killed continues when called again.

    Each window becomes one part file, which is there whole or not at all. When called again, a part that is there is
    compared with its inputs by their fingerprints and not encoded; the cache of earlier inputs is restored from the
    files, so that the result is that of a run never killed, to the last bit (given the same batch size, cache and
    number of processes, and the same processor and threads). Parts that are deleted or damaged are encoded anew; to
    encode everything anew, delete the folder. Rows can be appended: called with the former inputs and more of them, it
    encodes the new ones, and the last part again if it was not full.

    Several processes (a process group, or torchrun's variables) each take every W-th window and return when theirs are
    done. All must give the same inputs and settings, and see one folder; each iterates over all rows of inputs that are
    no sequence. The process that ends last marks the corpus complete.

    Args:
        model: See :func:`encode_stream`.
        inputs: See :func:`encode_stream`; the same inputs in the same order when called again.
        output_dir: Folder of the result; made when missing.
        output_format: ``"parquet"``: files of the columns ``row``, ``id``, ``embedding``, ``fingerprint``. ``"npy"``:
            plain arrays ``(n, D)`` to be memory-mapped, with folders ``fingerprints`` and ``ids`` beside them.
        dtype: The dtype of the embeddings on disk.
        window_size: Rows per part, which is the most that a kill can cost each process.
        with_ids: Inputs are pairs ``(id, input)`` whose ids, strings or integers, are written too. Several rows may
            have one id, such as pieces of a document.
        model_name: Identity of the model. None derives it from the weights and settings, which takes a pass over the
            weights and needs a ``torch.nn.Module``.
        cache_bytes: See :func:`encode_stream`.
        prefetch: See :func:`encode_stream`.
        show_progress_bar: Show a bar of this process's rows; None shows it when the log level is INFO or below.
        **encode_options: See :func:`encode_stream`. ``batch_size`` and ``batch_num_tokens`` may change between calls.

    Returns:
        The corpus; see :func:`load_corpus`.

    Raises:
        BrokenInputError: See :func:`encode_stream`. Finished parts are kept, as they are whenever an error is raised.
        OSError: When the disk is full.
        TypeError: For an option that would change the kind of result, a model without identity, or ids of another kind.
        ValueError: When there are no inputs; when the folder holds a corpus of another model, prompt or other setting,
            naming it, or of other inputs, naming the first row that differs; when another run is working in it.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> class Lengths:  # stands for a model
        ...     def encode(self, items, **options):
        ...         print("encoding", items)
        ...         return np.array([[len(item), 1.0] for item in items])
        >>> folder = tempfile.mkdtemp()
        >>> texts = ["a", "bb", "a", "ccc"]
        >>> corpus = encode_corpus(Lengths(), texts, folder, model_name="lengths", window_size=3)
        encoding ['a', 'bb']
        encoding ['ccc']
        >>> len(corpus), corpus.rows([3]).tolist()
        (4, [[3.0, 1.0]])
        >>> again = encode_corpus(Lengths(), texts, folder, model_name="lengths", window_size=3)  # nothing to do
    """
    folder = require_path("output_dir", output_dir)
    check_arguments(model, window_size, cache_bytes, inputs, encode_options)
    if not isinstance(with_ids, bool):
        raise TypeError(f"`with_ids={with_ids!r}`, but it is True (inputs are pairs of id and input) or False.")
    if output_format not in FORMATS or dtype not in ("float32", "float16"):
        raise ValueError(
            f"`output_format={output_format!r}` and `dtype={dtype!r}`, but formats are {' and '.join(FORMATS)}, and "
            "dtypes float32 and float16."
        )
    window_size = int(window_size)  # JSON takes no numbers of numpy
    rest = {name: value for name, value in encode_options.items() if name not in ("prompt", "prompt_name")}
    options = rest | prompt_options(model, encode_options.get("prompt"), encode_options.get("prompt_name"))
    settings = {
        "format_version": FORMAT_VERSION,
        "output_format": output_format,
        "dtype": dtype,
        "window_size": window_size,
        "with_ids": with_ids,
        "model": named_or_fingerprint(model, model_name, "model_name"),
        "max_seq_length": getattr(model, "max_seq_length", None),
        "prompt": options.get("prompt", options.get("prompt_name")),
        "options": _deciding(options),
    }
    encoder = WindowEncoder(model, options, RecentEmbeddings(cache_bytes), dtype)
    share = own_share()
    total = _own_rows(inputs, window_size, share)
    rows = count = 0
    with (
        claimed(folder, settings) as manifest,
        progress_bar(total, show_progress_bar) as bar,
        closing(read_windows(inputs, window_size, prefetch=prefetch, with_ids=with_ids, share=share)) as coming,
    ):
        run = CorpusRun(FORMATS[output_format](folder), manifest, encoder, with_ids)
        for window in coming:
            rows, count = window.start + window.size, window.number + 1
            if window.items:
                run.take(window)
                bar.update(window.size)
        return run.finish(rows, count)


def _own_rows(inputs: Iterable[Any], window_size: int, share: tuple[int, int]) -> int | None:
    """How many rows this process will take, or None where that cannot be known in advance."""
    if not isinstance(inputs, Sized):
        return None
    starts = range(share[0] * window_size, len(inputs), share[1] * window_size)
    return sum(min(window_size, len(inputs) - start) for start in starts)


def _deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide the embeddings, without those that are None or False."""
    kept = {key: value for key, value in options.items() if key not in _CHANGES_NO_EMBEDDING}
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in sorted(kept.items())}
    return {key: value if isinstance(value, str | int | float) else repr(value) for key, value in plain.items()
            if value is not None and value is not False}  # fmt: skip
