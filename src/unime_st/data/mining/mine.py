"""Mines hard negatives for a whole training set, with the model as it is now."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from unime_st.arguments import require_count, require_number
from unime_st.columns import SUBSET, without_subset
from unime_st.data.images import ItemReader
from unime_st.data.mining.contents import Contents
from unime_st.data.mining.encoder import MiningEncoder
from unime_st.data.mining.files import MinedFiles, claim, read_mined, read_result, write_result
from unime_st.data.mining.rows import Miner, MiningSettings
from unime_st.embedding.full_disk import explained_full_disk
from unime_st.embedding.missing import own_share
from unime_st.embedding.waiting import PATIENCE, Waiting
from unime_st.files import write_atomically
from unime_st.identity.model import model_fingerprint

logger = logging.getLogger(__name__)

_EXACT_PAIRS = 2e10  # beyond this number of pairs an index pays off on a CPU


def mine_hard_negatives(
    dataset: Dataset,
    model: SentenceTransformer,
    output_dir: str | Path,
    *,
    num_negatives: int = 8,
    margin: float | None = 0.1,
    range_min: int = 0,
    range_max: int | None = None,
    sampling_strategy: Literal["top", "random"] = "top",
    seed: int = 0,
    too_few: Literal["repeat", "drop"] = "repeat",
    by_subset: bool = True,
    search: Literal["exact", "faiss"] | None = None,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    hash_images: bool = True,
    batch_size: int = 32,
    shard_size: int = 1024,
    rows_per_file: int = 4096,
    show_progress_bar: bool = False,
    patience: float = PATIENCE,
) -> Path:
    """Find each row's hardest negatives in the whole set, and write the set with them to parquet files.

    Candidates are all distinct positives and explicit negatives of the set; the columns ``negative_1`` ...
    ``negative_n`` that are written hold mined ones only. The same rule as in
    :class:`~unime_st.losses.HardNegativeInfoNCELoss` excludes a candidate with cos(query, candidate) >
    cos(query, positive) + ``margin``; one with the content of a right answer, that is, of a positive of any row with
    the same query or ``label``; and one with the content of the query. Equal candidates count once.

    A run that was killed continues where it was: embeddings are kept in ``output_dir/embeddings``, each distinct input
    once, and rows in files of ``rows_per_file``, all written whole and with checksums; a damaged file of rows is mined
    again. Several processes share both.

    The options have the names of sentence-transformers' ``mine_hard_negatives``, which cannot do this work: inputs are
    keys of a dictionary there, so ``{"image", "text"}`` fails; it does not know labels; it measures the margin from the
    lowest of a query's positives, and not from the row's own; and it writes its cache in one piece at the end, under
    the name of the base model, so that a model trained further would get the former embeddings.

    Args:
        dataset: A data set made by :func:`~unime_st.data.load_mmeb_train`, or one with inputs stored in its columns.
        model: Embeds queries and targets.
        output_dir: Folder of the result; one for each data set and model.
        num_negatives: Number of negatives per row, ``n``.
        margin: The margin of the rule above, which may be negative. None switches the filter by score off.
        range_min: Number of the nearest valid candidates that are skipped.
        range_max: Number of the nearest valid candidates to take negatives from; None for as many as are needed, or
            ten times as many for "random".
        sampling_strategy: "top" takes the nearest candidates, "random" draws among them.
        seed: Seed of "random".
        too_few: How to treat a row with fewer than ``n`` valid candidates: "repeat" repeats those it has (the loss
            counts equal ones once), "drop" leaves the row out. Both leave out a row without any.
        by_subset: When there is a column ``subset``, candidates come from the row's own data set.
        search: "exact", or "faiss" for an approximate index (the extra ``ann``); None decides by the size of the set,
            and is exact on a GPU.
        query_prompt: The prompt that ``model.encode`` gets for queries.
        corpus_prompt: The prompt that ``model.encode`` gets for candidates.
        hash_images: Identify images by the content of their files, which reads each once more; False by their paths.
        batch_size: Inputs embedded at a time.
        shard_size: Inputs opened at a time, which make one file of embeddings.
        rows_per_file: Rows mined at a time.
        show_progress_bar: Show how many inputs are embedded.
        patience: Seconds without a new file after which this process does the missing work of another; the log says so.

    Returns:
        ``output_dir``, for :func:`load_mined_negatives`.

    Raises:
        OSError: When the disk is full.
        TypeError: When a size or the margin is no number.
        ValueError: When an option is out of range, columns are missing, a query or positive is None, an embedding is
            not finite, no row has a negative, ``output_dir`` holds the result of another set, model or other options,
            or embeddings there are damaged, naming the file.

    Example:
        >>> import numpy as np, tempfile, torch
        >>> class Letters(torch.nn.Module):
        ...     def encode(self, texts, **options):
        ...         return np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=np.float32)
        >>> rows = Dataset.from_dict({"anchor": ["a", "b", "c"], "positive": ["aa", "bba", "cb"]})
        >>> folder = mine_hard_negatives(rows, Letters(), tempfile.mkdtemp(), num_negatives=1)
        >>> load_mined_negatives(folder)["negative_1"][:2]
        ['bba', 'cb']
    """
    for name, size in (("batch_size", batch_size), ("shard_size", shard_size)):
        require_count(name, size)
    for name, size in (("num_negatives", num_negatives), ("range_min", range_min), ("rows_per_file", rows_per_file)):
        require_count(name, size, least=-(2**63))  # MiningSettings checks how large they are
    require_number("patience", patience, above=0, whole=False)
    contents = Contents(dataset, by_subset=by_subset, hash_images=hash_images)
    depth = range_min + num_negatives * (10 if sampling_strategy == "random" else 1)
    device = getattr(model, "device", torch.device("cpu"))
    large = len(contents) * len(contents.target_keys) > _EXACT_PAIRS and torch.device(device).type == "cpu"
    settings = MiningSettings(
        num_negatives,
        margin,
        range_min,
        depth if range_max is None else range_max,
        sampling_strategy,
        seed,
        too_few,
        search or ("faiss" if large else "exact"),
        rows_per_file,
    )
    settings.check()
    folder = Path(output_dir)
    model_identity = model_fingerprint(model)
    prompts = {"query_prompt": query_prompt, "corpus_prompt": corpus_prompt}
    reader = contents.reader
    images = None if reader is None else [reader.resolution.max_pixels, reader.resolution.image_size]
    identity = {"model": model_identity, "data": contents.digest(), "images": images}
    claimed = claim(folder, asdict(settings) | prompts | identity)
    encoder = MiningEncoder(
        model=model,
        identity=model_identity,
        contents=contents,
        folder=folder / "embeddings",
        batch_size=batch_size,
        shard_size=shard_size,
        show_progress_bar=show_progress_bar,
        patience=patience,
    )
    queries = encoder.embed(contents.query_keys, contents.query_cells, query_prompt)
    targets = encoder.embed(
        contents.target_keys, lambda numbers: contents.target_cells(numbers).to_pylist(), corpus_prompt
    )
    miner = Miner(contents, settings, queries, targets, device)
    files = MinedFiles(folder, -(-len(contents) // rows_per_file), claimed)

    def mine(number: int) -> None:
        write_table(files.paths[number], files.stamped(number, *miner.mine(number)))

    mine_all(files, mine, Waiting("Mining", folder, patience))
    return _finish(files, contents, claimed)


def load_mined_negatives(
    output_dir: str | Path, *, image_root: str | Path | None = None, **reader_options: Any
) -> Dataset:
    """Load the result of :func:`mine_hard_negatives`, ready for :class:`~unime_st.losses.HardNegativeInfoNCELoss`.

    Args:
        output_dir: See :func:`mine_hard_negatives`.
        image_root: Folder of the images; None for the folder of the set that was mined.
        **reader_options: See :class:`~unime_st.data.ItemReader`; the options of the set that was mined are not kept.

    Returns:
        The set's rows with the columns ``negative_1`` ... ``negative_n``; images are opened when rows are drawn.

    Raises:
        FileNotFoundError: When there is no finished result.
        ValueError: When a file is damaged, naming it.
    """
    folder = Path(output_dir)
    result = read_result(folder)
    try:
        tables = [read_mined(folder / name, result["settings"]) for name in result["files"]]
    except ValueError as error:
        raise ValueError(
            f"{error} Run `mine_hard_negatives` with the same arguments again: it mines that file anew."
        ) from error
    dataset = Dataset(pa.concat_tables(tables))
    if result["image_root"] is None:
        return dataset.with_transform(without_subset) if SUBSET in dataset.column_names else dataset
    return dataset.with_transform(ItemReader(image_root or result["image_root"], **reader_options))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with explained_full_disk(path.parent):
        write_atomically(path, buffer.getvalue())


def mine_all(files: MinedFiles, mine: Callable[[int], None], waiting: Waiting) -> None:
    """Mine this process's files, wait for those of others, and mine here those that do not come."""
    rank, processes = own_share()
    numbers = range(len(files.paths))
    for number in numbers:
        if number % processes == rank and not files.is_there(number):
            mine(number)
    missing = [number for number in numbers if not files.is_there(number)]

    def owed() -> tuple[set[int], str]:
        return {number % processes for number in missing}, f"{len(missing)} files of rows"

    while missing and waiting.goes_on(*owed()):
        left = [number for number in missing if not files.is_there(number)]
        if len(left) < len(missing):
            waiting.news()
            missing = left
    if missing:
        waiting.give_up(*owed())
    for number in missing:
        mine(number)


def _finish(files: MinedFiles, contents: Contents, claimed: str) -> Path:
    folder, total = files.folder, files.counts()
    if not total["kept"]:
        raise ValueError(
            f"None of {total['rows']} rows has a valid negative. Raise `margin` or set it to None, lower `range_min`, "
            "or set `by_subset=False`."
        )
    images = None if contents.reader is None else contents.reader.image_root
    root = None if images is None else str(images.absolute())
    write_result(folder, {**total, "image_root": root, "files": [path.name for path in files.paths]}, claimed)
    logger.info(
        "Mined negatives for %d of %d rows, %d of them with fewer than asked for and filled up; %d rows had none: %s",
        total["kept"],
        total["rows"],
        total["filled"],
        total["without_negatives"],
        folder,
    )
    return folder
