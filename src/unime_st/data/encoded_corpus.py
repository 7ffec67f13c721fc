"""A corpus of embeddings on disk: its manifest, and reading it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unime_st.data.corpus_files import FORMATS
from unime_st.files import remove_leftovers, write_atomically

MANIFEST = ".manifest.json"  # hidden: readers of folders, pyarrow and datasets, would take it for a part
FORMAT_VERSION = 1


class EncodedCorpus:
    """Embeddings of a corpus, read from disk as they are asked for; see :func:`load_corpus`.

    Attributes:
        folder: Where they are.
        manifest: Settings they were made with, ``dimension``, ``rows``, and whether they are ``complete``.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = dict(manifest)
        self._parts = FORMATS[manifest["output_format"]](folder)

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __repr__(self) -> str:
        about = self.manifest
        return (
            f"EncodedCorpus({str(self.folder)!r}, {len(self)} rows, {about['dimension']} dimensions, {about['dtype']})"
        )

    @property
    def complete(self) -> bool:
        """Whether all parts are there; not so while other processes still work on theirs."""
        return self.manifest["complete"]

    @property
    def files(self) -> list[Path]:
        """The files of embeddings, in the order of their rows."""
        return [self._parts.path(number) for number in range(self.manifest["parts"])]

    def parts(self) -> Iterator[np.ndarray]:
        """Read one part after the other, each ``(n, D)``."""
        yield from (self._parts.embeddings(number) for number in range(self.manifest["parts"]))

    def ids(self) -> Iterator[str | int]:
        """Read the ids, in the order of the rows.

        Raises:
            ValueError: When the corpus was encoded without.
        """
        if not self.manifest["with_ids"]:
            raise ValueError(f"{self.folder} has no ids: rows are known by number. Encode with `with_ids=True`.")
        for number in range(self.manifest["parts"]):
            yield from self._parts.ids(number)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read embeddings by row number into ``(n, D)``; of parquet files, each that is touched is read.

        Raises:
            IndexError: For a number that no row has.
        """
        wanted = np.asarray(numbers, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"Rows are numbered 0 to {len(self) - 1}, but {wanted.min()} to {wanted.max()} is asked for."
            )
        out = np.empty((len(wanted), self.manifest["dimension"]), dtype=self.manifest["dtype"])
        of_part = wanted // self.manifest["window_size"]
        for number in np.unique(of_part).tolist():
            places = np.flatnonzero(of_part == number)
            out[places] = self._parts.embeddings(number)[wanted[places] - number * self.manifest["window_size"]]
        return out


def load_corpus(output_dir: str | Path) -> EncodedCorpus:
    """Open what ``encode_corpus`` has written; nothing but its manifest is read.

    ``corpus.rows([3, 70000])`` reads rows by number, ``corpus.parts()`` all of them in turn. With ``"npy"`` both go
    through memory maps, and ``corpus.files`` are plain arrays ``(n, D)``. Parquet parts are plain too, and
    ``datasets.load_dataset("parquet", data_files=f"{output_dir}/*.parquet")`` or
    ``pyarrow.dataset.dataset(output_dir)`` reads them, with the columns ``row``, ``id`` where there are ids,
    ``embedding`` and ``fingerprint``.

    Args:
        output_dir: The folder.

    Returns:
        The corpus.

    Raises:
        FileNotFoundError: When the folder holds none.
        ValueError: When it is not complete yet.

    Example:
        >>> import tempfile
        >>> from unime_st.data import encode_corpus
        >>> class Lengths:  # stands for a model
        ...     def encode(self, items, **options):
        ...         return np.array([[len(item), 1.0] for item in items])
        >>> folder = tempfile.mkdtemp()
        >>> corpus = encode_corpus(Lengths(), ["a", "bbb", "cc"], folder, output_format="npy", model_name="lengths")
        >>> load_corpus(folder).rows([2, 0]).tolist()
        [[2.0, 1.0], [1.0, 1.0]]
    """
    folder = Path(output_dir)
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no encoded corpus ({MANIFEST} is missing). Is it another folder, or a copy without "
            "the hidden file?"
        )
    if not manifest["complete"]:
        parts = FORMATS[manifest["output_format"]](folder)
        raise ValueError(
            f"The corpus in {folder} is not complete: {len(parts.numbers())} parts of {manifest['window_size']} rows "
            "are there. Call `encode_corpus` again as before; it goes on from them."
        )
    return EncodedCorpus(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a folder's manifest; None where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete {folder} and encode the corpus anew.") from error
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest['format_version']}, and this version of unime_st reads "
            f"{FORMAT_VERSION}. Use the version that wrote it, or encode into another folder."
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest."""
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def open_manifest(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Begin a corpus, or go on with one that was made with the same settings.

    Returns:
        The manifest.

    Raises:
        ValueError: When the settings differ, naming them, or the folder holds parts of something else.
    """
    for place in (folder, folder / "fingerprints", folder / "ids"):
        remove_leftovers(place)
    manifest = read_manifest(folder)
    has_parts = any(parts(folder).numbers() for parts in FORMATS.values())
    if manifest is None or not has_parts:
        if manifest is None and has_parts:
            raise ValueError(
                f"{folder} holds part files but no {MANIFEST}: they are of something else. Give another folder."
            )
        manifest = {**settings, "dimension": None, "rows": None, "parts": None, "complete": False}
        write_manifest(folder, manifest)
        return manifest
    differing = [
        f"`{name}` was {manifest.get(name)!r} and is {value!r} now"
        for name, value in settings.items()
        if manifest.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"The corpus in {folder} was begun with other settings: {'; '.join(differing)}. Go on with the ones "
            "it has, or give another `output_dir` (or delete this one) to encode everything anew."
        )
    return manifest
