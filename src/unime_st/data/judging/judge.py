"""Judges a training set's mined negatives, and keeps those that are good by their scores."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from unime_st.arguments import require_count, require_number
from unime_st.columns import LABEL, LABEL_COLUMNS, NO_CANDIDATE, SUBSET, negative_column, training_columns
from unime_st.data.images import ItemReader, Resolution
from unime_st.data.judging.choose import check_choice, chosen_negatives
from unime_st.data.judging.scorer import PairScorer, scorer_identity, scores_of
from unime_st.data.mining.contents import Contents, refuse_none
from unime_st.data.mining.files import MinedFiles, claim, write_result
from unime_st.data.mining.mine import mine_all, write_table
from unime_st.data.pairs.damage import is_empty
from unime_st.embedding.missing import own_share
from unime_st.embedding.waiting import PATIENCE, Waiting
from unime_st.features import forget_kept_features
from unime_st.files import checksum
from unime_st.identity.content import fingerprint

logger = logging.getLogger(__name__)

_READ_ROWS = 4096


@dataclass(frozen=True)
class JudgingSettings:
    """The settings that decide the result, see :func:`judge_negatives`; they are kept beside it."""

    num_negatives: int
    margin: float
    stride: int
    too_few: str
    rows_per_file: int


def judge_negatives(
    dataset: Dataset,
    judge: PairScorer,
    output_dir: str | Path,
    *,
    num_negatives: int = 10,
    margin: float = 0.01,
    stride: int = 5,
    too_few: Literal["keep", "drop"] = "keep",
    judge_name: str | None = None,
    hash_images: bool = True,
    batch_size: int = 64,
    rows_per_file: int = 64,
    show_progress_bar: bool = True,
    patience: float = PATIENCE,
) -> Path:
    """Score each row's positive and negatives with a judge, keep good negatives, and write them with their scores.

    The pool of negatives comes from :func:`~unime_st.data.mine_hard_negatives`, e.g. the 50 nearest of each query.
    A candidate with a score above score(positive) - ``margin`` is taken for a false negative; of the rest every
    ``stride``-th is kept, coming round until there are ``num_negatives``. A row with fewer keeps what it has, and their
    number is told; one with none is left out. Equal candidates count once, the positive is none.

    Equal pairs are judged once: rows of one query are judged together, so the result has them side by side. A run that
    was killed continues where it was: rows are written in files of ``rows_per_file`` to twice that (one query's in one,
    unless they fill two), whole and with checksums; a damaged one is judged again. Several processes share the files.
    Memory is that of one file's rows, beside a number for each row of the set.

    Args:
        dataset: Rows (anchor, positive, negative_1, ...), as :func:`~unime_st.data.load_mined_negatives` gives them, or
            with inputs stored in its columns.
        judge: Scores pairs: of :func:`unime_st.build_reranker`, or a ``CrossEncoder``.
        output_dir: Folder of the result; one for each data set, judge and settings.
        num_negatives: Negatives kept of each row, ``n``. The paper keeps 10, and trains with 8 of them.
        margin: Beta of the rule above, 0.01 in the paper.
        stride: Every how many-th candidate is kept, 5 in the paper.
        too_few: "keep" keeps rows of fewer than ``n`` negatives, "drop" leaves them out.
        judge_name: What tells the judge from others; None takes a hash of the model.
        hash_images: Identify images by the content of their files; False by their paths. What tells one data set from
            another in ``output_dir`` is their paths in any case: a folder is for images that stay as they are.
        batch_size: Pairs that the judge takes at a time.
        rows_per_file: Rows judged between two files, which is what a kill can cost.
        show_progress_bar: Show how many rows are judged, and the time left.
        patience: Seconds without a new file after which this process does the missing work of another.

    Returns:
        ``output_dir``, for :func:`load_judged_negatives`.

    Raises:
        OSError: When the disk is full.
        TypeError: When ``judge`` has no ``predict``.
        ValueError: When columns are missing, a cell is None, an option or a score is out of range (named by row and
            column), no row keeps a negative, or ``output_dir`` holds the result of another set, judge or settings.

    References:
        UniME-V2, section 3.2: https://arxiv.org/abs/2510.13515. Rows without a valid negative get random ones with a
        score of 1 there, and rows of too few repeat them; here neither is done.
    """
    check_choice(num_negatives, margin, stride, too_few)
    require_count("batch_size", batch_size)
    require_count("rows_per_file", rows_per_file)
    require_number("patience", patience, above=0, whole=False)
    identity = scorer_identity(judge, judge_name)
    settings = JudgingSettings(num_negatives, margin, stride, too_few, rows_per_file)
    rows = _Rows(dataset, hash_images)
    parts = rows.parts(rows_per_file)
    folder = Path(output_dir)
    described = {"judge": identity, "data": rows.digest, "hash_images": hash_images, "images": rows.images}
    claimed = claim(folder, asdict(settings) | described)
    files = MinedFiles(folder, len(parts), claimed)
    rank, processes = own_share()
    left = sum(len(part) for number, part in enumerate(parts)
               if number % processes == rank and not files.is_there(number))  # fmt: skip
    with tqdm(total=left, desc="Judging", unit="row", disable=not show_progress_bar) as bar:

        def judge_part(number: int) -> None:
            forget_kept_features(judge)  # so that a run that goes on gives the same bits
            table, counts = _judged(rows, parts[number], judge, settings, batch_size)
            write_table(files.paths[number], files.stamped(number, table, counts))
            bar.update(len(parts[number]))

        mine_all(files, judge_part, Waiting("Judging", folder, patience))
    return _finish(files, rows, claimed)


class _Rows:
    """A training set's rows in an order that puts those of one query together."""

    def __init__(self, dataset: Dataset, hash_images: bool) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`dataset` is a {type(dataset).__name__}, but judging needs a `datasets.Dataset`.")
        self.dataset, self.hash_images = dataset, hash_images
        self.names = training_columns(dataset.column_names)
        if self.names.positive is None or not self.names.negatives or not len(dataset):
            raise ValueError(
                "Judging needs the columns (anchor, positive, negative_1, ...) and rows, got "
                f"{dataset.column_names} of {len(dataset)} rows. Mine negatives first, by `mine_hard_negatives`."
            )
        self.columns = [self.names.anchor, self.names.positive, *self.names.negatives]
        reader = dataset.format["format_kwargs"].get("transform")
        shown = reader.resolution if isinstance(reader, ItemReader) else Resolution()
        self.images = [shown.max_pixels, shown.image_size]
        """The size in which the judge is shown images."""
        stored = dataset.with_format("arrow")
        first: dict[str, int] = {}
        groups: list[int] = []
        self.digest = ""
        """The hash of all cells, as they are stored."""
        for start in range(0, len(dataset), _READ_ROWS):
            table = stored[start : start + _READ_ROWS]
            for name in self.columns:
                refuse_none(name, table.column(name), first_row=start)
            keys = [
                [fingerprint(cell, read_files=False) for cell in table.column(name).to_pylist()]
                for name in self.columns
            ]
            groups += [first.setdefault(key, len(first)) for key in keys[0]]
            self.digest = checksum(self.digest, *(key for column in keys for key in column))
        self.group = np.array(groups)

    def parts(self, rows_per_file: int) -> list[np.ndarray]:
        """Rows of each file, those of one query side by side, and in one file unless they alone fill two."""
        order = np.argsort(self.group, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(self.group[order]), 1)) + 1  # of groups
        cuts, start = [], 0
        for end in ends.tolist():
            while end - start >= 2 * rows_per_file:
                start += rows_per_file
                cuts.append(start)
            if end - start >= rows_per_file:
                cuts.append(end)
                start = end
        return [part for part in np.split(order, cuts) if len(part)]


