"""SugarCrepe: whether a model prefers a caption to one that differs in an attribute, object or relation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from unime_st.data.caption_sets import image_below, require_columns, rows_and_folder, undecoded
from unime_st.data.images import resolve_image
from unime_st.evaluation.base import EmbeddingEvaluator, image_item
from unime_st.evaluation.outcomes import TIE_IS_WRONG, TaskOutcomes
from unime_st.evaluation.reranking import Reranking
from unime_st.evaluation.scoring import pair_order, unit_rows
from unime_st.paths import resolve_below

SUGARCREPE_GROUPS: dict[str, tuple[str, ...]] = {
    "Replace": ("replace_att", "replace_obj", "replace_rel"),
    "Swap": ("swap_att", "swap_obj"),
    "Add": ("add_att", "add_obj"),
}
"""The published groups and their sets."""

Triplet = tuple[Any, str, str]


@dataclass(frozen=True)
class PreferenceScores:
    """The outcome of one set."""

    positive: np.ndarray  # (rows,) cosine of image and right caption; after reranking, its place in the order
    negative: np.ndarray  # (rows,) the same of the wrong caption

    @property
    def right(self) -> np.ndarray:
        """Whether the right caption is strictly nearer, since a tie is wrong, (rows,)."""
        return self.positive > self.negative

    @property
    def tied(self) -> np.ndarray:
        """Whether both captions are equally near, (rows,)."""
        return self.positive == self.negative


class SugarCrepeEvaluator(EmbeddingEvaluator):
    """Accuracy of choosing the right one of two captions for an image, by set and group of sets.

    A row is right when cos(image, caption) > cos(image, negative caption); a tie is wrong, as published. Chance is 0.5.
    A group's score is the plain mean of its sets.

    Args:
        sets: Set name -> rows of (image, caption, negative caption). The model gets captions as ``{"text": caption}``,
            so that none is taken for the name of a file.
        groups: Group name -> names of its sets. None means the published Replace, Swap and Add if every set is one of
            theirs (a group is scored over the sets given), else no groups.
        name: Prefix of the metrics' names.
        **arguments: ``batch_size``, ``prompt``, ``prompt_name``, ``cache_dir``, ``show_progress_bar``, ``write_csv``,
            ``reranker`` and ``rerank_depth`` of :class:`~unime_st.evaluation.base.EmbeddingEvaluator`.
            A reranker scores both captions of every image, so its depth changes nothing here.

    Attributes:
        scores: Set name -> :class:`PreferenceScores` of each row, from the last call.
        reranked_scores: The same after reranking, equal scores of the reranker in the order of cosines; empty without
            a reranker.
        primary_metric: ``mean_of_groups_accuracy``, or ``mean_of_sets_accuracy`` without groups.

    Raises:
        ValueError: If there are no sets, a set is empty, a row does not have three cells, or a group names an unknown
            set.

    Metrics:
        ``<set>_accuracy``, ``<group>_accuracy``, ``mean_of_sets_accuracy``, ``mean_of_groups_accuracy`` and ``ties``,
        the number of tied rows. A warning is logged when there are many. With a reranker all of them again as
        ``reranked_...``, ``rerank_pairs`` and ``rerank_seconds``.

    Example:
        >>> class Lengths:  # stands for a model
        ...     def encode(self, items, **kwargs):
        ...         return np.array([[1.0, len(item["text"] if isinstance(item, dict) else item)] for item in items])
        >>> image = np.zeros((3, 3, 3), dtype=np.uint8)
        >>> evaluator = SugarCrepeEvaluator({"swap_att": [(image, "abc", "abcde"), (image, "abcdef", "abc")]})
        >>> evaluator(Lengths())["sugarcrepe_Swap_accuracy"]
        0.5
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Triplet]],
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        name: str = "sugarcrepe",
        **arguments: Any,
    ) -> None:
        super().__init__(name=name, **arguments)
        if not isinstance(sets, Mapping):
            raise TypeError(f"`sets` is a {type(sets).__name__}; give {{name: [(image, caption, negative caption)]}}.")
        if not sets:
            raise ValueError("No sets to evaluate: give at least one, as {name: [(image, caption, negative caption)]}.")
        for set_name, rows in sets.items():
            if len(rows) == 0:
                raise ValueError(f"The set {set_name!r} has no rows. Leave it out.")
            for number, row in enumerate(rows):
                if len(row) != 3:
                    raise ValueError(
                        f"{set_name!r}, row {number}: {len(row)} cells in place of (image, caption, negative)."
                    )
                if wrong := [caption for caption in row[1:] if not isinstance(caption, str)]:
                    raise ValueError(f"{set_name!r}, row {number}: the caption {wrong[0]!r} is no string.")
        self.sets = {set_name: list(rows) for set_name, rows in sets.items()}
        self.groups = self._groups(groups)
        self.primary_metric = "mean_of_groups_accuracy" if self.groups else "mean_of_sets_accuracy"
        self.scores: dict[str, PreferenceScores] = {}
        self.reranked_scores: dict[str, PreferenceScores] = {}

    def _groups(self, groups: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
        if groups is None:
            published = {member for members in SUGARCREPE_GROUPS.values() for member in members}
            if not published.issuperset(self.sets):
                return {}
            scored = {group: [name for name in own if name in self.sets] for group, own in SUGARCREPE_GROUPS.items()}
            return {group: own for group, own in scored.items() if own}
        for group, own in groups.items():
            unknown = [name for name in own if name not in self.sets]
            if unknown or not own:
                raise ValueError(f"Group {group!r} names the sets {unknown or own}; there are {sorted(self.sets)}.")
        return {group: list(own) for group, own in groups.items()}

    @classmethod
    def from_folder(
        cls, folder: str | Path, image_root: str | Path, sets: Sequence[str] | None = None, **arguments: Any
    ) -> SugarCrepeEvaluator:
        """Read the published layout: ``<set>.json`` with ``filename``, ``caption``, ``negative_caption`` in each entry.

        Args:
            folder: Folder of one JSON file per set, a list of entries or a mapping from ids to entries.
            image_root: Folder of the images (COCO val2017).
            sets: Names of the sets; None reads every JSON file.
            **arguments: Arguments of the class.

        Returns:
            The evaluator.

        Raises:
            FileNotFoundError: If a set or an image is missing.
            ValueError: If an entry lacks a field or its path leaves ``image_root``.
        """
        folder = Path(folder)
        names = sorted(path.stem for path in folder.glob("*.json")) if sets is None else sets
        if not names:
            raise FileNotFoundError(f"{folder} holds no <set>.json to evaluate.")
        return cls({name: list(_read_set(folder / f"{name}.json", Path(image_root))) for name in names}, **arguments)

    @classmethod
    def from_datasets(
        cls,
        sets: Mapping[str, Dataset | str],
        *,
        split: str = "test",
        columns: Sequence[str] = ("image", "caption", "negative_caption"),
        image_root: str | Path | None = None,
        **arguments: Any,
    ) -> SugarCrepeEvaluator:
        """Read data sets, in memory or from the Hub, with an image, a right and a wrong caption in each row.

        Args:
            sets: Set name -> rows, or the name of a data set on the Hub (``"owner/name"`` or ``"owner/name:config"``).
            split: Split of the data sets on the Hub.
            columns: Names of image, caption and negative caption.
            image_root: Folder of the images where the first column holds paths, see
                :func:`~unime_st.data.caption_sets.read_caption_dataset`.
            **arguments: Arguments of the class.

        Returns:
            The evaluator.

        Raises:
            FileNotFoundError: If an image is missing.
            ValueError: If a column is missing, or a path leads out of ``image_root``.
        """
        read = {}
        for name, given in sets.items():
            path, _, config = given.partition(":") if isinstance(given, str) else (given, "", "")
            rows, folder = rows_and_folder(path, split, image_root, config)
            require_columns(rows, columns)
            cells = zip(*(undecoded(rows, columns[0])[column] for column in columns), strict=True)
            read[name] = [
                ({"image": image_below(image, folder, f"{name}, row {number}")}, right, wrong)
                for number, (image, right, wrong) in enumerate(cells)
            ]
        return cls(read, **arguments)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that decide the numbers, for the model card."""
        rows = {set_name: len(rows) for set_name, rows in self.sets.items()}
        return {**super().get_config_dict(), "rows": rows, "groups": self.groups}

    def measure(self, model: Any) -> dict[str, float]:
        """Evaluate a model; the metrics, without the evaluator's name."""
        cells = [
            cell
            for rows in self.sets.values()
            for image, *captions in rows
            for cell in (image_item(image), *({"text": caption} for caption in captions))
        ]
        embeddings, index, _ = self.encode(model, cells, self._where)
        vectors, same = unit_rows(embeddings)
        unit = vectors.numpy()
        places = same[index].reshape(-1, 3)  # image, caption, negative caption
        start = 0
        for set_name, rows in self.sets.items():
            image, right, wrong = places[start : start + len(rows)].T
            positive, negative = ((unit[image] * unit[caption]).sum(axis=1) for caption in (right, wrong))
            self.scores[set_name] = PreferenceScores(positive, negative)
            start += len(rows)
        self.reranked_scores = {}
        metrics = self._metrics(self.scores)
        reranking = self.open_reranking()
        if reranking is None:
            return metrics
        self._rerank(cells, reranking)
        return metrics | self.reranked_metrics(self._metrics(self.reranked_scores), reranking)

    def _rerank(self, cells: Sequence[Any], reranking: Reranking) -> None:
        places = np.arange(len(cells)).reshape(-1, 3)
        start = 0
        for name, cosines in self.scores.items():
            own = places[start : start + len(cosines.positive)]
            wrong_first = cosines.negative >= cosines.positive  # a list must not tell by its order which is right
            shown = np.where(wrong_first[:, None], own[:, :0:-1], own[:, 1:])

            def where(row: int, place: int, shown: np.ndarray = shown) -> str:
                return self._where(int(shown[row, place]))

            scores = reranking.scores(cells, own[:, 0], shown, where)
            scores = np.where(wrong_first[:, None], scores[:, ::-1], scores)
            order = pair_order(scores, np.stack([cosines.positive, cosines.negative], axis=1))
            self.reranked_scores[name] = PreferenceScores(order[:, 0], order[:, 1])
            start += len(own)

    def _where(self, item: int) -> str:
        row, cell = divmod(item, 3)
        for set_name, rows in self.sets.items():
            if row < len(rows):
                return f"{set_name!r}, row {row}, {('image', 'caption', 'negative caption')[cell]}"
            row -= len(rows)
        raise IndexError(item)

    def outcomes(self) -> dict[str, TaskOutcomes]:
        """Whether each row of the last call is right, by set."""
        return _outcomes(self.scores)

    def reranked_outcomes(self) -> dict[str, TaskOutcomes]:
        """The same after reranking."""
        return _outcomes(self.reranked_scores)

    def _metrics(self, scored: Mapping[str, PreferenceScores]) -> dict[str, float]:
        by_set = {name: float(scores.right.mean()) for name, scores in scored.items()}
        by_group = {group: float(np.mean([by_set[name] for name in own])) for group, own in self.groups.items()}
        metrics = {f"{name}_accuracy": value for name, value in {**by_set, **by_group}.items()}
        metrics["mean_of_sets_accuracy"] = float(np.mean(list(by_set.values())))
        if by_group:
            metrics["mean_of_groups_accuracy"] = float(np.mean(list(by_group.values())))
        metrics["ties"] = int(sum(scores.tied.sum() for scores in scored.values()))
        return metrics


def _outcomes(scored: Mapping[str, PreferenceScores]) -> dict[str, TaskOutcomes]:
    return {
        name: TaskOutcomes(np.arange(len(scores.right)), scores.right, scores.tied, rule=TIE_IS_WRONG)
        for name, scores in scored.items()
    }


def _read_set(path: Path, image_root: Path) -> list[Triplet]:
    try:
        entries = json.loads(resolve_below(path.parent, path.name, what="set").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}). Download it again.") from error
    if not isinstance(entries, dict | list):
        raise ValueError(  # noqa: TRY004 (of a file)
            f"{path} holds {entries!r:.50} in place of a list of entries, or a mapping from ids to them."
        )
    rows: list[Triplet] = []
    for number, entry in enumerate(entries.values() if isinstance(entries, dict) else entries):
        try:
            image = resolve_image(image_root, entry["filename"])
            rows.append((image, entry["caption"], entry["negative_caption"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, entry {number}: {error!r}.") from error
    return rows
