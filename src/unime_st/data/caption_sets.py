"""Images with captions, for retrieval, from the layouts the usual sets are published in.

Each reader returns images, opened late, and for each image its captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, config, load_dataset
from datasets import Image as ImageFeature

from unime_st.data.images import resolve_image
from unime_st.identity.content import fingerprint
from unime_st.images import ADDRESSES, IMAGE_FILES
from unime_st.paths import resolve_below

Captioned = tuple[list[Any], list[list[str]]]


def read_karpathy_split(
    path: str | Path, image_root: str | Path, *, split: str = "test", captions_per_image: int | None = 5
) -> Captioned:
    """Read Flickr30K or COCO as split by Karpathy: ``dataset_flickr30k.json``, ``dataset_coco.json``.

    The file is ``{"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}``, in COCO with ``filepath``.
    UniME's protocol takes the split ``test`` and the first five captions of each image; None for all.
    """
    file = Path(path)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["images"]
        chosen = [entry for entry in entries if entry["split"] == split]
        images = [
            resolve_image(
                image_root, f"{entry['filepath']}/{entry['filename']}" if entry.get("filepath") else entry["filename"]
            )
            for entry in chosen
        ]
        captions = [[sentence["raw"].strip() for sentence in entry["sentences"]] for entry in chosen]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'{file}: {error!r}. Expected {{"images": [{{"filename", "split", "sentences"}}]}}.'
        ) from error
    if not images:
        splits = sorted({entry["split"] for entry in entries})
        raise ValueError(f"{file} has no image of split {split!r}; there are {', '.join(splits) or 'none'}.")
    return list(images), [own[:captions_per_image] for own in captions]


def read_paired_folders(images: str | Path, captions: str | Path) -> Captioned:
    """Read a folder of images and one of .txt files of the same names, a caption each, as Urban1K is published."""
    pictures = {path.stem: path for path in sorted(Path(images).iterdir()) if path.suffix.lower() in IMAGE_FILES}
    texts = {path.stem: path for path in Path(captions).glob("*.txt")}
    if not pictures:
        raise FileNotFoundError(f"{images} holds no images.")
    if alone := sorted(set(pictures) ^ set(texts)):
        raise FileNotFoundError(
            f"{len(alone)} names are in only one of {images} and {captions}: {', '.join(alone[:5])}. Each image needs "
            "a text of its name."
        )
    found = [resolve_image(images, path.name) for path in pictures.values()]
    return list(found), [[_read_text(captions, texts[name].name)] for name in pictures]


def _read_text(folder: str | Path, name: str) -> str:
    try:
        return resolve_below(folder, name, what="text").read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{Path(folder) / name} is not UTF-8 ({error}). Write it again.") from error


def read_caption_dataset(
    dataset: Dataset | str,
    *,
    split: str = "test",
    image_column: str = "image",
    caption_columns: Sequence[str] = ("caption",),
    captions_per_image: int | None = None,
    image_root: str | Path | None = None,
) -> Captioned:
    """Read a data set, or one of the Hub, with an image and its captions in each row; rows of one image add up.

    Each of ``caption_columns`` holds a caption or a list of them, ``image_column`` an image, which stays encoded until
    it is used, or a path below ``image_root``. None for that refuses paths, but for the files that came with a data set
    given by its name.
    """
    rows, folder = rows_and_folder(dataset, split, image_root)
    require_columns(rows, [image_column, *caption_columns])
    images: dict[str, Any] = {}
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(undecoded(rows, image_column)):
        image = image_below(row[image_column], folder, f"Row {number}")
        key = fingerprint({"image": image})
        images.setdefault(key, {"image": image})
        own = [text for column in caption_columns for text in _texts(row[column])]
        if not own:
            raise ValueError(f"Row {number} has no caption in {', '.join(caption_columns)}.")
        captions.setdefault(key, []).extend(own)
    return list(images.values()), [own[:captions_per_image] for own in captions.values()]


def rows_and_folder(
    dataset: Dataset | str, split: str, image_root: str | Path | None, config_name: str | None = None
) -> tuple[Any, str | Path | None]:
    """Rows, fetched if given by a name, and the folder of their images: ``image_root``, else that of the name."""
    if not isinstance(dataset, str):
        return dataset, image_root
    rows = load_dataset(dataset, config_name, split=split) if config_name else load_dataset(dataset, split=split)
    return rows, image_root or (dataset if Path(dataset).is_dir() else config.HF_CACHE_HOME)


def undecoded(rows: Dataset, image_column: str) -> Dataset:
    """Rows whose images stay encoded until they are used."""
    if isinstance(rows.features[image_column], ImageFeature):
        return rows.cast_column(image_column, ImageFeature(decode=False))
    return rows


def image_below(image: Any, folder: str | Path | None, where: str) -> Any:
    """An image of a data set as it is, unless it is a path: then the file below a folder; ``where`` is its row."""
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path") is not None:
        image = image["path"]
    if not isinstance(image, str | Path) or str(image).startswith(ADDRESSES):
        return image  # the model decides whether it opens addresses
    if folder is None:
        raise ValueError(
            f"{where} names a file, {str(image)!r}, in place of holding an image. Give the folder of the images as "
            "`image_root`: what lies outside it is not opened."
        )
    try:
        return str(resolve_image(folder, image))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from error


def require_columns(rows: Dataset, names: Iterable[str]) -> None:
    """Refuse a data set without a column."""
    if missing := [name for name in names if name not in rows.column_names]:
        raise ValueError(f"The data set has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}.")


def _texts(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
