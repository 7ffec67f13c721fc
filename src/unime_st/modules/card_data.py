"""What a model card is told: never rows of a training set, unless asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, DatasetDict
from sentence_transformers.base.model_card import BaseModelCardData
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from torch import nn

from unime_st.modules.sharded import is_sharded
from unime_st.modules.streams import refuse_dispatched_media, streams_media

_OF_ROWS: dict[str, Any] = {
    "widget": [],
    "usage_examples": None,
    "usage_examples_display": None,
    "similarities": None,
    "label_example_list": [],
}
_OF_DATASETS = ("examples", "examples_table", "_example_columns")


class EncoderCardData(SentenceTransformerModelCardData):
    """Card data of an encoder; rows of its training and evaluation sets stay out of the card and its folder.

    Stock code (6.2) shows texts and images of the training set in the card, and copies images into ``assets/`` beside
    it, which uploads carry along. Here that happens only with ``model.model_card_data.widget_images = True``.

    The Trainer shows card data the data sets and, before the first batch, its arguments, so they are also where a
    stream of images that would be cut to pieces is refused.
    """

    widget_images: bool = False
    _streams_media = False

    def extract_dataset_metadata(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Look at the Trainer's data sets, the training set first."""
        of_earlier = self._streams_media and kwargs.get("dataset_type") != "train"
        self._streams_media = of_earlier or streams_media(dataset)
        return super().extract_dataset_metadata(dataset, *args, **kwargs)

    @property
    def all_hyperparameters(self) -> dict[str, Any]:
        """The Trainer's arguments."""
        return self._all_hyperparameters

    @all_hyperparameters.setter
    def all_hyperparameters(self, settings: dict[str, Any]) -> None:
        if self._streams_media and settings:
            refuse_dispatched_media(settings)
        self._all_hyperparameters = settings

    def set_widget_examples(self, dataset: Any) -> None:
        """Draw examples from data sets whose rows are stored: stock code fails on others, or eats up a stream."""
        named = dataset if isinstance(dataset, Mapping) else {"dataset": dataset}
        stored = {name: rows for name, rows in named.items() if _is_stored(rows)}
        if stored:
            super().set_widget_examples(DatasetDict(stored))

    def run_usage_snippet(self) -> None:
        """Compute the card's example; not by weights that are split, for one process alone writes the card."""
        asked = self.generate_widget_examples
        self.generate_widget_examples = asked and not (isinstance(self.model, nn.Module) and is_sharded(self.model))
        try:
            super().run_usage_snippet()
        finally:
            self.generate_widget_examples = asked

    def to_dict(self) -> dict[str, Any]:
        """Everything the card's template is given, images being written beside it."""
        if self.widget_images:
            return super().to_dict()
        with rows_hidden(self):
            return super().to_dict()


def _is_stored(rows: Any) -> bool:
    return isinstance(rows, Dataset) and rows.format["type"] != "custom"


@contextmanager
def rows_hidden(card: BaseModelCardData) -> Iterator[None]:
    """Within this context card data hold no row of a data set; stock card data too."""
    kept = {name: getattr(card, name) for name in _OF_ROWS if hasattr(card, name)}
    datasets = {name: getattr(card, name) for name in ("train_datasets", "eval_datasets")}
    for name in kept:
        nothing = _OF_ROWS[name]
        setattr(card, name, [] if isinstance(nothing, list) else nothing)
    for name, infos in datasets.items():
        bare = [{key: value for key, value in info.items() if key not in _OF_DATASETS} for info in infos]
        setattr(card, name, bare)
    try:
        yield
    finally:
        for name, value in (kept | datasets).items():
            setattr(card, name, value)
