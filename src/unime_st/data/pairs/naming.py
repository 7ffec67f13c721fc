"""Which column of a table is the query, which the target, and which hold images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from unime_st.data.pairs.sources import Source
from unime_st.images import IMAGE_FILES
from unime_st.videos import VIDEO_FILES

QUERIES = ("anchor", "query", "question")
TARGETS = ("positive", "positives", "target", "document", "answer", "passage")
TEXTS = ("caption", "captions", "text", "title", "description")
IMAGES = ("image", "image_path", "file_name", "filename", "img", "img_path", "image_file")

_NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?([_ ]?(\d+|image|text|caption))*")
_IMAGE_NAME = re.compile(r"(^|_)(images?|imgs?|photos?|pictures?|file_?names?)(_?(path|file|name|url))?(_?\d+)?")
_LOOKED_AT = 1000  # cells that tell whether a column of strings holds paths

Names = str | Sequence[str] | None


@dataclass(frozen=True)
class Roles:
    """Columns by the part they play; those of a side are joined."""

    query: tuple[str, ...]
    target: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    label: str | None = None  # identity of the target
    images: frozenset[str] = frozenset()  # all of them that hold images


def find_roles(
    source: Source,
    *,
    query: Names = None,
    target: Names = None,
    negatives: Names = None,
    label: str | None = None,
    image_columns: Names = None,
) -> Roles:
    """Tell the columns of a source by what was given, else by their usual names."""
    given: dict[str, tuple[str, ...] | None] = {
        "query": _tuple(query),
        "target": _tuple(target),
        "image_columns": _tuple(image_columns),
    }
    given |= {"negatives": _tuple(negatives), "label": _tuple(label or None)}
    for argument, own in given.items():
        for name in own or ():
            if name not in source.columns:
                raise ValueError(f"{source.name} has no column {name!r}, which `{argument}` names. {_there(source)}")
    names = [name for name in source.columns if name not in {*(given["query"] or ()), *(given["target"] or ())}]
    chosen_negatives = given["negatives"]
    if chosen_negatives is None:
        chosen_negatives = tuple(name for name in names if _NEGATIVE.fullmatch(name.lower()))
    chosen_label = next((name for name in names if name.lower() == "label"), None) if label is None else (label or None)
    free = [name for name in names if name not in chosen_negatives and name.lower() != "label"]
    queries, targets = _sides(source, given["query"], given["target"], free)
    if shared := set(queries) & set(targets):
        raise ValueError(f"{source.name}: the column {min(shared)!r} is query and target in one.")
    used = (*queries, *targets, *chosen_negatives)
    images = given["image_columns"]
    if images is None:
        images = tuple(name for name in used if _holds_images(source, name))
    return Roles(queries, targets, chosen_negatives, chosen_label, frozenset(images))


def find_side(source: Source, columns: Names, id_column: str | None) -> tuple[tuple[str, ...], frozenset[str]]:
    """The columns to encode, and which of them hold images: those given, else a target, else images, else texts."""
    given = _tuple(columns)
    for name in (*(given or ()), *([id_column] if id_column else [])):
        if name not in source.columns:
            raise ValueError(f"{source.name} has no column {name!r}. {_there(source)}")
    free = [name for name in source.columns if name != id_column]
    usual = (_named(free, TARGETS), _first(free, IMAGES), _first(free, TEXTS), _named(free, QUERIES))
    names = given or next(filter(None, usual), ()) or (tuple(free) if len(free) == 1 else ())
    if not names:
        raise ValueError(f"{source.name}: no column has a usual name. {_there(source)} Name the one to encode.")
    return names, frozenset(name for name in names if _holds_images(source, name))


def _sides(
    source: Source, query: tuple[str, ...] | None, target: tuple[str, ...] | None, free: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The two sides; what is not given is found among the free columns."""
    image, text = _first(free, IMAGES), _first(free, TEXTS)
    queries = query or _named(free, QUERIES)
    targets = target or _named(free, TARGETS)
    if queries and targets:
        if image and query is None and target is None:
            if "question" in _lower(queries) or "answer" in _lower(targets):  # visual question answering
                return (*image, *queries), targets
            raise ValueError(
                f"{source.name}: is the column {image[0]!r} a part of the query or of the target? Say so: "
                f'`query=["{image[0]}", "{queries[0]}"]`, or leave it out with `query="{queries[0]}"`. {_there(source)}'
            )
        return queries, targets
    if queries or targets:
        other = (*image, *text)
        if other:
            return (queries, other) if queries else (other, targets)
    elif image and text:
        return text, image  # a caption asks for its image
    elif len(texts := [column for name in TEXTS for column in free if column.lower() == name]) > 1:
        return _two(texts)
    raise ValueError(
        f"{source.name}: no column is a {'target' if queries else 'query'} by its name. {_there(source)} Name both "
        'sides: `query="..."`, `target="..."`; several columns are joined, as in `query=["image", "question"]`.'
    )


