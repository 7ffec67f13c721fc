"""A CrossEncoder on a multimodal LLM whose saved form is stock, and whose pairs are scored without repetition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from tqdm.auto import tqdm

from unime_st.features import check_finite
from unime_st.files import write_atomically
from unime_st.modules.card_data import rows_hidden
from unime_st.modules.reranker.listwise import ListwiseReranker
from unime_st.modules.reranker.pair_encoder import PairEncoder
from unime_st.modules.reranker.pairs import are_pairs, pair_batches, scoring_order
from unime_st.modules.saved import folder_of, saved_parts, trained_in
from unime_st.modules.sentence_transformer import STOCK_MODULE
from unime_st.modules.speed.batches import passes
from unime_st.modules.speed.prefixes import shares_prefixes
from unime_st.placement import moved
from unime_st.token_budget import CPU_TOKENS

_SETTINGS = ("prompts", "default_prompt_name", "activation_fn")
_OURS = f"{PairEncoder.__module__}.{PairEncoder.__name__}"


class RerankerCardData(CrossEncoderModelCardData):
    """Card data of a reranker; rows of its training set stay out of the card and its folder."""

    def to_dict(self) -> dict[str, Any]:
        """Everything the card's template is given."""
        with rows_hidden(self):
            return super().to_dict()


class MultimodalCrossEncoder(CrossEncoder):
    """A ``CrossEncoder`` on a multimodal LLM: the odds of "yes" against "no" as the next token.

    ``predict`` and ``rank`` give the scores of the stock class in less time: equal pairs are scored once, a query and
    its image are computed once for all of its candidates in a pass, each image once, nothing for padding, and logits of
    the two answers alone. What is saved names stock modules only, so plain ``CrossEncoder(path)`` loads it.
    """

    model_card_data_class = RerankerCardData

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, *_: Any, **__: Any) -> Any:
        """Load a checkpoint for the Trainer with our module."""
        folder = folder_of(model_name_or_path)
        return cls.of_folder(folder, device="cpu", model_kwargs=trained_in(folder))

    @classmethod
    def of_folder(cls, folder: Path, *, device: str | None, **options: Any) -> MultimodalCrossEncoder:
        """Load a saved CrossEncoder, its activation being torch's own or the default."""
        parts = saved_parts(folder, kind=PairEncoder, names=_SETTINGS, **options)
        path = parts.pop("activation_fn")
        model = cls(device=device, **parts)
        if path is not None and (activation := model._resolve_activation_fn(path)) is not None:
            model.activation_fn = activation
        return model

    def listwise(self, **options: Any) -> ListwiseReranker:
        """Ask this model for the best of a list; the options are those of :class:`ListwiseReranker`."""
        return ListwiseReranker(self, **options)

    @torch.inference_mode()
    def _inference(self, inputs: list[Any], **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """What ``predict`` does in one process: each distinct pair once, those of one query side by side."""
        encoder: Any = self[0]
        head: Any = self[-1]
        ours = isinstance(encoder, PairEncoder) and isinstance(head, LogitScore) and len(self) == 2
        if not inputs or not ours or head.false_token_id is None or not are_pairs(inputs):
            return super()._inference(inputs, **kwargs)
        device = self._resolve_inference_device(kwargs.get("device"))
        self.eval()
        order = scoring_order(inputs)
        by_beginning = encoder.share_prefixes and shares_prefixes(encoder.model)
        budget = CPU_TOKENS if device.type == "cpu" else None
        options = {name: value for name, value in kwargs.items() if name not in _PREDICT}
        found = torch.empty(len(order.pairs), dtype=torch.float32)
        bar = tqdm(total=len(order.pairs), desc="Scoring", unit="pair", disable=not kwargs["show_progress_bar"])
        two = encoder.two_tokens_alone(head.true_token_id, head.false_token_id)
        sharing = encoder.prefixes.encoding(last_token_only=True, inference=True)
        with bar, encoder.prefixes.turns, sharing, two as alone:
            frames_of = encoder.frame_counts if encoder.frames_must_agree else None
            for places in pair_batches(order.pairs, kwargs["batch_size"], frames_of):
                batch = [order.pairs[place] for place in places]
                numbers = order.first[places].tolist()
                pairs = [(query.named, document.named) for query, document in batch]
                whole = any(half.shows_video for half in batch[0])  # nobody can tell whose the frames are
                prepared = encoder.preprocess(pairs, kwargs["prompt"], row_numbers=numbers, contents=batch, **options)
                for rows, features, _ in passes(prepared, None if whole else budget, padded=not by_beginning):
                    logits = encoder(moved(features, device), **options)[head.module_input_name][:, -1]
                    answers = logits if alone else logits[:, [head.true_token_id, head.false_token_id]]
                    found[torch.tensor(places)[torch.from_numpy(rows)]] = (answers[:, 0] - answers[:, 1]).float().cpu()
                    bar.update(len(rows))
        scores = check_finite(found[torch.from_numpy(order.index), None], inputs)
        activation = kwargs["activation_fn"]
        return (scores if activation is None else activation(scores)).squeeze(1).to(device)

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Save; see :meth:`sentence_transformers.CrossEncoder.save`."""
        super().save(path, *args, **kwargs)
        listing = Path(path) / "modules.json"
        modules = json.loads(listing.read_text(encoding="utf-8"))
        for module in modules:
            if module["type"] == _OURS:
                module["type"] = STOCK_MODULE
        write_atomically(listing, json.dumps(modules, indent=2))


_PREDICT = frozenset({"prompt", "batch_size", "show_progress_bar", "activation_fn", "apply_softmax", "device"})
