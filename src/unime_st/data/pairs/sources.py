"""Finding what to read: a file, a folder of images, a saved data set or one in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_from_disk
from datasets.exceptions import DatasetGenerationError

from unime_st.data.pairs.text_tables import TEXT_TABLES, read_text_table
from unime_st.images import IMAGE_FILES

_METADATA = tuple(f"metadata{end}" for end in (".csv", ".tsv", ".jsonl", ".parquet"))
_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
_READABLE = (
    f"a file ({', '.join((*TEXT_TABLES, '.parquet'))}), a folder of images with captions (a .txt of the same name "
    f"beside each, or {', '.join(_METADATA)}), or a folder that `Dataset.save_to_disk` has made"
)


@dataclass(frozen=True)
class Source:
    """Columns as they are stored, and where each row stands."""

    name: str  # what messages call it
    columns: Mapping[str, list[Any] | pa.ChunkedArray]  # of files of text any that JSON knows
    rows: int
    lines: np.ndarray | None = None  # (N,) line of each row in its file, from 1; None for rows that are counted from 0
    image_root: Path | None = None  # folder that paths of images are below, if there is one
    notes: tuple[str, ...] = ()  # what was found out, to be told

    def place(self, row: int, column: str | None = None) -> str:
        """Where a row stands, in words."""
        number = f"row {row}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.name}, {number}" + (f", column {column!r}" if column else "")

    def below(self, image_root: Path) -> Self:
        """The same with images below another folder."""
        return replace(self, image_root=image_root)


def open_source(
    source: str | Path | Dataset,
    *,
    split: str | None = None,
    separator: str | None = None,
    encoding: str = "utf-8-sig",
    captions: bool = True,
) -> Source:
    """Read all columns of a source of ``load_pairs``, images with ``captions`` or without; these stay closed."""
    if isinstance(source, DatasetDict):
        return _of_dataset(_split_of(source, split, "The data set"), "the data set", None)
    if split is not None and not (isinstance(source, str | Path) and (Path(source) / _SAVED_SPLITS).is_file()):
        raise ValueError(f"`split={split!r}`, but the source has no splits. Leave it out.")
    if isinstance(source, Dataset):
        return _of_dataset(source, str(source.info.dataset_name or "the data set"), None)
    if not isinstance(source, str | Path):
        raise TypeError(f"`source` is a {type(source).__name__}, but it must be a path or a `datasets.Dataset`.")
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, split, captions, lambda file: _open_file(file, separator, encoding))
    if not path.is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}. Give {_READABLE}.")
    return _open_file(path, separator, encoding)


def _open_file(path: Path, separator: str | None, encoding: str) -> Source:
    if path.suffix.lower() == ".parquet":
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged or no parquet ({error}). Write it again.") from error
        if not rows:
            raise ValueError(f"{path} has no row. Add at least two pairs.")
        try:
            found = Dataset.from_parquet(str(path))
        except DatasetGenerationError as error:
            raise ValueError(f"{path} is damaged ({error.__cause__ or error}). Write it again.") from error
        return _of_dataset(found, path.name, path.parent)
    if path.suffix.lower() not in TEXT_TABLES:
        raise ValueError(f"{path} is of no kind that is read. Give {_READABLE}.")
    table = read_text_table(path, separator=separator, encoding=encoding)
    return Source(path.name, table.columns, len(table.lines), table.lines, path.parent, table.notes)


def _open_folder(folder: Path, split: str | None, captions: bool, open_file: Callable[[Path], Source]) -> Source:
    if (folder / _SAVED_SPLITS).is_file() or (folder / _SAVED).is_file():
        return _of_dataset(_split_of(load_from_disk(str(folder)), split, str(folder)), folder.name, folder)
    if metadata := [folder / name for name in _METADATA if (folder / name).is_file()]:
        if len(metadata) > 1:
            raise ValueError(f"{folder} holds {', '.join(file.name for file in metadata)}. Give the one to read.")
        return open_file(metadata[0])
    if inside := sorted({path.parent.name for name in _METADATA for path in folder.glob(f"*/{name}")}):
        raise ValueError(f"{folder} has its tables in {', '.join(inside)}. Give one of these folders.")
    images = [path for path in sorted(folder.rglob("*")) if _is_image(path.relative_to(folder)) and path.is_file()]
    if not images:
        tables = sorted(file for end in (*TEXT_TABLES, ".parquet") for file in folder.glob(f"*{end}"))
        if len(tables) == 1:
            return open_file(tables[0])
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        if any(path.suffix.lower() == ".pdf" for path in folder.rglob("*")):
            raise ValueError(f"{folder} holds {found}. Its PDF files are read by `PdfPages`, or with `--pdfs`.")
        raise ValueError(f"{folder} holds {found}: no one source of pairs. Give {_READABLE}.")
    if not captions:
        return Source(
            folder.name,
            {"image": [image.relative_to(folder).as_posix() for image in images]},
            len(images),
            image_root=folder,
        )
    return _captioned(folder, images)


def _is_image(path: Path) -> bool:
    """By its name, where nothing on the way is hidden."""
    return path.suffix.lower() in IMAGE_FILES and not any(part.startswith(".") for part in path.parts)


def _captioned(folder: Path, images: list[Path]) -> Source:
    """Images and the .txt files beside them, each a caption; None for an image that has none."""
    captions: list[str | None] = []
    for image in images:
        file = image.with_suffix(".txt")
        try:
            captions.append(file.read_text(encoding="utf-8-sig").strip() if file.is_file() else None)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if not any(captions):
        raise ValueError(
            f"{folder} holds {len(images)} images, but no captions. Put a .txt of the same name beside each, or a "
            "metadata.csv with the columns file_name and text."
        )
    names: list[Any] = [image.relative_to(folder).as_posix() for image in images]
    notes = (f"{folder.name}: {len(images)} images with captions from .txt files, in the order of their names",)
    return Source(folder.name, {"image": names, "caption": list(captions)}, len(images), None, folder, notes)


def _split_of(found: Dataset | DatasetDict, split: str | None, name: str) -> Dataset:
    if isinstance(found, Dataset):
        return found
    chosen = split or (next(iter(found)) if len(found) == 1 else None)
    if chosen not in found:
        raise ValueError(f"{name} has the splits {', '.join(map(str, found))}. Give one of them as `split`.")
    return found[chosen]


def _of_dataset(rows: Dataset, name: str, image_root: Path | None) -> Source:
    if not len(rows):
        raise ValueError(f"{name} has no row. Add at least two pairs.")
    table = rows.with_format("arrow")[:]  # no copy, unless rows were selected
    return Source(name, {column: table.column(column) for column in table.column_names}, len(rows), None, image_root)
