"""Reading MMEB's parquet files, with errors that name data set, file and row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PLACEHOLDER = re.compile(r"<\|image_\d+\|>")


@dataclass(frozen=True)
class Source:
    """The files of one data set.

    Attributes:
        name: Of the data set, such as ``MSCOCO_t2i``.
        files: Its parquet files, in order.
    """

    name: str
    files: tuple[Path, ...]


class Origin:
    """Finds the row that an image path comes from; reads the files again, so for error messages only.

    Args:
        sources: Where to look.
        columns: The columns that hold image paths, or lists of them.
    """

    def __init__(self, sources: Sequence[Source], columns: Iterable[str]) -> None:
        self.sources, self.columns = tuple(sources), frozenset(columns)

    def __call__(self, image: str) -> str:
        """Name data set, row and file of the first row that has the image; the data sets when none has."""
        for source in self.sources:
            for file in source.files:
                names = [name for name in pq.read_schema(file).names if name in self.columns]
                for number, row in enumerate(pq.read_table(file, columns=names).to_pylist()):
                    if any(image == value or (isinstance(value, list) and image in value) for value in row.values()):
                        return f"{source.name}, row {number} of {file.name}"
        return ", ".join(source.name for source in self.sources)


def find_sources(root: str | Path, names: Iterable[str] | None, split: str) -> list[Source]:
    """Find ``root/<name>/<split>-*.parquet``.

    Args:
        root: Folder of the data sets.
        names: Which ones; None for all that have the split, by name.
        split: Start of the files' names.

    Raises:
        FileNotFoundError: When the folder, one of the data sets or all of them are missing; says what is there.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is no folder. Give the one that holds <name>/{split}-*.parquet.")
    there = sorted({file.parent.name for file in folder.glob(f"*/{split}-*.parquet")})
    wanted = there if names is None else list(names)
    missing = [name for name in wanted if name not in there]
    if missing or not wanted:
        splits = sorted({f"{file.parent.name}/{file.name}" for file in folder.glob("*/*.parquet")})
        found = f"it has {', '.join(there)}" if there else f"of parquet files there are {splits[:5] or 'none'}"
        raise FileNotFoundError(
            f"{str(root)!r} has no {' nor '.join(missing) or 'data set'} with files named {split}-*.parquet; {found}."
        )
    return [Source(name, tuple(sorted((folder / name).glob(f"{split}-*.parquet")))) for name in wanted]


def default_image_root(root: str | Path, image_root: str | Path | None) -> Path:
    """``root/images`` when that is a folder, else ``root``, unless given."""
    if image_root is not None:
        return Path(image_root)
    images = Path(root) / "images"
    return images if images.is_dir() else Path(root)


def read_columns(
    source: Source, file: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Read a file's columns as Python values; optional columns that are absent are left out.

    Other columns are ignored, unless they begin as one of these does (``neg_txt``, ``tgt_image``): what they hold would
    be lost without a word.

    Raises:
        ValueError: When the file is damaged, a required column is missing or of the wrong type, or another column
            looks like one of them.
    """
    try:
        schema = pq.read_schema(file)
        missing = [name for name in required if name not in schema.names]
        if missing:
            raise ValueError(
                f"{source.name}: {file} has no column {', '.join(missing)}. Found: {', '.join(schema.names)}. "
                "Expected: "
                f"{', '.join(required)} and, where there are any, {', '.join(optional) or 'no others'}."
            )
        names = [*required, *(name for name in optional if name in schema.names)]
        starts = tuple({f"{name.partition('_')[0]}_" for name in (*required, *optional)})
        if unknown := [name for name in schema.names if name.startswith(starts) and name not in names]:
            raise ValueError(
                f"{source.name}: {file} has the unknown column {', '.join(unknown)}. Known are "
                f"{', '.join((*required, *optional))}. Rename it, or drop it if it is not meant to be used."
            )
        for name in names:
            kind = schema.field(name).type
            inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
            if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
                raise ValueError(
                    f"{source.name}: column {name} of {file} holds {kind}, but text (or lists of text) is expected. An "
                    "image is given by its path below the image folder."
                )
        table = pq.read_table(file, columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{source.name}: {file} is damaged or no parquet file ({error}). Download it again."
        ) from error
    return {name: table.column(name).to_pylist() for name in names}


def clean_text(text: str | None, instruction: str | None = None) -> str:
    r"""Join an instruction and a text, and take the image placeholder out: the chat template puts the image first.

    Blanks that stood around the placeholder go too, and those at both ends.

    Example:
        >>> clean_text("<|image_1|>\nWhich animal is shown?\n")
        'Which animal is shown?'
        >>> clean_text("a dog", instruction="<|image_1|> Find an image of: ")
        'Find an image of: a dog'
    """
    parts = [_PLACEHOLDER.sub("", part or "").strip(" ") for part in (instruction, text)]
    return " ".join(part for part in parts if part).replace(" \n", "\n").strip()


def cells(texts: Sequence[str], images: Sequence[str]) -> pa.StructArray:
    """Cells ``{"image", "text"}`` as an Arrow array; what is empty becomes null."""
    return pa.StructArray.from_arrays(
        [pa.array([value or None for value in values], pa.string()) for values in (images, texts)], ["image", "text"]
    )
