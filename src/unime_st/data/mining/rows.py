"""Chooses the negatives of a training set's rows, one file of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features

from unime_st.arguments import require_number
from unime_st.columns import LABEL_COLUMNS, SUBSET, negative_column
from unime_st.data.mining.contents import Contents
from unime_st.embedding.approximate import NearestTargets
from unime_st.embedding.neighbors import DEPTH, Forbidden, Nearest, approximate_nearest, exact_nearest
from unime_st.embedding.store import EmbeddingStore

_TIMES_KEPT = 16
_WITHOUT_FAISS = "`search='faiss'` needs faiss: pip install faiss-cpu (the extra `ann`), or use `search='exact'`."


@dataclass(frozen=True)
class MiningSettings:
    """The settings that decide the result, see :func:`~unime_st.data.mine_hard_negatives`; they are kept beside it."""

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
        """Refuse settings that are out of range."""
        if self.margin is not None:
            require_number("margin", self.margin, above=-math.inf, whole=False)
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


@dataclass
class Miner:
    """Chooses the negatives of a file's rows."""

    contents: Contents
    settings: MiningSettings
    queries: tuple[EmbeddingStore, np.ndarray]  # embeddings, and the number in the store of each distinct query
    targets: tuple[EmbeddingStore, np.ndarray]
    device: Any
    _indexes: dict[int, tuple[np.ndarray, tuple[NearestTargets, torch.Tensor] | None]] = field(default_factory=dict)

    def mine(self, number: int) -> tuple[pa.Table, dict[str, int]]:
        """The rows of a file with their negatives, and the counts of the file."""
        settings, contents = self.settings, self.contents
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
        return self._table(rows[keep], filled), counts

    def _nearest(self, group: int, rows: np.ndarray) -> Nearest:
        """The nearest valid targets of rows of one data set, by their numbers among all targets."""
        settings, contents = self.settings, self.contents
        if group not in self._indexes:
            self._indexes[group] = self._index(contents.group_targets(group))
        numbers, index = self._indexes[group]
        queries = self._unit(self.queries, contents.queries[rows]).to(self.device)
        positives = self._unit(self.targets, contents.positives[rows]).to(self.device)
        forbidden = contents.forbidden(rows)
        local = np.searchsorted(numbers, forbidden.candidates).clip(max=len(numbers) - 1)
        here = numbers[local] == forbidden.candidates
        own = Forbidden(forbidden.rows[here], local[here])
        options: dict[str, Any] = {"forbidden": own, "margin": settings.margin, "keep": settings.range_max}
        own_scores = (queries * positives).sum(dim=1)
        if index is not None:
            found = approximate_nearest(index[0], queries.nan_to_num(), own_scores, usable=index[1], **options)
        else:
            found = exact_nearest(
                queries, own_scores, num_candidates=len(numbers), read=self._reader(numbers), **options
            )
        unusable = own_scores.isnan().cpu().numpy()[:, None]  # for rows whose query or positive cannot be read
        return Nearest(np.where(unusable, -np.inf, found.scores), numbers[found.candidates])

    def _index(self, numbers: np.ndarray) -> tuple[np.ndarray, tuple[NearestTargets, torch.Tensor] | None]:
        """Targets of a data set; with ``search="faiss"`` the index of many, and which of them can be read."""
        few = max(DEPTH, _TIMES_KEPT * self.settings.range_max)  # an index would miss some of so large a share
        if self.settings.search != "faiss" or len(numbers) <= few:
            return numbers, None
        targets = self._reader(numbers)(np.arange(len(numbers)))
        usable = ~targets.isnan().any(dim=1)
        return numbers, (NearestTargets(targets.nan_to_num_(), _WITHOUT_FAISS), usable)

    def _choose(self, nearest: Nearest, generator: np.random.Generator) -> np.ndarray:
        """Take or draw negatives, hardest first, with -1 where there are too few; ``(rows, n)``."""
        settings = self.settings
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
        return lambda places: self._unit(self.targets, numbers[places])

    @staticmethod
    def _unit(embeddings: tuple[EmbeddingStore, np.ndarray], numbers: np.ndarray) -> torch.Tensor:
        store, places = embeddings
        return torch.nn.functional.normalize(torch.from_numpy(store.rows(places[numbers])), dim=1)

    def _table(self, rows: np.ndarray, negatives: np.ndarray) -> pa.Table:
        contents = self.contents
        names = contents.columns
        taken = contents.table.take(pa.array(rows))
        columns: dict[str, Any] = {name: taken.column(name) for name in (names.anchor, str(names.positive))}
        distinct, places = np.unique(negatives, return_inverse=True)
        cells = contents.target_cells(distinct)
        for k in range(self.settings.num_negatives):
            columns[negative_column(k + 1)] = cells.take(pa.array(places.reshape(negatives.shape)[:, k]))
        last = [name for name in (*LABEL_COLUMNS, SUBSET) if name in taken.column_names]
        columns |= {name: taken.column(name) for name in last}
        features = {name: contents.features.get(name, contents.features[str(names.positive)]) for name in columns}
        return pa.table(columns).replace_schema_metadata(Features(features).arrow_schema.metadata)
