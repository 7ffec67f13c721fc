"""What a judge or reranker is asked, as data: the words around a query and its candidates, and the answers.

The words about a pair go into the template that is saved with the model: it renders a pair, one message of role
``query`` and one of role ``document``, as one user turn in the backbone's own template, which the model answers. So a
stock ``CrossEncoder(path)`` renders the same strings. Those about a list of candidates are put around that template
when it is asked for, and saved nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from unime_st.prompts import TURN_FORMATS, filled, quoted, with_generation_prompt


@dataclass(frozen=True)
class PairPrompt:
    """The words around a query and a candidate, in one user turn, and the words of the answer.

    The turn is ``before_query``, the query's media and text, ``before_candidate``, the candidate's media and text, and
    ``after_candidate``, one after the other with nothing between them but what is written here.
    """

    before_query: str
    before_candidate: str
    after_candidate: str = ""
    yes: str = "Yes"
    no: str = "No"


_ASKED = "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements"

PAIR_PROMPTS = {
    "unime_v2": PairPrompt(
        f"{_ASKED} of the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'.Query:", "Candidate:"
    ),
    "unime_v2_training": PairPrompt(
        f"{_ASKED} of the query. If it does, respond with 'Yes'; if it doesn't, responed with 'No'.Query:", "Candidate:"
    ),
}
"""Name -> words. ``unime_v2`` is the judge of UniME-V2 (arXiv 2510.13515) and what its reranker is asked when in
use (its authors' Embedding/src/model_utils.py); ``unime_v2_training`` is what that reranker was trained on, with
the typo."""


@dataclass(frozen=True)
class ListPrompt:
    """The words around a query and its numbered candidates, in one user turn, and the answer: the best one's number.

    The turn is ``before_query``, the query's media and text, ``before_candidates``, and for each candidate ``number``,
    its media and text, one after the other with nothing between them but what is written here. ``{n}`` is a candidate's
    number, counted from 1. The answer must go on after its number, which says where that ends: "1" begins "10".
    """

    before_query: str
    before_candidates: str
    number: str = "({n}) "
    answer: str = "Ans: ({n})"

    def __post_init__(self) -> None:
        for name in ("number", "answer"):
            if getattr(self, name).count("{n}") != 1:
                raise ValueError(f"`{name}={getattr(self, name)!r}`, but it must hold '{{n}}' once, for the number.")
        if not self.answer.partition("{n}")[2]:
            raise ValueError(f"`answer={self.answer!r}` ends with its number. Let something follow, such as ')'.")

    def answered(self, number: int | str) -> str:
        """The answer that names a candidate."""
        return self.answer.replace("{n}", str(number))

    def begun(self, digits: str = "") -> str:
        """The answer up to its number, and digits of that."""
        return self.answer.partition("{n}")[0] + digits


LIST_PROMPTS = {
    "unime_v2": ListPrompt(
        "I will provide you with a query followed by multiple candidates in the format: (1) cand1 (2) cand2, etc. Each "
        "candidate is independent of the others. Evaluate each candidate against the query, and respond with the "
        "number corresponding to the candidate that best meets the requirements of the query.Query:",
        "Candidates:",
    ),
}
"""Name -> words. ``unime_v2`` is what UniME-V2's reranker was trained on and is asked (its authors'
Rerank/dataset/datasets_MMEB_rerank.py and Embedding/src/model_utils.py, which agree)."""

_PLAIN = """\
{{- START -}}
{%- for message in messages -%}
{%- for part in ([message['content']] if message['content'] is string else message['content']) -%}
{%- if part is string -%}{{- part -}}
{%- elif part['type'] == 'image' -%}{{- IMAGE -}}
{%- elif part['type'] == 'video' -%}{{- VIDEO -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- if message['role'] == 'system' -%}{{- NEWLINE -}}{%- endif -%}
{%- endfor -%}
{{- END -}}
"""

_PAIR = """\
{% set pair = namespace(others=[], query=[], document=[]) %}
{% for message in messages %}
{% if message['content'] is string %}
{% set parts = [{'type': 'text', 'text': message['content']}] %}
{% else %}
{% set parts = message['content'] %}
{% endif %}
{% set media = parts | rejectattr('type', 'equalto', 'text') | list %}
{% set parts = media + (parts | selectattr('type', 'equalto', 'text') | list) %}
{% if message['role'] == 'query' %}
{% set pair.query = pair.query + parts %}
{% elif message['role'] == 'document' %}
{% set pair.document = pair.document + parts %}
{% else %}
{% set pair.others = pair.others + [message] %}
{% endif %}
{% endfor %}
{% if pair.query or pair.document %}
{% set asked = [{'type': 'text', 'text': BEFORE_QUERY}] + pair.query %}
{% set turn = asked + [{'type': 'text', 'text': BEFORE_CANDIDATE}] + pair.document + AFTER_CANDIDATE %}
{% set messages = pair.others + [{'role': 'user', 'content': turn}] %}
{% endif %}
"""

_LIST = """\
{% set listed = namespace(others=[], turn=[], count=0, answer='') %}
{% for message in messages %}
{% if message['content'] is string %}
{% set parts = [{'type': 'text', 'text': message['content']}] %}
{% else %}
{% set parts = message['content'] %}
{% endif %}
{% set media = parts | rejectattr('type', 'equalto', 'text') | list %}
{% set parts = media + (parts | selectattr('type', 'equalto', 'text') | list) %}
{% if message['role'] == 'query' %}
{% set listed.turn = [{'type': 'text', 'text': BEFORE_QUERY}] + parts %}
{% set listed.turn = listed.turn + [{'type': 'text', 'text': BEFORE_CANDIDATES}] %}
{% elif message['role'] == 'document' %}
{% set listed.count = listed.count + 1 %}
{% set number = {'type': 'text', 'text': BEFORE_NUMBER ~ listed.count ~ AFTER_NUMBER} %}
{% set listed.turn = listed.turn + [number] + parts %}
{% elif message['role'] == 'answer' %}
{% set listed.answer = parts[0]['text'] %}
{% else %}
{% set listed.others = listed.others + [message] %}
{% endif %}
{% endfor %}
{% set messages = listed.others + [{'role': 'user', 'content': listed.turn}] %}
"""


def plain_template(family: str) -> str:
    """Jinja chat template of a family's own turn, with each part of a message at its place and the model's turn opened.

    Args:
        family: ``config.model_type`` of the backbone, of ``TURN_FORMATS``.

    Raises:
        ValueError: the family is not known.
    """
    if family not in TURN_FORMATS:
        raise ValueError(
            f"The backbone has no chat template, and there is none of the family {family!r}. Pass `template=`, a "
            f"Jinja chat template, or take a family of {', '.join(sorted(TURN_FORMATS))}."
        )
    turn = TURN_FORMATS[family]
    marks = {"NEWLINE": "\n", "START": turn.start, "IMAGE": turn.image, "VIDEO": turn.video, "END": turn.end}
    return filled(_PLAIN, {name: quoted(text) for name, text in marks.items()})


def list_template(prompt: ListPrompt, base: str) -> str:
    r"""Jinja chat template that renders a query and its candidates as one user turn, and the answer's beginning.

    The messages are one of role ``query``, one of role ``document`` for each candidate, and one of role ``answer``,
    whose text stands after the opened turn of the model.

    Args:
        prompt: the words.
        base: a chat template that renders a user's turn.

    Example:
        >>> from jinja2 import Environment
        >>> words = ListPrompt("Query: ", " Candidates: ")
        >>> template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        ...     list_template(words, plain_template("llava_next"))
        ... )
        >>> query = {"role": "query", "content": [{"type": "text", "text": "a cat"}, {"type": "image"}]}
        >>> shown = [{"role": "document", "content": text} for text in ("one ", "two")]
        >>> template.render(messages=[query, *shown, {"role": "answer", "content": "Ans: ("}])
        '[INST] Query: <image>a cat Candidates: (1) one (2) two[/INST]Ans: ('
    """
    before, _, after = prompt.number.partition("{n}")
    words = {
        "BEFORE_QUERY": quoted(prompt.before_query),
        "BEFORE_CANDIDATES": quoted(prompt.before_candidates),
        "BEFORE_NUMBER": quoted(before),
        "AFTER_NUMBER": quoted(after),
    }
    return with_generation_prompt(filled(_LIST, words) + base.removesuffix("\n") + "{{ listed.answer }}")


def pair_template(prompt: PairPrompt, base: str | None, family: str) -> str:
    r"""Jinja chat template that renders a pair as one user turn.

    Args:
        prompt: the words.
        base: the backbone's own chat template; None takes the family's turn markers, ``TURN_FORMATS``.
        family: ``config.model_type`` of the backbone.

    Raises:
        ValueError: there is no template of the backbone's own, and the family is not known.

    Example:
        >>> from jinja2 import Environment
        >>> words = PairPrompt("Query: ", " Candidate: ", " Fits?")
        >>> template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        ...     pair_template(words, None, "llava_next")
        ... )
        >>> query = {"role": "query", "content": [{"type": "text", "text": "a cat"}, {"type": "image"}]}
        >>> template.render(messages=[query, {"role": "document", "content": "a dog"}])
        '[INST] Query: <image>a cat Candidate: a dog Fits?[/INST]'
    """
    base = plain_template(family) if base is None else base
    after = f"{{'type': 'text', 'text': {quoted(prompt.after_candidate)}}}" if prompt.after_candidate else ""
    words = {
        "BEFORE_QUERY": quoted(prompt.before_query),
        "BEFORE_CANDIDATE": quoted(prompt.before_candidate),
        "AFTER_CANDIDATE": f"[{after}]",
    }
    return with_generation_prompt(filled(_PAIR, words) + base)
