"""Image-text retrieval in both directions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from datasets import Dataset

from unime_st.arguments import require_number
from unime_st.data.caption_sets import read_caption_dataset, read_karpathy_split, read_paired_folders
from unime_st.data.images import resolve_image
from unime_st.evaluation.base import EmbeddingEvaluator, check_shown, image_item
from unime_st.evaluation.outcomes import TIE_IS_WRONG, TaskOutcomes
from unime_st.evaluation.reranking import Reranking
from unime_st.evaluation.scoring import Ranking, rank_pool
from unime_st.paths import resolve_below

Direction = Literal["text_to_image", "image_to_text"]
DIRECTIONS: tuple[Direction, Direction] = ("text_to_image", "image_to_text")

_KEPT = 10  # number of the best results kept for each query, for galleries
_SHOWN = 5


class ImageTextRetrievalEvaluator(EmbeddingEvaluator):
    """Recall@k of images by their captions and of captions by their image (Flickr30K, COCO, ShareGPT4V, Urban1K).

    A direction is named by its query: ``text_to_image`` searches the image of each caption, ``image_to_text`` *any* of
    the captions of each image. Images and captions of the same content are one candidate; a caption that also belongs
    to another image is right for both. A wrong candidate that scores exactly as well goes first: the published scripts
    leave the order to ``torch.topk``, which promises none.

    Args:
        images: N images: paths, or other inputs that ``encode`` takes.
        captions: The captions of each image, at least one (UniME's protocol: five; COCO's first five). The model gets
            them as ``{"text": caption}``, so that none is taken for the name of a file.
        name: Prefix of the metrics' names.
        ks: Every k of recall@k, at least 1 each.
        shuffle_images_seed: Shuffles the images among the captions. This is a check and not a result: recall must fall
            to :meth:`chance`; if it does not, an answer leaks into the query.
        chunk_size: Number of queries per matrix product.
        **arguments: ``batch_size``, ``prompt``, ``prompt_name``, ``cache_dir``, ``show_progress_bar``, ``write_csv``,
            ``reranker`` and ``rerank_depth`` of :class:`~unime_st.evaluation.base.EmbeddingEvaluator`.

    Attributes:
        rankings: The ranks and the ten best candidates of each query in each direction, from the last call. An image is
            its number in ``images``, a caption its number in ``texts``; equal ones have the number of the first.
        reranked_rankings: The same after reranking, in both directions; empty without a reranker.
        texts: All captions, one after the other.
        image_of: The number of the image of each of ``texts``, shape (captions,).
        primary_metric: ``mean_recall@k`` over both directions, at the smallest k.

    Raises:
        ValueError: If there are no images, an image has no caption, the lengths differ, or a k is below 1.

    Metrics:
        ``text_to_image_recall@k``, ``image_to_text_recall@k`` and ``mean_recall@k`` for each k, all in [0, 1];
        ``text_to_image_ties`` and ``image_to_text_ties``, the number of queries that another order of equal scores
        would make right at one of the k. A warning is logged when there are many. With a reranker all of them again as
        ``reranked_...``, ``rerank_pairs`` and ``rerank_seconds``.

    Example:
        >>> class Brightness:  # stands for a model
        ...     def encode(self, items, **kwargs):
        ...         shown = [item["text"] if isinstance(item, dict) else item.max() for item in items]
        ...         white = [x.startswith("white") if isinstance(x, str) else x > 0 for x in shown]
        ...         return np.array([[is_white, not is_white] for is_white in white])
        >>> black, white = np.zeros((2, 2, 3)), np.ones((2, 2, 3))
        >>> evaluator = ImageTextRetrievalEvaluator([black, white], [["a night"], ["white", "a cloud"]], ks=(1,))
        >>> {name: round(value, 2) for name, value in evaluator(Brightness()).items() if "recall" in name}
        {'text_to_image_recall@1': 0.67, 'image_to_text_recall@1': 0.5, 'mean_recall@1': 0.58}
    """

    def __init__(
        self,
        images: Sequence[Any],
        captions: Sequence[Sequence[str]],
        *,
        name: str = "",
        ks: Sequence[int] = (1, 5, 10),
        shuffle_images_seed: int | None = None,
        chunk_size: int = 1024,
        **arguments: Any,
    ) -> None:
        super().__init__(name=name, **arguments)
        if isinstance(images, str | Path) or isinstance(captions, str):
            raise TypeError("`images` and `captions` are lists. To read a folder there is `from_folder`, among others.")
        if len(images) == 0 or len(images) != len(captions):
            raise ValueError(f"{len(images)} images, but captions for {len(captions)}: give each image its list.")
        for number, own in enumerate(captions):
            if isinstance(own, str) or not isinstance(own, Sequence) or len(own) == 0:
                raise ValueError(f"Image {number} has captions {own!r}: give a list with at least one.")
            if wrong := [caption for caption in own if not isinstance(caption, str)]:
                raise ValueError(f"Image {number} has the caption {wrong[0]!r}: captions are strings.")
        for k in ks:
            require_number("ks", k)
        require_number("chunk_size", chunk_size, least=1)
        if not ks or min(ks) < 1:
            raise ValueError(f"`ks={tuple(ks)}`, but recall@k needs k of at least 1.")
        self.images = list(images)
        if shuffle_images_seed is not None:
            order = np.random.default_rng(shuffle_images_seed).permutation(len(images))
            self.images = [self.images[place] for place in order]
        self.shuffle_images_seed = shuffle_images_seed
        self.ks = tuple(sorted(ks))
        self.chunk_size = chunk_size
        self.texts = [caption for own in captions for caption in own]
        self.image_of = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
        self.primary_metric = f"mean_recall@{self.ks[0]}"
        self.rankings: dict[Direction, Ranking] = {}
        self.reranked_rankings: dict[Direction, Ranking] = {}
        self._right: dict[Direction, list[list[int]]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path, **arguments: Any) -> ImageTextRetrievalEvaluator:
        """Read a folder of images with a ``metadata.jsonl`` beside them, the layout of ``datasets``' ImageFolder.

        Args:
            folder: Folder of the images and ``metadata.jsonl``, whose rows are
                ``{"file_name": "a.jpg", "text": "a caption" or ["several"]}``; rows of the same image add up.
            **arguments: Arguments of the class; ``name`` defaults to the folder's name.

        Returns:
            The evaluator.

        Raises:
            FileNotFoundError: If ``metadata.jsonl`` or an image is missing.
            ValueError: If a row lacks a column or its path leaves the folder.
        """
        folder = Path(folder)
        captions: dict[Path, list[str]] = {}
        with resolve_below(folder, "metadata.jsonl", what="captions").open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    path, text = resolve_image(folder, row["file_name"]), row["text"]
                    own = [text] if isinstance(text, str) else [str(caption) for caption in text]
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f'{folder / "metadata.jsonl"}, line {number}: {error!r}. A line is {{"file_name": "a.jpg", '
                        '"text": "a caption"}.'
                    ) from error
                captions.setdefault(path, []).extend(own)
        return cls(list(captions), list(captions.values()), **{"name": folder.name, **arguments})

    @classmethod
    def from_karpathy_split(
        cls, path: str | Path, image_root: str | Path, **arguments: Any
    ) -> ImageTextRetrievalEvaluator:
        """Read Flickr30K or COCO, see :func:`~unime_st.data.caption_sets.read_karpathy_split`.

        Args:
            path: ``dataset_flickr30k.json`` or ``dataset_coco.json``.
            image_root: Folder of the images.
            **arguments: ``split`` and ``captions_per_image`` of the reader, and arguments of the class.
        """
        reading = {name: arguments.pop(name) for name in ("split", "captions_per_image") if name in arguments}
        return cls(*read_karpathy_split(path, image_root, **reading), **arguments)

    @classmethod
    def from_paired_folders(
        cls, images: str | Path, captions: str | Path, **arguments: Any
    ) -> ImageTextRetrievalEvaluator:
        """Read Urban1K's layout, see :func:`~unime_st.data.caption_sets.read_paired_folders`."""
        return cls(*read_paired_folders(images, captions), **arguments)

    @classmethod
    def from_dataset(cls, dataset: Dataset | str, **arguments: Any) -> Self:
        """Read a data set, given or from the Hub, see :func:`~unime_st.data.caption_sets.read_caption_dataset`.

        Args:
            dataset: A data set, or its name on the Hub.
            **arguments: ``split``, ``image_column``, ``caption_columns``, ``captions_per_image`` and ``image_root`` of
                the reader, and arguments of the class.
        """
        names = ("split", "image_column", "caption_columns", "captions_per_image", "image_root")
        reading = {name: arguments.pop(name) for name in names if name in arguments}
        return cls(*read_caption_dataset(dataset, **reading), **arguments)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that decide the numbers, for the model card."""
        sizes = {"ks": list(self.ks), "images": len(self.images), "captions": len(self.texts)}
        shuffled = {} if self.shuffle_images_seed is None else {"shuffle_images_seed": self.shuffle_images_seed}
        return {**super().get_config_dict(), **sizes, **shuffled}

    def measure(self, model: Any) -> dict[str, float]:
        """Evaluate a model; the metrics, without the evaluator's name."""
        # A bare string that names a file would stand for an image.
        items = [*map(image_item, self.images), *({"text": text} for text in self.texts)]
        embeddings, index, _ = self.encode(model, items, self._where)
        images, image_place = _once(index[: len(self.images)])
        texts, text_place = _once(index[len(self.images) :])
        of_distinct: list[dict[int, None]] = [{} for _ in images]  # an image that occurs twice has the captions of both
        for text, image in enumerate(self.image_of):
            of_distinct[image_place[image]][int(text_place[text])] = None
        captions_of = [list(of_distinct[place]) for place in image_place]
        image_vectors, text_vectors = embeddings[index[images]], embeddings[index[len(self.images) + texts]]
        kept = _KEPT if self.reranker is None else max(_KEPT, self.rerank_depth)
        options: dict[str, Any] = {"k": kept, "chunk_size": self.chunk_size, "device": getattr(model, "device", "cpu")}
        by_text = rank_pool(
            text_vectors[text_place], image_vectors, image_place[self.image_of].reshape(-1, 1).tolist(), **options
        )
        by_image = rank_pool(image_vectors[image_place], text_vectors, captions_of, **options)
        self.rankings = {
            "text_to_image": replace(by_text, best=images[by_text.best], top=images[by_text.top]),
            "image_to_text": replace(by_image, best=texts[by_image.best], top=texts[by_image.top]),
        }
        self._right = {
            "text_to_image": [[int(place)] for place in images[image_place[self.image_of]]],
            "image_to_text": [texts[own].tolist() for own in captions_of],
        }
        self.reranked_rankings = {}
        metrics = self._metrics(self.rankings)
        reranking = self.open_reranking()
        if reranking is None:
            return metrics
        self._rerank(items, reranking)
        return metrics | self.reranked_metrics(self._metrics(self.reranked_rankings), reranking)

    def _rerank(self, items: Sequence[Any], reranking: Reranking) -> None:
        count = len(self.images)
        for direction, ranking in self.rankings.items():
            by_text = direction == "text_to_image"
            queries = np.arange(len(ranking.top)) + (count if by_text else 0)
            top = ranking.top[:, : self.rerank_depth]
            shown = top if by_text else np.where(top >= 0, top + count, -1)

            def where(row: int, place: int, queries: np.ndarray = queries, shown: np.ndarray = shown) -> str:
                return f"{self._where(int(queries[row]))}, against {self._where(int(shown[row, place]))}"

            scores = reranking.scores(items, queries, shown, where)
            self.reranked_rankings[direction] = ranking.reranked(self._right[direction], scores)

    def _where(self, item: int) -> str:
        number = item - len(self.images)
        return f"Image {item}" if number < 0 else f"Caption {number}, of image {self.image_of[number]}"

    @property
    def last_details(self) -> dict[Direction, list[dict[str, Any]]]:
        """The results of each query of the last call.

        Returns:
            A mapping from direction to one entry per query: `query`, its number in ``texts`` or ``images``; `right`,
            the numbers of the right candidates; `rank`, from 1, of the best of them; `top`, the numbers of the best
            five candidates.
        """
        return {
            direction: [
                {"query": query, "right": right, "rank": int(rank) + 1, "top": top[:_SHOWN].tolist()}
                for query, (right, rank, top) in enumerate(
                    zip(self._right[direction], ranking.ranks, ranking.top, strict=True)
                )
            ]
            for direction, ranking in self.rankings.items()
        }

    def top(
        self,
        k: int = _SHOWN,
        direction: Direction = "text_to_image",
        queries: Sequence[int] | None = None,
        *,
        with_right: bool = False,
    ) -> list[dict[str, Any]]:
        """Show the results of the last call, as entries of :meth:`~unime_st.evaluation.Report.add_gallery`.

        Args:
            k: Results per query, at most ten.
            direction: Direction of the search.
            queries: Numbers of captions or images; None takes all.
            with_right: Whether to add the best right answer, with its rank, where no result is right.

        Returns:
            One entry per query: `query`, `results` (each an `image` or a `text`, and whether it is `right`) and `rank`.

        Raises:
            ValueError: If there was no call yet, or ``k`` is out of range.
        """
        check_shown(k, _KEPT)
        if direction not in self.rankings:
            raise ValueError(
                f"Nothing is known of {direction!r}: there are {list(self.rankings)}. Evaluate a model first."
            )
        ranking, right = self.rankings[direction], self._right[direction]
        images = [image["image"] if isinstance(image, dict) and "image" in image else image for image in self.images]
        sources, targets = (self.texts, images)[:: 1 if direction == "text_to_image" else -1]
        kind = "image" if direction == "text_to_image" else "text"
        entries = []
        for query in range(len(right)) if queries is None else queries:
            best = [int(number) for number in ranking.top[query][:k] if number >= 0]
            results = [{kind: targets[number], "right": number in right[query]} for number in best]
            rank = int(ranking.ranks[query]) + 1
            if with_right and not any(result["right"] for result in results):
                results.append({kind: targets[int(ranking.best[query])], "right": True, "rank": rank})
            source = sources[query] if kind == "image" else {"image": sources[query]}
            entries.append({"query": source, "results": results, "rank": rank})
        return entries

    def outcomes(self) -> dict[str, TaskOutcomes]:
        """The recall of each query of the last call at the smallest k, by direction."""
        return self._outcomes(self.rankings)

    def reranked_outcomes(self) -> dict[str, TaskOutcomes]:
        """The same after reranking."""
        return self._outcomes(self.reranked_rankings)

    def _outcomes(self, rankings: Mapping[Direction, Ranking]) -> dict[str, TaskOutcomes]:
        return {
            direction: TaskOutcomes(
                np.arange(len(ranking.ranks)),
                ranking.ranks < self.ks[0],
                ranking.tied_at(self.ks[0]),
                rule=TIE_IS_WRONG,
            )
            for direction, ranking in rankings.items()
        }

    def _metrics(self, rankings: Mapping[Direction, Ranking]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for direction, ranking in rankings.items():
            metrics |= {f"{direction}_recall@{k}": ranking.recall(k) for k in self.ks}
        for k in self.ks:
            metrics[f"mean_recall@{k}"] = sum(metrics[f"{direction}_recall@{k}"] for direction in DIRECTIONS) / 2
        for direction, ranking in rankings.items():
            metrics[f"{direction}_ties"] = int(np.any([ranking.tied_at(k) for k in self.ks], axis=0).sum())
        return metrics

    def chance(self) -> dict[str, float]:
        """Return the recalls of a random order, by the metrics' names without the evaluator's prefix.

        With m right among n candidates, recall@k is 1 - C(n - m, k) / C(n, k). Equal images or captions are counted as
        distinct here.

        Returns:
            The expected recall for each direction and k.
        """
        n_images, n_texts = len(self.images), len(self.texts)
        per_image = np.bincount(self.image_of, minlength=n_images)
        metrics: dict[str, float] = {}
        for k in self.ks:
            to_text = [1 - math.comb(n_texts - int(m), k) / math.comb(n_texts, k) for m in per_image if k <= n_texts]
            metrics[f"text_to_image_recall@{k}"] = min(1.0, k / n_images)
            metrics[f"image_to_text_recall@{k}"] = float(np.mean(to_text)) if to_text else 1.0
        return metrics


def _once(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the first of equal things, and for each thing its place among them."""
    _, first, place = np.unique(index, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[place]