def _judged(
    rows: _Rows, part: np.ndarray, judge: PairScorer, settings: JudgingSettings, batch_size: int
) -> tuple[pa.Table, dict[str, int]]:
    """The rows of a file with their chosen negatives and scores, and the counts of the file."""
    chosen_rows = rows.dataset.select(part)
    table = chosen_rows.with_format("arrow")[:]
    contents = Contents(chosen_rows, by_subset=False, hash_images=rows.hash_images)
    targets = contents.all_targets  # (1 + n, rows) numbers of distinct targets, the positive's first
    queries = np.broadcast_to(contents.queries, targets.shape)
    pairs, first, index = np.unique(
        np.stack([queries.ravel(), targets.ravel()]), axis=1, return_index=True, return_inverse=True
    )

    def told(number: int) -> str:
        column, row = divmod(int(first[good[number]]), len(part))
        return f"Row {part[row]}, column {rows.columns[1 + column]!r}"

    cells = contents.query_cells(np.arange(len(contents.query_keys)))
    target_cells = contents.target_cells(np.arange(len(contents.target_keys))).to_pylist()
    for (query, target), number in zip(pairs.T.tolist(), first.tolist(), strict=True):
        column, row = divmod(number, len(part))
        for cell, name in ((cells[query], rows.names.anchor), (target_cells[target], rows.columns[1 + column])):
            if cell is not None and is_empty(cell):  # None: a row of fewer negatives
                raise ValueError(
                    f"Row {part[row]}, column {name!r}: the cell holds neither text nor an image. Leave the row out, "
                    "e.g. with `dataset.filter`, or give it one of them."
                )
    query_inputs, target_inputs = ([contents.read_usable(cell) for cell in own] for own in (cells, target_cells))
    inputs = [(query_inputs[query], target_inputs[target]) for query, target in pairs.T.tolist()]
    good = np.flatnonzero([query is not None and target is not None for query, target in inputs])
    scores = np.full(pairs.shape[1], np.nan, dtype=np.float32)
    if len(good):
        scores[good] = scores_of(judge, [inputs[place] for place in good], batch_size, told)
    return _chosen_table(rows, table, targets, scores[index.reshape(targets.shape)], settings, len(good))


