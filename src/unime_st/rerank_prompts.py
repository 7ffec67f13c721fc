"""What a judge or reranker is asked, as data: the words around a query and a candidate, and the two answers.

The words go into the template that is saved with the model: it renders a pair, one message of role ``query`` and one of
role ``document``, as one user turn in the backbone's own template, which the model answers. So a stock
``CrossEncoder(path)`` renders the same strings.
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
    if base is None:
        if family not in TURN_FORMATS:
            raise ValueError(
                f"The backbone has no chat template, and there is none of the family {family!r}. Pass `template=`, a "
                f"Jinja chat template, or take a family of {', '.join(sorted(TURN_FORMATS))}."
            )
        turn = TURN_FORMATS[family]
        marks = {"NEWLINE": "\n", "START": turn.start, "IMAGE": turn.image, "VIDEO": turn.video, "END": turn.end}
        base = filled(_PLAIN, {name: quoted(text) for name, text in marks.items()})
    after = f"{{'type': 'text', 'text': {quoted(prompt.after_candidate)}}}" if prompt.after_candidate else ""
    words = {
        "BEFORE_QUERY": quoted(prompt.before_query),
        "BEFORE_CANDIDATE": quoted(prompt.before_candidate),
        "AFTER_CANDIDATE": f"[{after}]",
    }
    return with_generation_prompt(filled(_PAIR, words) + base)
