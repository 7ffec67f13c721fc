"""Reading MMEB's parquet files, with errors that name data set, file and row."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unime_st.data.bad_images import Place
from unime_st.data.stored_images import first_row
from unime_st.paths import resolve_below

_PLACEHOLDER = re.compile(r"<\|image_\d+\|>")


@dataclass(frozen=True)
class Source:
    """The files of one data set."""

    name: str  # such as MSCOCO_t2i
    files: tuple[Path, ...]  # in order


class Origin:
    """Finds the row of an image path in columns of them or of lists; reads the files again, so for errors only."""

    def __init__(self, sources: Sequence[Source], columns: Iterable[str]) -> None:
        self.sources, self.columns = tuple(sources), frozenset(columns)

    def __call__(self, image: str) -> Place:
        """Find data set, row and file of the first row that has the image; the data sets alone when none has."""
        for source in self.sources:
            for file in source.files:
                names = [name for name in pq.read_schema(file).names if name in self.columns]
                table = pq.read_table(file, columns=names)
                found = (first_row(table[name].combine_chunks(), image) for name in names)
                rows = [row for row in found if row is not None]
                if rows:
                    return Place(source.name, min(rows), file.name)
        return Place(", ".join(source.name for source in self.sources))


def choose_rows(source: Source, max_rows: int | None, seed: int | None) -> list[np.ndarray | None]:
    """Numbers of the chosen rows of each file, None for all: the first ones or, with a seed, random ones, in order."""
    if max_rows is None:
        return [None] * len(source.files)
    sizes = []
    for file in source.files:
        try:
            sizes.append(pq.read_metadata(file).num_rows)
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(source, file, error) from error
    chosen = np.arange(min(max_rows, sum(sizes)))
    if seed is not None:  # by name, so that a data set's rows do not depend on the others
        generator = np.random.default_rng([seed, zlib.crc32(source.name.encode())])
        chosen = np.sort(generator.choice(sum(sizes), len(chosen), replace=False))
    ends = np.cumsum(sizes)
    return [
        part - start for part, start in zip(np.split(chosen, np.searchsorted(chosen, ends)), [0, *ends], strict=True)
    ][:-1]


def _damaged(source: Source, file: Path, error: Exception) -> ValueError:
    return ValueError(f"{source.name}: {file} is damaged or no parquet file ({error}). Download it again.")


def find_sources(root: str | Path, names: Iterable[str] | None, split: str) -> list[Source]:
    """Find ``root/<name>/<split>-*.parquet`` for these data sets; None for all that have the split, by name."""
    check_split(split)
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
    files = {name: sorted((folder / name).glob(f"{split}-*.parquet")) for name in wanted}
    for file in (file for own in files.values() for file in own):
        resolve_below(folder, file.relative_to(folder), what="data")
    return [Source(name, tuple(own)) for name, own in files.items()]


def check_split(split: str) -> None:
    """Refuse a split that would lead to another folder."""
    if re.search(r"[/\\*?\[]", split):
        raise ValueError(f"The split {split!r} is no beginning of files' names, such as 'test', but a path or pattern.")


def default_image_root(root: str | Path, image_root: str | Path | None) -> Path:
    """``root/images`` when that is a folder, else ``root``, unless given."""
    if image_root is not None:
        return Path(image_root)
    images = Path(root) / "images"
    return images if images.is_dir() else Path(root)


def read_columns(
    source: Source,
    file: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    rows: np.ndarray | None = None,
) -> dict[str, list[Any]]:
    """Read a file's columns as Python values, of some rows or all; optional columns that are absent are left out.

    Other columns are ignored, unless they begin as one of these does (``neg_txt``, ``tgt_image``): what they hold would
    be lost without a word.
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
        raise _damaged(source, file, error) from error
    if rows is not None:
        table = table.take(rows)
    return {name: table.column(name).to_pylist() for name in names}


def clean_text(text: str | None, instruction: str | None = None) -> str:
    r"""Join an instruction and a text, and take the image placeholder out: the chat template puts the image first.

    >>> clean_text("<|image_1|>\nWhich animal is shown?\n")
    'Which animal is shown?'
    >>> clean_text("a dog", instruction="<|image_1|> Find an image of: ")
    'Find an image of: a dog'
    """
    parts = [without_placeholders(part).strip(" ") for part in (instruction, text)]
    return " ".join(part for part in parts if part).replace(" \n", "\n").strip()


def without_placeholders(text: str | None) -> str:
    """A text without the placeholders of images; "" for None."""
    return _PLACEHOLDER.sub("", text or "")


def cells(texts: Sequence[str], images: Sequence[str]) -> pa.StructArray:
    """Cells ``{"image", "text"}`` as an Arrow array; what is empty becomes null."""
    return pa.StructArray.from_arrays(
        [pa.array([value or None for value in values], pa.string()) for values in (images, texts)], ["image", "text"]
    )