def _chosen_table(  # noqa: PLR0917
    rows: _Rows, table: pa.Table, targets: np.ndarray, scores: np.ndarray, settings: JudgingSettings, judged: int
) -> tuple[pa.Table, dict[str, int]]:
    """Choose by scores ``(1 + n, rows)`` among the targets of each row."""
    n = settings.num_negatives
    places = np.zeros((table.num_rows, n), dtype=np.int64)  # column of the candidate; 0, the positive, for none
    kept_scores = np.full((table.num_rows, 1 + n), NO_CANDIDATE, dtype=np.float32)
    counts = np.zeros(table.num_rows, dtype=np.int64)
    for row in range(table.num_rows):
        _, first = np.unique(targets[:, row], return_index=True)
        own = np.sort(first[first > 0])  # equal candidates once, the positive not at all
        picked = own[chosen_negatives(scores[own, row], float(scores[0, row]), margin=settings.margin,
                                      stride=settings.stride, num_negatives=n)]  # fmt: skip
        counts[row] = len(picked)
        places[row, : len(picked)] = picked
        kept_scores[row, 0] = scores[0, row]
        kept_scores[row, 1 : 1 + len(picked)] = scores[picked, row]
    keep = np.flatnonzero(counts >= (1 if settings.too_few == "keep" else n))
    columns: dict[str, Any] = {name: table.column(name).take(pa.array(keep)) for name in rows.columns[:2]}
    pool = [table.column(name).combine_chunks() for name in rows.columns[1:]]
    every = pa.chunked_array([chunk for column in pool for chunk in getattr(column, "chunks", [column])])
    for k in range(n):
        columns[negative_column(k + 1)] = every.take(pa.array(places[keep, k] * table.num_rows + keep))
    flat = pa.array(kept_scores[keep].ravel(), pa.float32())
    columns[LABEL] = pa.ListArray.from_arrays(pa.array(np.arange(len(keep) + 1) * (1 + n), pa.int32()), flat)
    if SUBSET in table.column_names:
        columns[SUBSET] = table.column(SUBSET).take(pa.array(keep))
    of_positive = rows.dataset.features[rows.columns[1]]
    features = {name: rows.dataset.features.get(name, of_positive) for name in columns if name not in LABEL_COLUMNS}
    features |= {negative_column(k + 1): of_positive for k in range(n)} | {LABEL: List(Value("float32"))}
    schema = Features({name: features[name] for name in columns}).arrow_schema
    told = {
        "rows": table.num_rows,
        "kept": len(keep),
        "too_few": int(((counts > 0) & (counts < n)).sum()),
        "without_negatives": int((counts == 0).sum()),
        "unreadable": int(np.isnan(scores[0]).sum()),
        "pairs": judged,
    }
    return pa.table(columns).replace_schema_metadata(schema.metadata), told


def _finish(files: MinedFiles, rows: _Rows, claimed: str) -> Path:
    total = files.counts()
    if not total["kept"]:
        raise ValueError(
            f"None of {total['rows']} rows keeps a negative. Lower `margin`, mine a larger pool, or see whether the "
            "judge tells right from wrong at all (its scores of positives should be the higher ones)."
        )
    transform = rows.dataset.format["format_kwargs"].get("transform")
    root = getattr(transform, "image_root", None)
    result = {**total, "image_root": None if root is None else str(Path(root).absolute())}
    write_result(files.folder, {**result, "files": [path.name for path in files.paths]}, claimed)
    logger.info(
        "Judged %d pairs; negatives for %d of %d rows, %d of them with fewer than asked for; %d rows had none, the "
        "query or positive of %d could not be read: %s",
        total["pairs"], total["kept"], total["rows"], total["too_few"], total["without_negatives"],
        total["unreadable"], files.folder,
    )  # fmt: skip
    return files.folder
