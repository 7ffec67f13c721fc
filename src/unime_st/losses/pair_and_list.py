"""UniME-V2's reranker: yes or no to pairs, and the number of the best of a list, both as next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unime_st.arguments import require_count
from unime_st.columns import NO_CANDIDATE
from unime_st.losses.grad_cache import embedded_together
from unime_st.published import UNIME_V2_CITATION
from unime_st.rerank_prompts import ListPrompt
from unime_st.step_encoder import unwrapped

_COLUMNS = "(anchor, positive, negative_1, ...)"


class PairAndListLoss(nn.Module):
    """Cross-entropy of a reranker's answers, of their tokens alone: to pairs, and to a list of candidates.

    Of each row the model is asked three things: whether the positive meets the query ("Yes"), whether the first
    negative does ("No"), and which of a list does ("Ans: (2)"). The list holds the positive and the row's first ``n``
    negatives, ``n`` drawn from 1 to ``max_negatives`` and the positive's place from 1 to ``n + 1``, for each row and
    step anew, by torch's generator of the CPU, whose state the Trainer's checkpoints keep; in evaluation the loss draws
    nothing. It is L_pair + L_list, each the mean over the tokens of its answers.

    The model stays a pairwise reranker that saves as a stock ``CrossEncoder``;
    :class:`~unime_st.ListwiseReranker` asks it for the best of a list.

    Args:
        model: A reranker of :func:`~unime_st.build_reranker`, whose words pairs are asked in.
        prompt: The words of the lists: a name of :data:`unime_st.rerank_prompts.LIST_PROMPTS`, or your own.
        template: As in :class:`~unime_st.ListwiseReranker`.
        max_negatives: Negatives of a list at the most, up to 98; published are 4.

    Raises:
        TypeError: ``model`` is no reranker of ``build_reranker`` or ``load_reranker``.
        ValueError: An argument is out of range, the columns are too few, or a row has no negative.

    Inputs:
        +-------------------------------------------------+------------------------------------------------+
        | Columns                                         | Label                                          |
        +=================================================+================================================+
        | (anchor, positive, negative_1, ..., negative_n) | none, or scores ``(B, 1 + n)`` of              |
        |                                                 | :func:`~unime_st.data.load_judged_negatives`,  |
        |                                                 | of which only -1, no candidate, is looked at   |
        +-------------------------------------------------+------------------------------------------------+

    Relations:
        ``BinaryCrossEntropyLoss`` of sentence-transformers compares "Yes" with "No" alone; here both are compared with
        all tokens, as in generation.

    References:
        UniME-V2, section 3.4: https://arxiv.org/abs/2510.13515. Its code averages over the tokens of all answers of a
        batch at once, and counts the turn's marks around them (``<|im_start|>assistant``, ``<|im_end|>``); as it is
        released, it also leaves all texts out and shows the list of every row 5 negatives, whatever ``n`` is.
    """

    def __init__(
        self,
        model: CrossEncoder,
        *,
        prompt: str | ListPrompt = "unime_v2",
        template: str | None = None,
        max_negatives: int = 4,
    ) -> None:
        super().__init__()
        if not isinstance(model, CrossEncoder) or not hasattr(model, "listwise"):
            raise TypeError(
                f"`model` is a {type(model).__name__}, but {type(self).__name__} trains a multimodal LLM with its "
                "head, of `build_reranker` or `load_reranker`."
            )
        require_count("max_negatives", max_negatives)
        self.model = model
        self.prompt, self.template, self.max_negatives = prompt, template, max_negatives
        self._lists = model.listwise(prompt=prompt, template=template, max_candidates=1 + max_negatives)
        head: Any = model[-1]
        self._logits, self._answers = head.module_input_name, (head.true_token_id, head.false_token_id)

    def forward(
        self,
        inputs: Sequence[Sequence[Any]],
        labels: Sequence[Tensor] | Tensor | None = None,
        prompt: str | None = None,
        task: str | None = None,  # noqa: ARG002 (the Trainer may give it)
    ) -> dict[str, Tensor]:
        """Ask about pairs and lists of B rows.

        Args:
            inputs: The columns, each of B texts, images or ``{"image", "text"}``.
            labels: See the class.
            prompt: A system message for all.
            task: Not used.

        Returns:
            The two losses, ``"pair"`` and ``"list"``, scalars that the Trainer adds up and logs.
        """
        if len(inputs) < 3:
            raise ValueError(
                f"{type(self).__name__} needs the columns {_COLUMNS}, got {len(inputs)} column(s). Mine negatives, "
                "e.g. by `unime_st.data.mine_hard_negatives`."
            )
        queries, positives, *negatives = inputs
        own = [self._own(row, negatives, labels) for row in range(len(queries))]
        counts, places = self.draw([len(some) for some in own])
        pairs = [*zip(queries, positives, strict=True), *((q, some[0]) for q, some in zip(queries, own, strict=True))]
        right, wrong = self._answers
        lists = [
            (query, [*some[:place], positive, *some[place:count]])
            for query, positive, some, count, place in zip(queries, positives, own, counts, places, strict=True)
        ]
        model = unwrapped(self.model)
        asked = model.preprocess(pairs, prompt=prompt)
        targets = torch.tensor([right] * len(queries) + [wrong] * len(queries))[:, None]
        listed, answers = self._lists.answered(lists, [1 + place for place in places], prompt=prompt)
        batches = [batch_to_device(features, model.device) for features in (asked, listed)]
        logits = embedded_together(self.model, batches, lambda model, features: model(features)[self._logits])
        # Of a pair the last token's, of a list those of the tokens before each of its answer's.
        losses = [
            _cross_entropy(own[:, : wanted.shape[1]], wanted)
            for own, wanted in zip(logits, (targets, answers), strict=True)
        ]
        return dict(zip(("pair", "list"), losses, strict=True))

    def draw(self, available: Sequence[int]) -> tuple[list[int], list[int]]:
        """How many negatives the list of each row holds, and before which of them the positive stands.

        In evaluation it is all of them, and the places go round, so that losses can be compared.
        """
        most = [min(self.max_negatives, number) for number in available]
        if not self.model.training:
            return most, [row % (number + 1) for row, number in enumerate(most)]
        counts = [int(torch.randint(1, number + 1, (), device="cpu")) for number in most]
        return counts, [int(torch.randint(0, count + 1, (), device="cpu")) for count in counts]

    def _own(self, row: int, negatives: Sequence[Sequence[Any]], labels: Sequence[Tensor] | Tensor | None) -> list[Any]:
        """The negatives that a row has."""
        there = [True] * len(negatives)
        if labels is not None:
            scores = labels[row].flatten().tolist()
            if len(scores) != 1 + len(negatives):
                raise ValueError(
                    f"The label of row {row} holds {len(scores)} scores, but there are {1 + len(negatives)} "
                    "candidates: give one each, -1 for none, as `load_judged_negatives` does, or no label."
                )
            there = [score != NO_CANDIDATE for score in scores[1:]]
        found = [column[row] for column, is_there in zip(negatives, there, strict=True) if is_there]
        if not found:
            raise ValueError(f"Row {row} of the batch has no negative, so it has nothing to compare. Leave it out.")
        return found

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments, for the model card."""
        return {"prompt": self.prompt, "template": self.template, "max_negatives": self.max_negatives}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return UNIME_V2_CITATION


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the tokens ``targets`` (B, K), -100 for none, of logits (B, K, V)."""
    exact = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(exact, targets.flatten().to(logits.device))
