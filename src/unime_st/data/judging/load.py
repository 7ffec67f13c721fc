"""Reading judged negatives back, for training and as rows of the released lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from unime_st.arguments import require_count
from unime_st.columns import LABEL, NEGATIVE_PREFIX, NO_CANDIDATE, SUBSET, negative_column, without_subset
from unime_st.data.images import ItemReader
from unime_st.data.mining.files import read_mined, read_result


def load_judged_negatives(
    output_dir: str | Path,
    *,
    num_negatives: int | None = None,
    image_root: str | Path | None = None,
    **reader_options: Any,
) -> Dataset:
    """Load the result of :func:`judge_negatives` or :func:`import_judged_json`, ready for ``CandidateKLLoss``.

    Args:
        output_dir: The folder.
        num_negatives: Keep the first ``n`` negatives of each row; None keeps all. The paper trains with 8 of 10.
        image_root: Folder of the images; None for the folder of the set that was judged.
        **reader_options: See :class:`~unime_st.data.ItemReader`.

    Returns:
        Rows (anchor, positive, negative_1, ..., negative_n, label), the label being the scores, the positive's first; a
        place without a negative has the score -1 and holds the positive. Images are opened when rows are drawn.

    Raises:
        FileNotFoundError: When there is no finished result.
        ValueError: When a file is damaged or of another result, naming it, or more negatives are asked for than kept.
    """
    tables, root = _tables(Path(output_dir))
    table = pa.concat_tables(tables)
    if num_negatives is not None:
        table = _with_first(table, num_negatives)
    dataset = Dataset(table)
    if root is None and image_root is None:
        return dataset.with_transform(without_subset) if SUBSET in dataset.column_names else dataset
    return dataset.with_transform(ItemReader(image_root or str(root), **reader_options))


def judged_json_rows(output_dir: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a result in the layout of UniME-V2's released lists, for :func:`write_judged_json`, a file at a time.

    Images must be stored as paths. Places without a negative are left out.

    Raises:
        ValueError: When a file is damaged, or an image has no path, naming the row.
    """
    number = 0
    for table in _tables(Path(output_dir))[0]:
        anchor, positive, *negatives = [name for name in table.column_names if name not in (LABEL, SUBSET)]
        for row in table.to_pylist():
            query, target = _said(row[anchor], number), _said(row[positive], number)
            scores = row[LABEL]
            kept = [k for k, score in enumerate(scores[1:]) if score != NO_CANDIDATE]
            yield {
                "query_text": query[0],
                "query_image": query[1],
                "pos_text": target[0],
                "pos_image": target[1],
                "query_pos_scores": scores[0],
                "hard_negatives": [list(_said(row[negatives[k]], number)) for k in kept],
                "hard_negatives_scores": [scores[1 + k] for k in kept],
            }
            number += 1


def _tables(folder: Path) -> tuple[list[pa.Table], str | None]:
    result = read_result(folder)
    try:
        tables = [read_mined(folder / name, result["settings"]) for name in result["files"]]
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error} Make the result again with the same arguments: only that file is lost.") from error
    if LABEL not in tables[0].column_names:
        raise ValueError(f"{folder} holds mined negatives without scores. Judge them by `judge_negatives`.")
    return tables, result["image_root"]


def _with_first(table: pa.Table, n: int) -> pa.Table:
    require_count("num_negatives", n)
    kept = sum(name.startswith(NEGATIVE_PREFIX) for name in table.column_names)
    if n > kept:
        raise ValueError(f"`num_negatives={n}`, but {kept} were kept of each row. Judge again, with more.")
    names = [name for name in table.column_names if name not in {negative_column(k) for k in range(n + 1, kept + 1)}]
    place = names.index(LABEL)
    field = table.schema.field(LABEL)
    cut = pc.list_slice(table.column(LABEL), 0, 1 + n).cast(field.type)
    return table.select(names).set_column(place, field, cut)


def _said(cell: Any, row: int) -> tuple[str, str]:
    """Text and path of an image of a stored cell, "" for none."""
    if isinstance(cell, str):
        return cell, ""
    image = cell.get("image", cell.get("path"))
    image = image.get("path") if isinstance(image, dict) else image
    if image is None and (cell.get("bytes") is not None or cell.get("image") is not None):
        raise ValueError(f"Row {row} stores an image without a path, which a JSON list cannot hold.")
    return cell.get("text") or "", image or ""
