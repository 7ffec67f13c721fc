"""A corpus of embeddings on disk: its manifest, and how it is read back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from unime_st.data.corpus.parts import FORMATS
from unime_st.files import FolderLock, checksum, create_exclusively, one_at_a_time, remove_leftovers, write_atomically
from unime_st.identity.model import explain_outdated

logger = logging.getLogger(__name__)

MANIFEST = ".manifest.json"  # hidden, or pyarrow and datasets would take it for a part
FORMAT_VERSION = 2
_WITHOUT_CHECKSUMS = 1
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "output_format": str,
    "dtype": str,
    "window_size": int,
    "with_ids": bool,
    "complete": bool,
}
_WHEN_COMPLETE = ("rows", "parts", "dimension")


class EncodedCorpus:
    """Embeddings of a corpus, read from disk as they are asked for; see :func:`load_corpus`.

    It is a sequence of rows: ``len(corpus)``, ``corpus[-1]`` is ``(D,)``, ``corpus[100:200]`` and ``corpus[[3, 7]]``
    are ``(n, D)``, and iterating reads one part at a time. ``np.asarray(corpus)`` reads all of it into memory, which
    ``sentence_transformers.util.semantic_search(queries, np.asarray(corpus))`` and others take; for more than memory
    holds, search ``corpus.parts()`` one by one.

    Attributes:
        folder: The folder of the files.
        manifest: The settings of the run, ``dimension``, ``rows``, and whether the corpus is ``complete``.
    """

    ndim = 2

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = dict(manifest)
        verified = manifest["format_version"] != _WITHOUT_CHECKSUMS
        self._parts = FORMATS[manifest["output_format"]](folder, verified=verified)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and dimensions."""
        return len(self), self.manifest["dimension"]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the embeddings."""
        return np.dtype(self.manifest["dtype"])

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield row after row, ``(D,)``, reading one part at a time."""
        for part in self.parts():
            yield from part

    def __getitem__(self, place: Any) -> np.ndarray:
        """Read a row ``(D,)``, or those of a slice, a list of numbers or a mask ``(n, D)``, also from the end.

        Raises:
            IndexError: For a row that does not exist, or something that is no row number.
        """
        if isinstance(place, slice):
            return self.rows(range(len(self))[place])
        if isinstance(place, Integral) and not isinstance(place, bool | np.bool_):
            return self.rows([self._from_the_start(int(place))])[0]
        if isinstance(place, tuple) or np.ndim(place) != 1:
            raise IndexError(f"{place!r} names no rows. Give a number, a slice, or a list of numbers.")
        chosen = np.asarray(place)
        if chosen.dtype == bool:
            if len(chosen) != len(self):
                raise IndexError(f"A mask of {len(chosen)} rows does not fit a corpus of {len(self)}.")
            return self.rows(np.flatnonzero(chosen))
        return self.rows([self._from_the_start(number) for number in _whole_numbers(place).tolist()])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything into memory, ``(N, D)``."""
        if copy is False:
            raise ValueError("A corpus is on disk: an array of it is a copy. Leave `copy=False` out.")
        whole = np.empty(self.shape, dtype=self.dtype if dtype is None else dtype)
        start = 0
        for part in self.parts():
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def _from_the_start(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"There is no row {number}: the corpus has {len(self)}.")
        return number % len(self)

    def __repr__(self) -> str:
        about = self.manifest
        return (
            f"EncodedCorpus({str(self.folder)!r}, {len(self)} rows, {about['dimension']} dimensions, {about['dtype']})"
        )

    @property
    def complete(self) -> bool:
        """Whether all parts are there, which is not so while other processes still work on theirs."""
        return self.manifest["complete"]

    @property
    def files(self) -> list[Path]:
        """The files of embeddings, in the order of their rows."""
        return [self._parts.path(number) for number in range(self.manifest["parts"])]

    def part_checksums(self) -> list[str]:
        """The checksum of each part's content, by which other files know whether they were made of it."""
        return [self._parts.recorded_checksum(number) for number in range(self.manifest["parts"])]

    def parts(self) -> Iterator[np.ndarray]:
        """Read one part after the other, each ``(n, D)``."""
        yield from (self._parts.embeddings(number) for number in range(self.manifest["parts"]))

    def ids(self) -> Iterator[str | int]:
        """Yield the ids, in the order of the rows.

        Raises:
            ValueError: When the corpus was encoded without ids.
        """
        if not self.manifest["with_ids"]:
            raise ValueError(f"{self.folder} has no ids: rows are known by number. Encode with `with_ids=True`.")
        for number in range(self.manifest["parts"]):
            yield from self._parts.ids(number)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read embeddings by row number into ``(n, D)``; each parquet file with a wanted row is read whole.

        Raises:
            IndexError: For a number that no row has, or something that is no whole number.
            ValueError: When a part is damaged, naming it.
        """
        wanted = _whole_numbers(numbers)
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


def _whole_numbers(numbers: Any) -> np.ndarray:
    found = np.asarray(numbers)
    if found.size and (found.dtype.kind not in "iu" or found.ndim != 1):
        raise IndexError(f"Rows are known by a list of whole numbers, not by {shorten(repr(numbers), 80)}.")
    return found.astype(np.int64).reshape(-1)


def load_corpus(output_dir: str | Path) -> EncodedCorpus:
    """Open a corpus that ``encode_corpus`` has written; only its manifest is read now, each part when it is needed.

    A part is compared with its checksum when it is first read; a damaged one is refused by name. Corpora of earlier
    versions have no checksums, and a warning says so.

    ``corpus[3:7]`` and ``corpus[-1]`` read rows as an array does, ``np.asarray(corpus)`` reads all into memory,
    ``corpus.rows([3, 70000])`` reads rows by number, ``corpus.parts()`` reads all in turn. With ``"npy"`` both go
    through memory maps, and ``corpus.files`` are plain arrays ``(n, D)``. Parquet parts are plain too, and
    ``datasets.load_dataset("parquet", data_files=f"{output_dir}/*.parquet")`` or
    ``pyarrow.dataset.dataset(output_dir)`` reads them, with the columns ``row``, ``id`` where there are ids,
    ``embedding`` and ``fingerprint``.

    Args:
        output_dir: The folder.

    Returns:
        The corpus.

    Raises:
        FileNotFoundError: When the folder holds no corpus.
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
    if manifest["format_version"] == _WITHOUT_CHECKSUMS:
        logger.warning("%s was encoded by an earlier version: damage of its files cannot be noticed.", folder)
    if not manifest["complete"]:
        parts = FORMATS[manifest["output_format"]](folder)
        raise ValueError(
            f"The corpus in {folder} is not complete: {len(parts.numbers())} parts of {manifest['window_size']} rows "
            "are there. Call `encode_corpus` again as before; it goes on from them."
        )
    return EncodedCorpus(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a folder's manifest, or return None where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    again = f"Restore it, or delete {folder} and encode the corpus anew."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {again}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        raise ValueError(f"{path} is damaged: it is no manifest. {again}")  # noqa: TRY004 (of a file)
    if manifest["format_version"] not in (_WITHOUT_CHECKSUMS, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {manifest['format_version']}, and this version of unime_st reads "
            f"{FORMAT_VERSION}. Use the version that wrote it, or encode into another folder."
        )
    total = manifest.pop("checksum", None)
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(manifest.get(name), kind)]
    if manifest.get("complete"):
        wrong += [name for name in _WHEN_COMPLETE if not isinstance(manifest.get(name), int)]
    if manifest["format_version"] == FORMAT_VERSION and total != _checksum(manifest):
        wrong.append("checksum")
    if manifest.get("output_format") not in FORMATS:
        wrong.append("output_format")
    if wrong:
        raise ValueError(f"{path} is damaged: its {', '.join(dict.fromkeys(wrong))} cannot be right. {again}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return checksum(json.dumps(manifest, sort_keys=True))


def _as_text(manifest: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(manifest))
    return json.dumps({**plain, "checksum": _checksum(plain)}, indent=1, ensure_ascii=False) + "\n"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest."""
    write_atomically(folder / MANIFEST, _as_text(manifest))


@contextmanager
def claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Begin a corpus, or continue one with the same settings, and yield its manifest; no other run may begin meanwhile.

    The folder is claimed before anything is encoded. A claim without any part is taken over if its run has ended, and
    respected if its run is still working.
    """
    with ExitStack() as stack:
        with one_at_a_time(folder):
            lock = stack.enter_context(FolderLock(folder))
            for place in (folder, folder / "fingerprints", folder / "ids"):
                remove_leftovers(place)
            manifest = _claim(folder, json.loads(json.dumps(settings)), lock)
        yield manifest


def _claim(folder: Path, settings: dict[str, Any], lock: FolderLock) -> dict[str, Any]:
    fresh = {**settings, "dimension": None, "rows": None, "parts": None, "complete": False}
    has_parts = any(any(folder.glob(f"part-*{parts.suffix}")) for parts in FORMATS.values())
    if has_parts and not (folder / MANIFEST).exists():
        raise ValueError(
            f"{folder} holds part files but no {MANIFEST}: they are of something else. Give another folder."
        )
    if create_exclusively(folder / MANIFEST, _as_text(fresh)):
        return fresh
    manifest: dict[str, Any] = read_manifest(folder) or {}
    differing = [
        f"`{name}` was {manifest.get(name)!r} and is {value!r} now"
        for name, value in settings.items()
        if manifest.get(name) != value
    ]
    if not differing:
        return manifest
    if not has_parts and lock.alone():
        write_manifest(folder, fresh)
        return fresh
    if manifest["format_version"] == _WITHOUT_CHECKSUMS:
        raise ValueError(
            f"The corpus in {folder} was begun by an earlier version of unime_st, whose parts carry no checksums and "
            "which knew models and images by another rule. `load_corpus` reads it if it is complete; to encode, give "
            "another `output_dir`."
        )
    outdated = explain_outdated(str(manifest.get("model"))) if manifest.get("model") != settings["model"] else ""
    raise ValueError(
        f"The corpus in {folder} was begun with other settings: {'; '.join(differing)}. Go on with the ones "
        "it has, or give another `output_dir` (or delete this one) to encode everything anew."
        f"{outdated}"
    )
