"""Lists of candidates: their messages, how a tokenizer writes their numbers, and what a template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unime_st.modules.inputs import Message, as_messages
from unime_st.rerank_prompts import ListPrompt

_PROBES = "unime probe alpha", "unime probe bravo", "unime probe charlie"


def list_messages(asked: tuple[Any, Sequence[Any]], row: int, opened: dict[Any, Any], **options: Any) -> list[Message]:
    """Chat messages of a query and its candidates, one for each, with opened images; errors name list and candidate."""
    query, candidates = asked
    names = ["query", *(f"candidate {number}" for number in range(len(candidates)))]
    messages = []
    for item, name in zip((query, *candidates), names, strict=True):
        try:
            (message,) = as_messages(item, row, opened=opened, **options)
        except (OSError, TypeError, ValueError) as error:
            raise type(error)(f"The {name} of list {row}: {error}") from error
        messages.append({**message, "role": "query" if name == "query" else "document"})
    return messages


@dataclass(frozen=True)
class Numbers:
    """The numbers of candidates as a tokenizer writes them in the answer, counted from 1."""

    tokens: tuple[tuple[int, ...], ...]  # of each number
    closing: int  # the token after a number
    around: int = 0  # tokens of the answer before and after its number

    def of(self, count: int) -> list[tuple[int, ...]]:
        """The tokens whose probability is that of each number of a list; only where a longer one begins alike, closed.

        >>> Numbers(((5,), (6,)), 9).of(2)
        [(5,), (6,)]
        >>> Numbers(((5,), (6,), (5, 4)), 9).of(3)
        [(5, 9), (6,), (5, 4)]
        """
        own = self.tokens[:count]
        longer = {tokens[:end] for tokens in own for end in range(1, len(tokens))}
        return [(*tokens, self.closing) if tokens in longer else tokens for tokens in own]

    def digits(self, beginning: tuple[int, ...]) -> str:
        """The text of some first tokens of a number."""
        return str(self.tokens.index(beginning) + 1) if beginning else ""


def find_numbers(encoder: Any, template: str, prompt: ListPrompt, most: int) -> Numbers:
    """How the tokenizer writes the numbers up to ``most`` in the answer; refuses one that blends them with the rest."""
    texts = [_rendered(encoder, template, ""), _rendered(encoder, template, prompt.begun())]
    texts += [_rendered(encoder, template, prompt.begun(str(number))) for number in range(1, most + 1)]
    texts += [_rendered(encoder, template, prompt.answered(number)) for number in range(1, most + 1)]
    opened, begun, *others = (tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    numbered, answered = others[:most], others[most:]
    tokens, closings = [], set()
    for number, (own, whole) in enumerate(zip(numbered, answered, strict=True), 1):
        digits, rest = own[len(begun) :], whole[len(own) :]
        if own[: len(begun)] != begun or whole[: len(own)] != own or not digits or not rest:
            raise ValueError(
                f"This vocabulary has no tokens of their own for the number in {prompt.answered(number)!r}: it blends "
                "them with what stands around them, so candidates have no scores. Give a `ListPrompt` with another "
                "`answer`, such as 'Ans: ({n})'."
            )
        if encoder.tokenizer.unk_token_id in digits:
            raise ValueError(f"The number {number} has no token in this vocabulary. Set `max_candidates={number - 1}`.")
        tokens.append(digits)
        closings.add(rest[0])
    cut = {own[:end] for own in tokens for end in range(1, len(own))} - set(tokens)
    if len(set(tokens)) < most or len(closings) > 1 or cut:
        raise ValueError(
            f"This vocabulary does not write the numbers up to {most} digit by digit or as one token each, so they "
            "cannot be told apart by the next tokens. Set `max_candidates=9`."
        )
    lead = len(begun) - next((at for at, pair in enumerate(zip(opened, begun, strict=False)) if pair[0] != pair[1]),
                             len(opened))  # fmt: skip
    return Numbers(tuple(tokens), closings.pop(), lead + len(answered[0]) - len(numbered[0]))


def check_list_template(encoder: Any, template: str, prompt: ListPrompt) -> None:
    """Refuse a template that drops a text, an image or the answer's beginning, or moves it from its candidate."""
    rendered, token = _rendered(encoder, template, prompt.begun(), images=1), encoder.processor.image_token
    wanted = [prompt.before_query, token, _PROBES[0], prompt.before_candidates]
    for number, text in enumerate(_PROBES[1:], 1):
        wanted += [prompt.number.replace("{n}", str(number)), token, text]
    place = 0
    for words in [*wanted, prompt.begun()]:
        found = rendered.find(words, place)
        if found < 0:
            raise ValueError(
                f"The chat template leaves out {words!r}, or does not keep it at its place, in {rendered!r}: what is "
                "said of a candidate must follow its number. Give a `template` that renders the parts of a user's turn "
                "in their order, such as `unime_st.rerank_prompts.plain_template(family)`."
            )
        place = found + len(words)
    if rendered.count(token) != len(_PROBES) or place != len(rendered):
        raise ValueError(
            f"The chat template renders three images as {rendered.count(token)} {token!r}, or goes on after the "
            f"answer's beginning: {rendered!r}. Give another `template`."
        )


def _rendered(encoder: Any, template: str, answer: str, images: int = 0) -> str:
    parts = [[{"type": "image"}] * images + [{"type": "text", "text": text}] for text in _PROBES]
    roles = ("query", "document", "document")
    messages: list[Any] = [{"role": role, "content": own} for role, own in zip(roles, parts, strict=True)]
    messages.append({"role": "answer", "content": [{"type": "text", "text": answer}]})
    try:
        return str(encoder.processor.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise ValueError(f"The chat template cannot render a list of candidates in a user's turn: {error}") from error
