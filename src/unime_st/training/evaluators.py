"""What held-out pairs are evaluated by: retrieval between images and texts, or of other targets by their queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, SentenceEvaluator

from unime_st.columns import training_columns
from unime_st.data import PairScorer
from unime_st.data.pairs.contents import row_contents
from unime_st.data.pairs.stored import closed_inputs, stored_rows
from unime_st.data.pairs.tokens import kind_of
from unime_st.data.pairs.walk import each_cell
from unime_st.evaluation import ImageTextRetrievalEvaluator

KS = (1, 5, 10)


def pairs_evaluator(
    dataset: Dataset,
    *,
    name: str = "held_out",
    batch_size: int = 16,
    reranker: PairScorer | None = None,
    rerank_depth: int = 10,
) -> SentenceEvaluator:
    """Make the evaluator that fits a set of pairs.

    Where one side has an image in every row and the other is text throughout, it is
    :class:`~unime_st.evaluation.ImageTextRetrievalEvaluator`, in both directions; of other pairs it is the stock
    ``InformationRetrievalEvaluator``, of targets by queries. Either way all rows' targets are the candidates, equal
    contents are one, and all that a query has beside it are right.

    Args:
        dataset: Pairs of :func:`~unime_st.data.load_pairs`, whose images all open.
        name: Put before the metrics' names.
        batch_size: Items a forward pass.
        reranker: Reranks what is found, see :class:`~unime_st.evaluation.ImageTextRetrievalEvaluator`.
        rerank_depth: Candidates of a query that are reranked.

    Raises:
        ValueError: There is a reranker, but the pairs are not of images and texts.

    Example:
        >>> pairs = Dataset.from_dict({"query": ["a", "b"], "target": ["x", "y"]})
        >>> type(pairs_evaluator(pairs)).__name__
        'InformationRetrievalEvaluator'
    """
    stored, reader = stored_rows(dataset)
    columns = training_columns(stored.column_names)
    sides = [columns.anchor, columns.positive or columns.anchor]
    contents = row_contents(stored, reader)
    inputs = [closed_inputs(dataset, side) for side in sides]
    kinds = [{kind_of(cell) for cell in each_cell(stored, side)} for side in sides]
    pictured = [side for side in (0, 1) if kinds[side] <= {"image", "image+text"} and kinds[1 - side] == {"text"}]
    if pictured and not any(isinstance(item.get("image"), list) for item in inputs[pictured[0]]):
        options = {"reranker": reranker, "rerank_depth": rerank_depth, "name": name, "batch_size": batch_size}
        return _captions(inputs, contents, pictured[0], **options)
    if reranker is not None:
        raise ValueError(
            "Reranking needs pairs with an image on one side and a text on the other; these are evaluated by the stock "
            "InformationRetrievalEvaluator, which does not rerank. Leave the reranker out, or make the pairs an "
            "`MMEBTask` for `MMEBEvaluator`."
        )
    corpus = {str(content): item for content, item in zip(contents[:, 1].tolist(), inputs[1], strict=True)}
    queries: dict[str, Any] = {}
    right: dict[str, set[str]] = {}
    for (query, target), item in zip(contents.tolist(), inputs[0], strict=True):
        queries[str(query)] = item
        right.setdefault(str(query), set()).add(str(target))
    ks = [min(k, len(corpus)) for k in KS]
    return InformationRetrievalEvaluator(
        queries,
        corpus,
        right,
        name=name,
        batch_size=batch_size,
        mrr_at_k=[ks[-1]],
        ndcg_at_k=[ks[-1]],
        map_at_k=[ks[-1]],
        accuracy_at_k=list(dict.fromkeys(ks)),
        precision_recall_at_k=list(dict.fromkeys(ks)),
    )


def _captions(
    inputs: Sequence[Sequence[Any]], contents: np.ndarray, pictured: int, **options: Any
) -> ImageTextRetrievalEvaluator:
    """Each image once, with all its captions."""
    images: dict[int, Any] = {}
    captions: dict[int, dict[str, None]] = {}
    for row, own in enumerate(contents[:, pictured].tolist()):
        images.setdefault(own, inputs[pictured][row])
        captions.setdefault(own, {})[inputs[1 - pictured][row]["text"]] = None
    return ImageTextRetrievalEvaluator(list(images.values()), list(map(list, captions.values())), ks=KS, **options)