def _two(texts: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two columns of texts: the shorter kind, a title, asks for the other."""
    first = next((name for name in texts if name.lower() == "title"), texts[0])
    return (first,), (next(name for name in texts if name != first),)


def _named(free: list[str], usual: tuple[str, ...]) -> tuple[str, ...]:
    """The first usual name that is there, however it is capitalised, with the image that goes by the same name."""
    for name in usual:
        parts = {f"{name.removesuffix('s')}_{kind}" for kind in (*IMAGES, "text", "caption")}
        found = [column for column in free if column.lower() in parts]
        found += [column for column in free if column.lower() == name]
        if found:
            return tuple(found)
    return ()


def _first(free: list[str], usual: tuple[str, ...]) -> tuple[str, ...]:
    return tuple([column for name in usual for column in free if column.lower() == name][:1])


def _lower(names: tuple[str, ...]) -> list[str]:
    return [name.lower() for name in names]


def _tuple(names: Names) -> tuple[str, ...] | None:
    if names is None:
        return None
    return (names,) if isinstance(names, str) else tuple(names)


def _there(source: Source) -> str:
    return f"Its columns are: {', '.join(source.columns)}."


def _holds_images(source: Source, name: str) -> bool:
    """Whether a column of strings holds paths of images: by its name, else if all that is in it ends as they do."""
    cells = source.columns[name]
    if (found := _IMAGE_NAME.search(name.lower())) and found.end() == len(name):
        return True
    if isinstance(cells, pa.ChunkedArray):
        inner = getattr(cells.type, "value_type", cells.type)
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            return False
        cells = cells.slice(0, _LOOKED_AT).to_pylist()
    rows = enumerate(cells[:_LOOKED_AT])
    flat = [(row, one) for row, cell in rows for one in (cell if isinstance(cell, list) else [cell]) if one]
    if flat and all(isinstance(one, str) and one.strip().lower().endswith(VIDEO_FILES) for _, one in flat):
        raise ValueError(
            f"{source.place(flat[0][0], name)} holds {str(flat[0][1])[:80]!r}: the column names video files, but "
            'tables hold texts and images alone. Give rows `{"video": path}` to `encode`, `encode_corpus` or the '
            "Trainer; if all are texts, say `image_columns=[]` to `load_pairs`."
        )
    others = [(row, one) for row, one in flat if not (isinstance(one, str) and _ends_as_image(one))]
    if others and 2 * len(others) < len(flat):
        row, one = others[0]
        raise ValueError(
            f"{source.place(row, name)} holds {str(one)[:80]!r}, but most cells of the column end as images' names do. "
            f'Mend it, or say what they are: `image_columns="{name}"`, or `image_columns=[]` if all are texts.'
        )
    return bool(flat) and not others


def _ends_as_image(text: str) -> bool:
    return "\n" not in text and text.strip().lower().endswith(tuple(IMAGE_FILES))
