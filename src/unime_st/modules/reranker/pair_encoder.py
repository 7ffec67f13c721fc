"""The multimodal LLM with its head, which reads a query and a candidate together and answers yes or no."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from sentence_transformers.base.modules.transformer import TransformerTask
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForMultimodalLM

from unime_st.identity.content import Content
from unime_st.modules.inputs import Message
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.modules.reranker.lists import list_messages
from unime_st.modules.reranker.pairs import are_pairs, pair_messages
from unime_st.modules.speed.prefixes import shares_prefixes
from unime_st.modules.speed.token_tree import PREFIX_KEY


class PairEncoder(MultimodalEncoder):
    """Stock ``Transformer`` with a language-model head, whose inputs are pairs; see :class:`MultimodalEncoder`.

    It saves and loads as a stock module. A pair is rendered by the template as one message of role ``query`` and one of
    role ``document``. A text too long loses its last tokens, the candidate's first, never the template's words.
    """

    task: ClassVar[TransformerTask] = "any-to-any"
    auto_class: ClassVar[Any] = AutoModelForMultimodalLM

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **{"transformer_task": self.task, **kwargs})

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Any = None,
        row_numbers: Sequence[int] | None = None,
        contents: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Turn pairs into features; see :meth:`MultimodalEncoder.preprocess`.

        Args:
            inputs: B pairs (query, candidate), each a text, an image, a video or ``{"image", "video", "text"}``.
            prompt: a system message for all pairs.
            processing_kwargs: as in the stock module.
            row_numbers: the caller's numbers of the pairs, for errors; None counts from 0.
            contents: what the halves of each pair say, where that is known; it makes ``prefix_key``.
            **kwargs: arguments of the stock module; ``max_length`` bounds the tokens of a pair.

        Returns:
            The stock features, and ``prefix_key`` (B, T) if ``contents`` are given and beginnings can be shared.

        Raises:
            ValueError: a half holds nothing, its text spells a media token, its media alone are longer than the limit,
                the template drops an image, or the processor refuses a pair; the pair and the half are named.
        """
        if not len(inputs):
            return {}
        if not are_pairs(inputs):
            return super().preprocess(inputs, prompt, processing_kwargs, row_numbers, **kwargs)
        rows = range(len(inputs)) if row_numbers is None else row_numbers
        opened: dict[Any, Any] = {}
        asked_for = {"allow_remote_images": self.allow_remote_images, "video_settings": self.videos}
        messages = [pair_messages(pair, row, opened, **asked_for) for row, pair in zip(rows, inputs, strict=True)]
        features = self._features(messages, rows, prompt, processing_kwargs, **kwargs)
        self._refuse_lost_images(features["input_ids"], messages, rows)
        if contents is not None and self.share_prefixes and shares_prefixes(self.model):
            features[PREFIX_KEY] = self._pair_keys(features["input_ids"], contents)
        return features

    def preprocess_lists(
        self,
        lists: Sequence[tuple[Any, Sequence[Any]]],
        answers: Sequence[str],
        *,
        template: str,
        prompt: str | None = None,
        logits_to_keep: int = 1,
        row_numbers: Sequence[int] | None = None,
        contents: Sequence[Sequence[Content]] | None = None,
    ) -> dict[str, Any]:
        """Turn lists of candidates into features, each with the answer or its beginning behind the opened turn.

        Args:
            lists: B times a query and its candidates, each as in :meth:`preprocess`.
            answers: B texts.
            template: of :func:`unime_st.rerank_prompts.list_template`.
            prompt: a system message for all lists.
            logits_to_keep: of how many last tokens the model is to compute logits.
            row_numbers: the caller's numbers of the lists, for errors; None counts from 0.
            contents: what the query and the candidates of each list say, where that is known; it makes ``prefix_key``.

        Returns:
            The stock features, and ``prefix_key`` (B, T) if ``contents`` are given and beginnings can be shared.

        Raises:
            ValueError: as :meth:`preprocess`; the list and the candidate are named.
        """
        rows = range(len(lists)) if row_numbers is None else row_numbers
        opened: dict[Any, Any] = {}
        asked_for = {"allow_remote_images": self.allow_remote_images, "video_settings": self.videos}
        messages = [list_messages(asked, row, opened, **asked_for) for row, asked in zip(rows, lists, strict=True)]
        for message, answer in zip(messages, answers, strict=True):
            message.append({"role": "answer", "content": [{"type": "text", "text": answer}]})
        processing = {"chat_template": {"chat_template": template}, "text": {"logits_to_keep": logits_to_keep}}
        features = self._features(messages, rows, prompt, processing)
        self._refuse_lost_images(features["input_ids"], messages, rows, "List")
        if contents is not None and self.share_prefixes and shares_prefixes(self.model):
            features[PREFIX_KEY] = self._pair_keys(features["input_ids"], contents)
        return features

    def _refuse_lost_images(
        self, ids: Tensor, messages: Sequence[Sequence[Message]], rows: Sequence[int], kind: str = "Pair"
    ) -> None:
        """Refuse a pair or list with fewer tokens of images than it has images: the template has dropped one."""
        found = torch.isin(ids, torch.tensor(self._media_token_ids(), dtype=ids.dtype)).sum(dim=1).tolist()
        for row, message, tokens in zip(rows, messages, found, strict=True):
            images = sum(part["type"] == "image" for half in message for part in half["content"])
            if tokens < images:
                raise ValueError(
                    f"{kind} {row} shows {images} image(s), but the chat template leaves {tokens} token(s) for them: "
                    "it drops an image. Give a template that renders the images of the roles 'query' and 'document'."
                )

    def _pair_keys(self, ids: Tensor, contents: Sequence[Sequence[Content]]) -> Tensor:
        """What each token is, (B, T): its number, or for an image's tokens a number drawn from that image.

        Where runs of image tokens are not one an image, all of a row's are drawn from all of its images, so that less
        is shared. A row's number of images counts, too, for in some families images alone are cut into tiles.
        """
        keys = ids.clone()
        is_medium = torch.isin(ids, torch.tensor(self._media_token_ids(), dtype=ids.dtype)).numpy()
        for row, halves in enumerate(contents):
            media = [medium for half in halves for medium in half.media]
            if not media:
                continue
            here = is_medium[row]
            starts = here & ~np.concatenate([[False], here[:-1]])
            run = np.where(here, np.cumsum(starts) - 1, -1)
            said = media if int(starts.sum()) == len(media) else [b"".join(media)] * int(starts.sum())
            for number, medium in enumerate(said):
                digest = hashlib.blake2b(medium, digest_size=8, salt=len(media).to_bytes(2)).digest()
                keys[row, torch.from_numpy(run == number)] = -1 - (int.from_bytes(digest, "big") >> 1)
        return keys

    @contextmanager
    def two_tokens_alone(self, true_token_id: int, false_token_id: int) -> Iterator[bool]:
        """Within this context the head computes two columns of its logits, in this order; yields whether it does."""
        head: Any = self.model.get_output_embeddings()
        if not _is_plain(head):  # adapted, or wrapped: all columns then
            yield False
            return
        chosen = torch.tensor([true_token_id, false_token_id], device=head.weight.device)
        weight = head.weight.index_select(0, chosen)
        bias = None if head.bias is None else head.bias.index_select(0, chosen)
        head.forward = lambda states: linear(states, weight, bias)
        try:
            yield True
        finally:
            del head.forward


def _is_plain(head: Any) -> bool:
    hooked = bool(head._forward_hooks or head._forward_pre_hooks)  # mteb's wrapper reads columns of the whole
    return type(head) is nn.Linear and "forward" not in vars(head) and not hooked
