"""Instructions and chat templates, as data: how an input is put into words for each family of models.

UniME asks for a summary in one word *after* the content and reads the hidden state of the last token. So every template
here puts media first, then the user's text, then the instruction, inside the family's own turn markers. The
instruction is chosen by what the content holds; a system message (sentence-transformers' ``prompt`` and
``prompt_name`` become one) replaces it. The templates are saved with the processor, so a stock
``SentenceTransformer(path)`` renders the same strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTIONS = {
    "image": "Summary above image in one word: ",
    "text": "Summary above sentence in one word: ",
    "image_text": "Summary above image and sentence in one word: ",
}
"""What the content holds -> UniME's instruction (evaluation code of arXiv 2504.17432; the third is its union)."""


@dataclass(frozen=True)
class TurnFormat:
    """How a family writes one user turn.

    Attributes:
        start: before the content.
        end: after the instruction, up to where the model would answer.
        image: placeholder of one image; ``{n}`` is its number, counted from 1.
        video: placeholder of one video; empty when the family has none.
    """

    start: str
    end: str
    image: str
    video: str = ""


_CHATML = "<|im_end|>\n<|im_start|>assistant\n"
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_QWEN2 = TurnFormat(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", _CHATML, _QWEN_IMAGE, _QWEN_VIDEO
)
_IDEFICS3 = TurnFormat("<|im_start|>User:", "<end_of_utterance>\nAssistant:", "<image>", "<video>")

TURN_FORMATS: dict[str, TurnFormat] = {
    "llava_next": TurnFormat("[INST] ", "[/INST]", "<image>"),
    "llava_onevision": TurnFormat("<|im_start|>user ", "<|im_end|><|im_start|>assistant\n", "<image>", "<video>"),
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": TurnFormat("<|im_start|>user\n", _CHATML, _QWEN_IMAGE, _QWEN_VIDEO),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "gemma3": TurnFormat("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<start_of_image>"),
    "fast_vlm": TurnFormat("<|im_start|>user\n", _CHATML, "<image>"),
    "chatml_open": TurnFormat("<|im_start|>user\n", "", "<image>"),
    "phi3_v": TurnFormat("<|user|>\n", "<|end|>\n<|assistant|>\n", "<|image_{n}|>\n"),
}
"""Name of a family (``config.model_type``) -> its turn. ``chatml_open`` leaves the turn open after the instruction."""

_TEMPLATE = """\
{%- set ns = namespace(media='', images=0, text='', instruction=none, has_media=false) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- set ns.media = ns.media + IMAGE -%}
{%- elif part['type'] == 'video' -%}
{%- set ns.media = ns.media + VIDEO -%}
{%- elif part['type'] == 'text' and message['role'] == 'system' -%}
{%- set ns.instruction = part['text'] -%}
{%- elif part['type'] == 'text' -%}
{%- set ns.text = ns.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if ns.instruction is none -%}
{%- if ns.media and ns.text -%}{%- set ns.instruction = BOTH -%}
{%- elif ns.media -%}{%- set ns.instruction = ONLY_IMAGE -%}
{%- else -%}{%- set ns.instruction = ONLY_TEXT -%}{%- endif -%}
{%- endif -%}
{{- START + ns.media -}}
{%- if ns.media and ns.text and not MEDIA_ENDS_LINE -%}{{- NEWLINE -}}{%- endif -%}
{{- ns.text -}}
{%- if ns.text or not MEDIA_ENDS_LINE -%}{{- NEWLINE -}}{%- endif -%}
{{- ns.instruction + END -}}
"""


def chat_template(name: str) -> str:
    r"""Jinja chat template of a family.

    Args:
        name: A key of :data:`TURN_FORMATS`.

    Raises:
        ValueError: For an unknown name, with those that are known.

    Example:
        >>> from jinja2 import Environment
        >>> template = Environment().from_string(chat_template("llava_next"))
        >>> template.render(messages=[{"role": "user", "content": [{"type": "image"}]}])
        '[INST] <image>\nSummary above image in one word: [/INST]'
    """
    if name not in TURN_FORMATS:
        raise ValueError(
            f"There is no prompt template {name!r}. Give one of {', '.join(sorted(TURN_FORMATS))}, or a Jinja chat "
            "template of your own."
        )
    turn = TURN_FORMATS[name]
    before, _, after = turn.image.partition("{n}")
    image = f"{_quoted(before)} + (ns.images | string) + {_quoted(after)}" if "{n}" in turn.image else _quoted(before)
    values = {
        "IMAGE": image,
        "VIDEO": _quoted(turn.video),
        "BOTH": _quoted(INSTRUCTIONS["image_text"]),
        "ONLY_IMAGE": _quoted(INSTRUCTIONS["image"]),
        "ONLY_TEXT": _quoted(INSTRUCTIONS["text"]),
        "START": _quoted(turn.start),
        "MEDIA_ENDS_LINE": f"(ns.media.endswith({_quoted(chr(10))}))",
        "NEWLINE": _quoted("\n"),
        "END": _quoted(turn.end),
    }
    template = _TEMPLATE
    for key in sorted(values, key=len, reverse=True):  # longest first: IMAGE is part of ONLY_IMAGE
        template = _replaced(template, key, values[key])
    return template


def _replaced(template: str, key: str, value: str) -> str:
    """Put a value where its key stands as a whole word."""
    return re.sub(rf"(?<![\w<|]){key}(?![\w>|])", lambda _: value, template)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
