"""What the evaluators share: encoding through the cache, and files of results."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from unime_st.arguments import require_number
from unime_st.data.judging.scorer import ListScorer, PairScorer
from unime_st.distributed import rank
from unime_st.embedding.cache import EmbeddingCache
from unime_st.embedding.distinct import BrokenItemError, Section, encode_indexed, open_section
from unime_st.embedding.prompts import prompt_options
from unime_st.evaluation.outcomes import TaskOutcomes, told_of_ties, write_outcomes
from unime_st.evaluation.reranking import Reranking, check_reranker, reranker_name, scoring_model
from unime_st.evaluation.settings import model_settings, versions, weights_of
from unime_st.files import write_atomically

logger = logging.getLogger(__name__)


class EmbeddingEvaluator(SentenceEvaluator):
    """An evaluator that encodes each distinct thing once. Subclasses score.

    Args:
        name: Put before the metrics' names and into the file names.
        batch_size: Items a forward pass.
        prompt: Prompt for everything encoded; None leaves it to the model.
        prompt_name: Name of one of the model's prompts.
        cache_dir: Folder of an :class:`~unime_st.evaluation.EmbeddingCache`, or such a cache; None encodes afresh.
        show_progress_bar: Whether to show progress.
        write_csv: Whether to write results when called with an ``output_path``: a row of ``<name>_results.csv`` for
            each call, and the last call's ``<name>_results.json`` and ``<name>_results_rows.parquet`` (with a reranker
            ``<name>_reranked_results_rows.parquet`` too), which hold the settings, see
            :func:`~unime_st.evaluation.read_settings`: their fingerprint is one pass over the weights.
        reranker: Puts each query's best candidates in a new order: a ``CrossEncoder``, of
            :func:`unime_st.load_reranker` or another, or a :class:`~unime_st.ListwiseReranker`, which is asked for all
            of a query at once, in the encoder's order. All scores are then told before and after, as ``<metric>`` and
            ``reranked_<metric>``, with ``rerank_pairs`` (distinct pairs) and ``rerank_seconds``. The primary metric
            stays the encoder's.
        rerank_depth: Candidates of a query that are reranked, at least 2; those behind them stay where they are.
    """

    def __init__(
        self,
        *,
        name: str,
        batch_size: int = 32,
        prompt: str | None = None,
        prompt_name: str | None = None,
        cache_dir: EmbeddingCache | str | Path | None = None,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        reranker: PairScorer | ListScorer | None = None,
        rerank_depth: int = 10,
    ) -> None:
        super().__init__()
        require_number("batch_size", batch_size, least=1)
        require_number("rerank_depth", rerank_depth, least=2)
        if reranker is not None:
            check_reranker(reranker, rerank_depth)
        self.name = name
        self.batch_size = batch_size
        self.prompt = prompt
        self.prompt_name = prompt_name
        self.cache_dir = cache_dir
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.reranker = reranker
        self.rerank_depth = rerank_depth

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that decide the numbers, for the model card."""
        settings = {"batch_size": self.batch_size, "prompt": self.prompt, "prompt_name": self.prompt_name}
        if self.reranker is not None:
            settings |= {"reranker": reranker_name(self.reranker), "rerank_depth": self.rerank_depth}
        return {key: value for key, value in settings.items() if value is not None}

    def settings_of(self, model: Any) -> dict[str, Any]:
        """Return all that decides the numbers of a model, as it is kept beside them."""
        told = {"evaluator": type(self).__name__, **self.get_config_dict()}
        told |= prompt_options(model, prompt_name=self.prompt_name) if self.prompt is None else {}
        told |= model_settings(model)
        if self.reranker is not None:
            told["reranker_weights"] = weights_of(scoring_model(self.reranker))
        return {**told, "versions": versions()}

    def open_reranking(self, prepare: Callable[[Any], Any] | None = None) -> Reranking | None:
        """Make ready to rerank what a call finds; None without a reranker."""
        if self.reranker is None:
            return None
        return Reranking(
            self.reranker,
            batch_size=self.batch_size,
            cache=self.cache_dir,
            settings=self.encoding_settings(),
            prepare=prepare,
            show_progress_bar=self.show_progress_bar,
        )

    @staticmethod
    def reranked_metrics(metrics: Mapping[str, float], reranking: Reranking) -> dict[str, float]:
        """The metrics after reranking under their names, with what it took."""
        named = {f"reranked_{name}": value for name, value in metrics.items()}
        return {**named, "rerank_pairs": reranking.pairs, "rerank_seconds": round(reranking.seconds, 3)}

    def open_cache(self, model: Any) -> Section:
        """Open what is kept of this model's embeddings, in memory without a cache: once for a call's many tasks."""
        settings = self.encoding_settings() or None
        return open_section(model, self.cache_dir, prompt=self.prompt, prompt_name=self.prompt_name, settings=settings)

    def encoding_settings(self) -> dict[str, Any]:
        """Return what else decides the embeddings than model, prompt and content: nothing, unless a subclass says."""
        return {}

    def encode(
        self, model: Any, items: Sequence[Any], where: Callable[[int], str], **options: Any
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Encode items by this evaluator's settings, see :func:`~unime_st.embedding.distinct.encode_indexed`.

        ``where`` says what an item's number is to its users, such as its row, in the error of one that cannot be read.
        """
        try:
            return encode_indexed(
                model,
                items,
                **{"cache": self.cache_dir, **options},
                batch_size=self.batch_size,
                prompt=self.prompt,
                prompt_name=self.prompt_name,
                show_progress_bar=self.show_progress_bar,
            )
        except BrokenItemError as error:
            raise ValueError(f"{where(error.position)}: {error.reason}") from error

    def outcomes(self) -> dict[str, TaskOutcomes]:
        """What each row contributed to the last call's metrics, by task; written beside them, to be compared."""
        raise NotImplementedError

    def reranked_outcomes(self) -> dict[str, TaskOutcomes]:
        """The same after reranking; nothing without a reranker."""
        return {}

    def measure(self, model: Any) -> dict[str, float]:
        """Evaluate a model; the metrics, without the evaluator's name."""
        raise NotImplementedError

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a model, note the metrics for its card, and write them to files below ``output_path``, if any."""
        return self.finish(model, self.measure(model), output_path, epoch, steps)

    def finish(
        self, model: Any, metrics: Mapping[str, float], output_path: str | None, epoch: float, steps: int
    ) -> dict[str, float]:
        """Name the metrics, note them for the model card, and write them to files."""
        named = self.prefix_name_to_metrics(dict(metrics), self.name)
        outcomes = self.outcomes()
        if rank() == 0 and (told := told_of_ties(outcomes)):
            logger.warning("%s: %s", self.name or type(self).__name__, told)
        if hasattr(model, "model_card_data"):
            self.store_metrics_in_model_card_data(model, named, int(epoch), steps)
        if output_path is not None and self.write_csv and rank() == 0:
            stem = f"{self.name or type(self).__name__}_results".replace("/", "-")
            folder = Path(output_path)
            write_atomically(folder / f"{stem}.json", json.dumps(named, indent=2))
            settings = self.settings_of(model)
            write_outcomes(folder / f"{stem}_rows.parquet", outcomes, settings)
            if reranked := self.reranked_outcomes():
                path = folder / f"{stem.removesuffix('_results')}_reranked_results_rows.parquet"
                write_outcomes(path, reranked, settings)
            append_row(folder / f"{stem}.csv", {"epoch": epoch, "steps": steps, **metrics})
        return named


def image_item(image: Any) -> Any:
    """Mark a path or URL as an image, for a bare string is text; other images are given as they are."""
    return {"image": str(image)} if isinstance(image, str | Path) else image


def check_shown(k: int, kept: int) -> None:
    """Refuse to show no results, or more of a query than are kept."""
    require_number("k", k, least=1)
    if k > kept:
        raise ValueError(f"`k={k}`, but of each query the best {kept} are kept.")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file with a header, adding columns it does not have yet. The file is replaced whole."""
    rows: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows.extend(csv.DictReader(file))
    rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
