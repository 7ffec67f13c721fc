"""Pairs as they are stored, whatever made them, and what opens their images."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from unime_st.data.images import ItemReader
from unime_st.data.pairs.reader import PairReader
from unime_st.data.with_images import with_images


def stored_rows(dataset: Dataset) -> tuple[Dataset, ItemReader]:
    """Rows with their images closed, and the reader that opens them; a transform of another kind is refused."""
    transform = transform_of(dataset)
    if transform is None:
        dataset = with_images(dataset)
        transform = transform_of(dataset)
    if not isinstance(transform, ItemReader):
        raise TypeError(
            f"The rows have a transform of type {type(transform).__name__}, underneath which nothing is known. Give "
            "those of `load_pairs` or `with_images`, or rows without a transform."
        )
    return dataset.with_format(None), transform


def transform_of(dataset: Dataset) -> Any:
    """The transform of a data set's rows, or None."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` is a {type(dataset).__name__}, but a `datasets.Dataset` is needed.")
    return dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None


def closed_inputs(dataset: Dataset, column: str) -> list[Any]:
    """A column as inputs of a model whose images are still files: absolute paths, or bytes where they are stored so."""
    stored, reader = stored_rows(dataset)
    closed = PairReader(reader.image_root, open_images=False, origin=reader.origin)
    cells = closed({column: stored[column][:]})[column]
    return [{"text": cell} if isinstance(cell, str) else cell for cell in cells]
