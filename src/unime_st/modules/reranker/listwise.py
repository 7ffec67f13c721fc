"""The listwise form of a reranker: one prompt holds a query and its candidates, the answer is the best one's number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from tqdm.auto import tqdm

from unime_st.arguments import require_count, require_number
from unime_st.identity.content import Content
from unime_st.modules.inputs import contents_of
from unime_st.modules.reranker.lists import check_list_template, find_numbers
from unime_st.modules.reranker.pair_encoder import PairEncoder
from unime_st.modules.speed.batches import passes
from unime_st.modules.speed.prefixes import shares_prefixes
from unime_st.placement import moved
from unime_st.rerank_prompts import LIST_PROMPTS, ListPrompt, list_template
from unime_st.token_budget import CPU_TOKENS

_NOT_ASKED = -100  # what torch's cross-entropy leaves out

Replaces = Literal["first", "all"]


class ListwiseReranker:
    """Asks a reranker for the best of a list: a candidate's score is the probability that the answer is its number.

    Nothing is generated. After the fixed beginning of the answer, "Ans: (", the probability of each number is read:
    that of its next token, or the product of two where a tokenizer writes "10" digit by digit. There "1" counts only if
    ")" follows it, for it begins "10". The scores of a list sum up to at most 1, and to less where the model would say
    something else. They depend on the order of the candidates, and mean nothing beyond their list.

    Evaluators take it as ``reranker``, in the place of a ``CrossEncoder``. The model stays what it is, a pairwise
    reranker that saves as a stock ``CrossEncoder``; :class:`~unime_st.losses.PairAndListLoss` trains it for both.

    Args:
        model: a reranker of :func:`~unime_st.build_reranker` or :func:`~unime_st.load_reranker`.
        prompt: a name of :data:`unime_st.rerank_prompts.LIST_PROMPTS`, or words of your own.
        template: a Jinja chat template that renders a user's turn; None takes the model's own. The words are put around
            it. :func:`~unime_st.rerank_prompts.plain_template` has the families' turns.
        max_candidates: candidates of a list at the most, up to 99. The published code asks for the best of 10; it is
            trained on fewer.
        replaces: what evaluators do with the scores: "first" puts the best candidate first and leaves the others in
            their order, as the published code does; "all" orders all of the list by them.

    Raises:
        TypeError: ``model`` is no multimodal reranker.
        ValueError: an option is out of range, the template drops or moves something, or a number has no tokens of its
            own.

    References:
        UniME-V2, section 3.4: https://arxiv.org/abs/2510.13515, whose code generates the answer and parses it.
    """

    def __init__(
        self,
        model: CrossEncoder,
        *,
        prompt: str | ListPrompt = "unime_v2",
        template: str | None = None,
        max_candidates: int = 10,
        replaces: Replaces = "first",
    ) -> None:
        encoder: Any = model[0] if isinstance(model, CrossEncoder) else None
        if not isinstance(encoder, PairEncoder) or not isinstance(model[-1], LogitScore):
            raise TypeError(
                f"`model` is a {type(model).__name__}, but listwise reranking needs a multimodal LLM with its head, of "
                "`build_reranker` or `load_reranker`."
            )
        require_number("max_candidates", max_candidates, least=2)
        if max_candidates > 99:
            raise ValueError(f"`max_candidates={max_candidates}`, but numbers of more than two digits are not read.")
        if replaces not in get_args(Replaces):
            raise ValueError(f"`replaces={replaces!r}`, but it must be 'first' or 'all'.")
        self.model, self.prompt = model, list_prompt(prompt)
        self.max_candidates, self.replaces = max_candidates, replaces
        self.template = list_template(self.prompt, template or encoder.processor.chat_template)
        check_list_template(encoder, self.template, self.prompt)
        self._numbers = find_numbers(encoder, self.template, self.prompt, max_candidates)

    @torch.inference_mode()
    def predict_lists(
        self, lists: Sequence[tuple[Any, Sequence[Any]]], *, batch_size: int = 32, show_progress_bar: bool = False
    ) -> list[np.ndarray]:
        """Score the candidates of each query against each other.

        Args:
            lists: L times a query and its candidates, each a text, an image or ``{"image", "text"}``.
            batch_size: candidates a forward pass, but one list at least.
            show_progress_bar: show how many lists are scored.

        Returns:
            For each list the probabilities of its candidates' numbers, ``(n,)`` float32.

        Raises:
            ValueError: a list has no candidates or too many, or one holds nothing; list and candidate are named.
        """
        require_count("batch_size", batch_size)
        contents = [self._contents(asked, row) for row, asked in enumerate(lists)]
        self.model.eval()
        found = [np.zeros(len(own) - 1, dtype=np.float32) for own in contents]
        encoder: Any = self.model[0]
        sharing = encoder.prefixes.encoding(last_token_only=True, inference=True)
        bar = tqdm(total=len(contents), desc="Reranking lists", unit="list", disable=not show_progress_bar)
        with bar, encoder.prefixes.turns, sharing:
            for rows in _batches(contents, batch_size):
                self._score(rows, contents, found)
                bar.update(len(rows))
        return found

    def rank(
        self, query: Any, candidates: Sequence[Any], *, top_k: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Order the candidates of a query by their scores, whatever ``replaces`` is.

        Args:
            query: a text, an image or ``{"image", "text"}``.
            candidates: the same, at most ``max_candidates``.
            top_k: how many are returned; None for all.
            **options: of :meth:`predict_lists`.

        Returns:
            ``{"corpus_id", "score"}`` of each, the best first, as ``CrossEncoder.rank``.
        """
        (scores,) = self.predict_lists([(query, candidates)], **options)
        order = np.argsort(-scores, kind="stable")[:top_k].tolist()
        return [{"corpus_id": place, "score": float(scores[place])} for place in order]

    def answered(
        self, lists: Sequence[tuple[Any, Sequence[Any]]], numbers: Sequence[int], *, prompt: str | None = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Features of lists with their answers, the numbers from 1, and the answers' tokens (B, K), for training.

        The model computes logits of the last ``K + 1`` tokens. An answer of fewer than K has -100 before it.
        """
        for row, (_, candidates) in enumerate(lists):
            self._check_count(candidates, row)
        lengths = [self._numbers.around + len(self._numbers.tokens[number - 1]) for number in numbers]
        answers = [self.prompt.answered(number) for number in numbers]
        encoder: Any = self.model[0]
        most = max(lengths)
        features = encoder.preprocess_lists(
            lists, answers, template=self.template, prompt=prompt, logits_to_keep=most + 1
        )
        tokens = features["input_ids"][:, -most:].clone()
        for row, length in enumerate(lengths):
            tokens[row, : most - length] = _NOT_ASKED
        return features, tokens

    def _check_count(self, candidates: Sequence[Any], row: int) -> None:
        if not 1 <= len(candidates) <= self.max_candidates:
            raise ValueError(
                f"List {row} has {len(candidates)} candidates, but 1 to `max_candidates={self.max_candidates}` are "
                "taken. Give the first of them, or raise `max_candidates` (what a model was not trained on it may not "
                "know)."
            )

    def _contents(self, asked: tuple[Any, Sequence[Any]], row: int) -> list[Content]:
        """What the query and the candidates of a list say."""
        query, candidates = asked
        self._check_count(candidates, row)
        contents = []
        for number, item in enumerate((query, *candidates)):
            try:
                contents += contents_of([item], [row])
            except (OSError, TypeError, ValueError) as error:
                name = f"candidate {number - 1}" if number else "query"
                raise type(error)(f"The {name} of list {row}: {error}") from error
        return contents

    def _score(self, rows: Sequence[int], contents: Sequence[Sequence[Content]], found: list[np.ndarray]) -> None:
        """Score a batch of lists: a row of the model for each beginning of a number that something follows."""
        encoder: Any = self.model[0]
        wanted = {row: self._numbers.of(len(contents[row]) - 1) for row in rows}
        read = [
            (row, beginning)
            for row in rows
            for beginning in sorted({tokens[:end] for tokens in wanted[row] for end in range(len(tokens))})
        ]
        features = encoder.preprocess_lists(
            [(contents[row][0].named, [content.named for content in contents[row][1:]]) for row, _ in read],
            [self.prompt.begun(self._numbers.digits(beginning)) for _, beginning in read],
            template=self.template,
            row_numbers=[row for row, _ in read],
            contents=[contents[row] for row, _ in read],
        )
        device = self.model.device
        whole = device.type != "cpu" or any(content.shows_video for row in rows for content in contents[row])
        budget, padded = None if whole else CPU_TOKENS, not (encoder.share_prefixes and shares_prefixes(encoder.model))
        logs: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        head: Any = self.model[-1]
        for places, part, _ in passes(features, budget, padded=padded):
            logits = encoder(moved(part, device))[head.module_input_name][:, -1]
            for place, own in zip(places.tolist(), logits.float().log_softmax(dim=1).cpu(), strict=True):
                logs[read[place]] = own
        for row, numbers in wanted.items():
            for place, tokens in enumerate(numbers):
                steps = [float(logs[row, tokens[:end]][token]) for end, token in enumerate(tokens)]
                found[row][place] = np.exp(sum(steps))
            if not np.isfinite(found[row]).all():
                raise ValueError(
                    f"The scores of list {row} are not finite. Load the reranker in float32 or bfloat16 if it "
                    "overflows in float16."
                )


def list_prompt(prompt: str | ListPrompt) -> ListPrompt:
    """The words of a name, or those given."""
    if isinstance(prompt, ListPrompt):
        return prompt
    if prompt not in LIST_PROMPTS:
        raise ValueError(f"`prompt={prompt!r}`, but it must be one of {', '.join(LIST_PROMPTS)}, or a `ListPrompt`.")
    return LIST_PROMPTS[prompt]


def _batches(contents: Sequence[Sequence[Content]], size: int) -> list[list[int]]:
    """Numbers of lists in batches of at most ``size`` candidates, in order; one with videos is alone."""
    batches: list[list[int]] = []
    room = 0
    for row, own in enumerate(contents):
        alone = any(content.shows_video for content in own)
        if alone or room < len(own) - 1:
            batches.append([])
            room = size
        batches[-1].append(row)
        room = 0 if alone else room - (len(own) - 1)
    return batches
