"""Mining hard negatives for a whole training set, with the model as it is now."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features
from sentence_transformers import SentenceTransformer

from unime_st.columns import LABEL_COLUMNS, SUBSET, negative_column
from unime_st.data.embed_once import embed_missing, own_share
from unime_st.data.embedding_store import EmbeddingStore
from unime_st.data.images import ItemReader
from unime_st.data.mining_contents import Contents
from unime_st.data.mining_search import FaissIndex, Forbidden, Nearest, exact_nearest
from unime_st.files import write_atomically
from unime_st.model_identity import model_fingerprint

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_RESULT = "mined.json"
_COUNTS = b"mining_counts"
_EXACT_PAIRS = 2e10  # beyond, an index pays on a CPU
_IMAGE_SIZE = 2000  # characters that an image counts for when inputs are sorted by size


@dataclass(frozen=True)
class _Settings:
    """What decides the result; kept beside it, so that a run goes on with no other's files."""

    num_negatives: int
    margin: float | None
    range_min: int
    range_max: int
    sampling_strategy: str
    seed: int
    too_few: str
    search: str
    rows_per_file: int

    def check(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"`num_negatives={self.num_negatives}`, but at least 1 must be mined.")
        if not 0 <= self.range_min <= self.range_max - self.num_negatives:
            raise ValueError(
                f"`range_min={self.range_min}` and `range_max={self.range_max}` leave too few ranks for "
                f"`num_negatives={self.num_negatives}`. Raise `range_max`, or lower one of the others."
            )
        for name, allowed in (
            ("sampling_strategy", ("top", "random")),
            ("too_few", ("repeat", "drop")),
            ("search", ("exact", "faiss")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}`, but it must be one of {', '.join(allowed)}.")
        if self.rows_per_file < 1:
            raise ValueError(f"`rows_per_file={self.rows_per_file}`, but a file holds at least one row.")


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
) -> Path:
    """Find each row's hardest negatives in the whole set, and write the set with them to parquet files.

    Candidates are all distinct positives and explicit negatives of the set; the columns ``negative_1`` ...
    ``negative_n`` that are written hold mined ones only. What is no negative is told by the same rule as in
    :class:`~unime_st.losses.HardNegativeInfoNCELoss`: a candidate with cos(query, candidate) > cos(query, positive) +
    ``margin``; one with the content of a right answer, which are the positives of all rows with the same query or
    ``label``; and one with the content of the query. Equal candidates count once.

    A run that was killed goes on where it was: embeddings are kept in ``output_dir/embeddings``, each distinct input
    once, and rows in files of ``rows_per_file``, all written whole. Several processes share both.

    sentence-transformers' ``mine_hard_negatives`` is not used for this: it tells equal contents by their text only, its
    margin cannot let candidates above the positive pass (the paper's is positive), it knows no labels, keeps all in
    memory, begins anew after a kill, and returns images decoded. Names of the options are its.

    Args:
        dataset: As :func:`~unime_st.data.load_mmeb_train` makes it, or with inputs stored in its columns.
        model: Embeds queries and targets.
        output_dir: Folder of the result; one for each data set and model.
        num_negatives: ``n``.
        margin: See above; may be negative. None switches the filter by score off.
        range_min: The so many nearest valid candidates are skipped.
        range_max: Candidates are taken from the so many nearest valid ones; None for as many as are needed, or ten
            times as many for "random".
        sampling_strategy: "top" takes the nearest, "random" draws.
        seed: Of "random".
        too_few: What becomes of a row with fewer than ``n`` valid candidates: "repeat" fills up with those it has (the
            loss counts equal ones once), "drop" leaves the row out. A row with none is left out by both.
        by_subset: When there is a column ``subset``, candidates come from the row's own data set.
        search: "exact", or "faiss" for an approximate index (the extra ``ann``); None decides by the size of the set,
            and is exact on a GPU.
        query_prompt: Given to ``model.encode`` for queries.
        corpus_prompt: The same for candidates.
        hash_images: Know images by the content of their files, which reads each once more; False by their paths.
        batch_size: Inputs embedded at a time.
        shard_size: Inputs opened at a time, which make one file of embeddings.
        rows_per_file: Rows mined at a time.
        show_progress_bar: Show how many inputs are embedded.

    Returns:
        ``output_dir``, for :func:`load_mined_negatives`.

    Raises:
        ValueError: When an option is out of range, columns are missing, an embedding is not finite, no row has a
            negative, or ``output_dir`` holds the result of another set, model or other options.

    Example:
        >>> import tempfile, torch
        >>> class Letters(torch.nn.Module):
        ...     def encode(self, texts, **options):
        ...         return np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=np.float32)
        >>> rows = Dataset.from_dict({"anchor": ["a", "b", "c"], "positive": ["aa", "bba", "cb"]})
        >>> folder = mine_hard_negatives(rows, Letters(), tempfile.mkdtemp(), num_negatives=1)
        >>> load_mined_negatives(folder)["negative_1"][:2]
        ['bba', 'cb']
    """
    contents = Contents(dataset, by_subset=by_subset, hash_images=hash_images)
    depth = range_min + num_negatives * (10 if sampling_strategy == "random" else 1)
    device = getattr(model, "device", torch.device("cpu"))
    large = len(contents) * len(contents.target_keys) > _EXACT_PAIRS and torch.device(device).type == "cpu"
    settings = _Settings(
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
    _claim(folder, asdict(settings) | prompts | {"model": model_identity, "data": contents.digest()})
    encoder = _Encoder(
        model, model_identity, contents, folder / "embeddings", batch_size, shard_size, show_progress_bar
    )
    queries = encoder.embed(contents.query_keys, contents.query_cells, query_prompt)
    targets = encoder.embed(
        contents.target_keys, lambda numbers: contents.target_cells(numbers).to_pylist(), corpus_prompt
    )
    miner = _Miner(contents, settings, queries, targets, device)
    files = -(-len(contents) // rows_per_file)
    rank, processes = own_share()
    paths = [folder / f"part-{number:05d}-of-{files:05d}.parquet" for number in range(files)]
    for number, path in enumerate(paths):
        if number % processes == rank and not path.exists():
            _write(path, miner.mine(number))
    _await(paths, lambda number: _write(paths[number], miner.mine(number)))
    return _finish(folder, paths, contents)


def load_mined_negatives(
    output_dir: str | Path, *, image_root: str | Path | None = None, **reader_options: Any
) -> Dataset:
    """Load what :func:`mine_hard_negatives` has written, ready for :class:`~unime_st.losses.HardNegativeInfoNCELoss`.

    Args:
        output_dir: See :func:`mine_hard_negatives`.
        image_root: Folder of the images; None for that of the set that was mined.
        **reader_options: See :class:`~unime_st.data.ItemReader`; those of the set that was mined are not kept.

    Returns:
        The set's rows with the columns ``negative_1`` ... ``negative_n``; images are opened when rows are drawn.

    Raises:
        FileNotFoundError: When there is no finished result.
    """
    folder = Path(output_dir)
    try:
        result = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{str(folder)!r} has no {_RESULT}, so mining has not been there or has not ended. Run "
            "`mine_hard_negatives` with the same arguments again; it goes on where it was."
        ) from error
    tables = [pq.read_table(folder / name) for name in result["files"]]
    dataset = Dataset(pa.concat_tables([table.replace_schema_metadata(_features_only(table)) for table in tables]))
    if result["image_root"] is None:
        return dataset
    return dataset.with_transform(ItemReader(image_root or result["image_root"], **reader_options))


class _Encoder:
    """Embeds the distinct contents of a set, once, into a store."""

    def __init__(
        self,
        model: Any,
        identity: str,
        contents: Contents,
        folder: Path,
        *sizes: Any,
    ) -> None:
        self._model, self._contents, self._folder = model, contents, folder
        self._batch_size, self._shard_size, self._show_progress_bar = sizes
        reader = contents.reader
        self._identity = [identity] + ([reader.max_pixels, reader.image_size] if reader else [])

    def embed(
        self, keys: np.ndarray, cells: Callable[[np.ndarray], list[Any]], prompt: str | None
    ) -> tuple[EmbeddingStore, np.ndarray]:
        """Give the store, and the number in it of each key; NaN stands for a content that cannot be read."""
        name = hashlib.blake2b(json.dumps([*self._identity, prompt]).encode(), digest_size=8).hexdigest()
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        store = EmbeddingStore(self._folder / name)
        missing = np.flatnonzero(store.find(keys) < 0)
        sizes = np.zeros(len(keys), dtype=np.int64)
        for start in range(0, len(missing), self._shard_size):
            part = missing[start : start + self._shard_size]
            sizes[part] = [_size(cell) for cell in cells(part)]
        embed_missing(
            store,
            keys,
            sizes,
            lambda places: self._encode(cells(places), prompt),
            shard_size=self._shard_size,
            description="Mining",
            show_progress_bar=self._show_progress_bar,
        )
        return store, store.find(keys)

    def _encode(self, cells: Sequence[Any], prompt: str | None) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            inputs = list(pool.map(self._read, cells))
        good = np.array([item is not None for item in inputs])
        if not good.any():
            return np.full((len(cells), int(self._model.get_embedding_dimension())), np.nan, dtype=np.float32)
        options = {} if prompt is None else {"prompt": prompt}
        found = self._model.encode(
            [item for item in inputs if item is not None],
            batch_size=self._batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            **options,
        )
        embeddings = np.full((len(cells), found.shape[1]), np.nan, dtype=np.float32)
        embeddings[good] = found
        broken = good & ~np.isfinite(embeddings).all(axis=1)
        if broken.any():
            raise ValueError(
                f"The model's embedding of {cells[int(np.flatnonzero(broken)[0])]!r:.200} is not finite, as are "
                f"{int(broken.sum()) - 1} more of {len(cells)}. Load the model in bfloat16 or float32, or remove the "
                "row."
            )
        return embeddings

    def _read(self, cell: Any) -> Any:
        """Open an input; None when its image is bad and the set's reader puts up with that."""
        reader = self._contents.reader
        try:
            return self._contents.read(cell)
        except (FileNotFoundError, ValueError) as error:
            if (
                reader is None
                or reader.bad_images is None
                or (bad := reader.check(cell["image"], by_opening=True)) is None
            ):
                raise
            reader.report(cell["image"], bad)
            logger.debug("Mining without %s: %s", cell["image"], error)
            return None


class _Miner:
    """Chooses the negatives of a file's rows."""

    def __init__(
        self,
        contents: Contents,
        settings: _Settings,
        queries: tuple[EmbeddingStore, np.ndarray],
        targets: tuple[EmbeddingStore, np.ndarray],
        device: Any,
    ) -> None:
        self._contents, self._settings, self._device = contents, settings, device
        self._queries, self._targets = queries, targets
        self._indexes: dict[int, tuple[np.ndarray, FaissIndex | None]] = {}

    def mine(self, number: int) -> pa.Table:
        """Rows of a file, with their negatives; its counts are in the schema's metadata."""
        settings, contents = self._settings, self._contents
        start = number * settings.rows_per_file
        rows = np.arange(start, min(start + settings.rows_per_file, len(contents)))
        chosen = np.full((len(rows), settings.num_negatives), -1)
        for group in np.unique(contents.groups[rows]).tolist():
            own = np.flatnonzero(contents.groups[rows] == group)
            chosen[own] = self._choose(
                self._nearest(group, rows[own]), np.random.default_rng([settings.seed, number, group])
            )
        found = (chosen >= 0).sum(axis=1)
        keep = found > 0 if settings.too_few == "repeat" else found == settings.num_negatives
        places = np.arange(settings.num_negatives) % np.maximum(found, 1)[:, None]
        filled = np.take_along_axis(chosen, places, 1)[keep]
        counts = {
            "rows": len(rows),
            "kept": int(keep.sum()),
            "filled": int((keep & (found < settings.num_negatives)).sum()),
            "without_negatives": int((found == 0).sum()),
        }
        return self._table(rows[keep], filled, counts)

    def _nearest(self, group: int, rows: np.ndarray) -> Nearest:
        """The nearest valid targets of rows of one data set, by their numbers among all targets."""
        settings, contents = self._settings, self._contents
        if group not in self._indexes:
            numbers = contents.group_targets(group)
            index = (
                FaissIndex(len(numbers), self._targets[0].dimension or 0, self._reader(numbers))
                if settings.search == "faiss"
                else None
            )
            self._indexes[group] = numbers, index
        numbers, index = self._indexes[group]
        queries = self._unit(self._queries, contents.queries[rows]).to(self._device)
        positives = self._unit(self._targets, contents.positives[rows]).to(self._device)
        forbidden = contents.forbidden(rows)
        local = np.searchsorted(numbers, forbidden.candidates).clip(max=len(numbers) - 1)
        here = numbers[local] == forbidden.candidates
        own = Forbidden(forbidden.rows[here], local[here])
        options: dict[str, Any] = {"forbidden": own, "margin": settings.margin, "keep": settings.range_max}
        own_scores = (queries * positives).sum(dim=1)
        if index is not None:
            found = index.nearest(queries.nan_to_num(), own_scores, **options)
        else:
            found = exact_nearest(
                queries, own_scores, num_candidates=len(numbers), read=self._reader(numbers), **options
            )
        unusable = own_scores.isnan().cpu().numpy()[:, None]  # rows whose query or positive cannot be read
        return Nearest(np.where(unusable, -np.inf, found.scores), numbers[found.candidates])

    def _choose(self, nearest: Nearest, generator: np.random.Generator) -> np.ndarray:
        """Take or draw negatives, hardest first; -1 where there are too few. ``(rows, n)``."""
        settings = self._settings
        scores = nearest.scores[:, settings.range_min :]
        targets = np.where(scores > -np.inf, nearest.candidates[:, settings.range_min :], -1)
        if settings.sampling_strategy == "random":
            drawn = np.where(targets >= 0, generator.random(targets.shape), 2.0)
            places = np.sort(np.argsort(drawn, axis=1)[:, : settings.num_negatives], axis=1)
            targets = np.take_along_axis(targets, places, 1)
        short = settings.num_negatives - targets.shape[1]
        targets = np.pad(targets, ((0, 0), (0, max(0, short))), constant_values=-1)
        return targets[:, : settings.num_negatives]

    def _reader(self, numbers: np.ndarray) -> Callable[[np.ndarray], torch.Tensor]:
        return lambda places: self._unit(self._targets, numbers[places])

    @staticmethod
    def _unit(embeddings: tuple[EmbeddingStore, np.ndarray], numbers: np.ndarray) -> torch.Tensor:
        store, places = embeddings
        return torch.nn.functional.normalize(torch.from_numpy(store.rows(places[numbers])), dim=1)

    def _table(self, rows: np.ndarray, negatives: np.ndarray, counts: dict[str, int]) -> pa.Table:
        contents = self._contents
        names = contents.columns
        taken = contents.table.take(pa.array(rows))
        columns: dict[str, Any] = {name: taken.column(name) for name in (names.anchor, str(names.positive))}
        distinct, places = np.unique(negatives, return_inverse=True)
        cells = contents.target_cells(distinct)
        for k in range(self._settings.num_negatives):
            columns[negative_column(k + 1)] = cells.take(pa.array(places.reshape(negatives.shape)[:, k]))
        last = [name for name in (*LABEL_COLUMNS, SUBSET) if name in taken.column_names]
        columns |= {name: taken.column(name) for name in last}
        features = {name: contents.features.get(name, contents.features[str(names.positive)]) for name in columns}
        metadata = Features(features).arrow_schema.metadata or {}
        return pa.table(columns).replace_schema_metadata({**metadata, _COUNTS: json.dumps(counts)})


def _size(cell: Any) -> int:
    """How long an input is, so that inputs of a like length share a batch."""
    if isinstance(cell, str):
        return len(cell)
    text = cell.get("text") if isinstance(cell, dict) else None
    image = not isinstance(cell, dict) or any(value for key, value in cell.items() if key != "text")
    return len(text or "") + _IMAGE_SIZE * image


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Keep what decides the result, or refuse a folder that holds another one."""
    path = folder / _SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=1))
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name)):
        raise ValueError(
            f"{str(folder)!r} holds negatives mined otherwise: {', '.join(differing)} differ. Give another "
            "`output_dir`, or delete that one; its folder `embeddings` may stay if the model is the same."
        )


def _write(path: Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomically(path, buffer.getvalue())


def _await(paths: Sequence[Path], mine: Callable[[int], None], patience: float = 1800.0) -> None:
    """Wait for the files of other processes; mine here what does not come."""
    last, missing = time.monotonic(), [number for number, path in enumerate(paths) if not path.exists()]
    while missing and time.monotonic() - last < patience:
        time.sleep(0.2)
        left = [number for number in missing if not paths[number].exists()]
        if len(left) < len(missing):
            last, missing = time.monotonic(), left
    for number in missing:
        logger.warning("%s has not come from another process; mining it here.", paths[number])
        mine(number)


def _finish(folder: Path, paths: Sequence[Path], contents: Contents) -> Path:
    """Add the counts up, and say that all is there."""
    counts = [json.loads(pq.read_schema(path).metadata[_COUNTS]) for path in paths]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    if not total["kept"]:
        raise ValueError(
            f"None of {total['rows']} rows has a valid negative. Raise `margin` or set it to None, lower `range_min`, "
            "or set `by_subset=False`."
        )
    root = None if contents.reader is None else str(contents.reader.image_root.absolute())
    result = {**total, "image_root": root, "files": [path.name for path in paths]}
    write_atomically(folder / _RESULT, json.dumps(result, indent=1))
    logger.info(
        "Mined negatives for %d of %d rows, %d of them with fewer than asked for and filled up; %d rows had none: %s",
        total["kept"],
        total["rows"],
        total["filled"],
        total["without_negatives"],
        folder,
    )
    return folder


def _features_only(table: pa.Table) -> dict[bytes, bytes]:
    return {key: value for key, value in (table.schema.metadata or {}).items() if key != _COUNTS}
