"""Instructions and chat templates, as data: how an input is put into words for each family of models.

UniME asks for a summary in one word *after* the content and reads the hidden state of the last token. So every template
here puts media first, then the user's text, then the instruction, inside the family's own turn markers. The
instruction is chosen by what the content holds; a system message (sentence-transformers' ``prompt`` and
``prompt_name`` become one) replaces it. The templates are saved with the processor, so a stock
``SentenceTransformer(path)`` renders the same strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

INSTRUCTIONS = {
    "image": "Summary above image in one word: ",
    "text": "Summary above sentence in one word: ",
    "image_text": "Summary above image and sentence in one word: ",
}
"""What the content holds -> UniME's instruction (evaluation code of arXiv 2504.17432; the third is its union)."""


_LABEL, _ANSWER, _CAPTION = "Represent the class label:", "Represent the answer:", "Represent the image caption:"
TARGET_INSTRUCTIONS = {
    **dict.fromkeys(["ImageNet_1K", "ImageNet-1K", "HatefulMemes", "SUN397", "N24News", "VOC2007"], _LABEL),
    **dict.fromkeys(["Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"], _LABEL),
    **dict.fromkeys(["OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"], _ANSWER),
    **dict.fromkeys(["ScienceQA", "GQA", "TextVQA", "VizWiz"], _ANSWER),
    **dict.fromkeys(("MSCOCO_i2t", "VisualNews_i2t"), _CAPTION),
}
"""A data set of MMEB -> B3's instruction before its targets' texts (arXiv 2505.11293, table 13; sets without one have
none). The first has a name for training and one for evaluation."""

PAGE_INSTRUCTIONS = (
    "Find a document image that matches the given query:",
    "Understand the content of the provided document image.",
)
"""Before a query for a document page, and beside the page: those of MMEB-V2's visual documents."""

LLAVA_HOUND_INSTRUCTIONS = {
    "caption": ("", ""),
    "video": (
        "Find a video that contains the following visual content:",
        "Understand the content of the provided video:",
    ),
    "question": ("Answer a question based on the content of a video.", ""),
}
"""Task -> what VLM2Vec-V2 says before the query, and beside the target, of LLaVA-Hound's videos (its
``src/data/dataset/llavahound_dataset_*.py``); in captions the data's own first turn asks."""

VISRAG_INSTRUCTIONS = {
    "NeurIPS Papers": (
        (
            "This query is about a research paper from NeurIPS, a leading AI/ML conference. The document contains"
            " technical discussions, methodologies, and findings. Identify relevant papers and sections that "
            "address the query:"
        ),
        "A research paper from NeurIPS on AI and ML topics.",
    ),
    "Textbooks": (
        (
            "This query is related to a college-level textbook, which provides structured explanations, "
            "definitions, and examples. Find the most relevant concepts or explanations that address the query:"
        ),
        "A textbook page with structured educational content and explanations.",
    ),
    "ICML Papers": (
        (
            "This query is about a research paper from ICML, a leading AI/ML conference. The document contains "
            "theoretical insights, experiments, and applications. Identify relevant papers and sections that best"
            " answer the query:"
        ),
        "A research paper from ICML, covering machine learning topics.",
    ),
    "Manuallib": (
        (
            "This query pertains to a product manual, which contains detailed technical specifications, usage "
            "instructions, and troubleshooting steps. Find the most relevant section that answers the query:"
        ),
        "A product manual page with technical specifications and instructions.",
    ),
    "ArxivQA": (
        (
            "This query is related to retrieving a relevant figure from an ArXiv research paper. The retrieved "
            "figure should contain scientific plots, mathematical visualizations, or experimental results that "
            "best address the query:"
        ),
        "A figure from a research paper, including plots or experimental results.",
    ),
    "ChartQA": (
        (
            "This query is related to retrieving a relevant chart that visually represents numerical or "
            "categorical data. The retrieved chart should contain bar graphs, line charts, or other visual "
            "elements necessary to analyze trends, compare values, or extract insights related to the query:"
        ),
        "A statistical chart comparing values or analyzing trends.",
    ),
    "MP-DocVQA": (
        (
            "This query is related to retrieving a relevant page from a multi-page document, such as reports, "
            "invoices, or research papers. The retrieved document should contain text, tables, or structured "
            "information necessary to answer the query:"
        ),
        "A page from a multi-page document with text or tables.",
    ),
    "InfoVQA": (
        (
            "This query is related to retrieving an infographic that visually presents statistical or factual "
            "information using charts, icons, and structured layouts. The retrieved image should contain the "
            "necessary visual elements to provide the best context for answering the query:"
        ),
        "An infographic with structured data, charts, and annotations.",
    ),
    "PlotQA": (
        (
            "This query relates to retrieving a relevant plot or chart that visually represents numerical data. "
            "The retrieved figure should contain the necessary information to analyze trends, compare values, or "
            "extract key insights related to the query:"
        ),
        "A numerical data visualization, such as bar charts or line graphs.",
    ),
    "SlideVQA": (
        (
            "This query is related to retrieving a relevant presentation slide that visually presents structured "
            "information. The retrieved slide should contain the necessary text, charts, or graphics to provide "
            "the best answer to the query:"
        ),
        "A presentation slide with text, bullet points, and diagrams.",
    ),
}
"""Source of a row of VisRAG's training data -> what VLM2Vec-V2 says before its queries, and beside its pages (its
``src/data/dataset/visrag_dataset.py``)."""


_OPENS = "add_generation_prompt"
_OPENED = f"{{% set {_OPENS} = true %}}\n"  # a line of its own, which transformers renders as nothing


@dataclass(frozen=True)
class TurnFormat:
    """How a family writes one user turn."""

    start: str  # before the content
    end: str  # after the instruction, up to where the model would answer
    image: str  # placeholder of one image; `{n}` is its number, counted from 1
    video: str = ""  # placeholder of one video; empty when the family has none
    before_text: str = ""  # before a text that comes without media
    instruction_end: str = " "  # what the instructions of `INSTRUCTIONS` end in after their colon


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

IMAGE_PROMPT_V2 = "Find an image caption describing the given image."
"""What UniME-V2 reads after an image that comes without words (its authors' utils/utils.py)."""


@dataclass(frozen=True)
class BareFormat:
    """How UniME-V2 writes an input: media, then what the user says, or its image prompt; no instruction of its own.

    A system message (``prompt``) goes on a line before the text, or in the place of the image prompt. Where nothing at
    all is left, of an empty text, it is a line break: a model needs a token.
    """

    start: str
    end: str
    image: str
    video: str
    before_text: str  # between media and text
    before_prompt: str  # between media and a prompt without text
    before_any: str  # before words without media
    strips: bool  # whether white space around the words goes, around a prompt's and the text's own


@dataclass(frozen=True)
class SystemFormat:
    """How Qwen3-VL-Embedding writes an input: the instruction in the system turn, the content in the user's.

    White space around an instruction goes, and one that does not end in punctuation gets a full stop. Videos come
    first, then images, then the text.
    """

    start: str  # before the instruction
    between: str  # between instruction and content
    end: str
    image: str
    video: str
    instruction: str  # where none is given
    nothing: str  # in the place of content that is empty


PUNCTUATION = (
    "!\"#%&'()*,-./:;?@[\\]_{}¡§«¶·»¿؟،؛۔।॥‐‑‒–—―‖‘’‚‛“”„‟†‡•…‰′″‹›‼⁇⁈⁉、。〈〉《》「」『』【】！（），．：；？"
)
"""What an instruction may end in: ASCII's punctuation (Unicode's category P), and what other scripts commonly use."""

_ONEVISION = ("<|im_start|>user ", "<|im_end|><|im_start|>assistant\n", "<image>", "<video>")

PUBLISHED_FORMATS: dict[str, TurnFormat | BareFormat | SystemFormat] = {
    "unime_llava_onevision": TurnFormat(*_ONEVISION, before_text="\n", instruction_end="\n"),
    "unime_v2_qwen2_vl": BareFormat("", "", "<|image_pad|>", "<|video_pad|>", "\n", " ", "", strips=False),
    "unime_v2_llava_onevision": BareFormat(*_ONEVISION, "\n", "\n", "\n", strips=True),
    "qwen3_vl_embedding": SystemFormat(
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        _CHATML,
        _QWEN_IMAGE,
        _QWEN_VIDEO,
        instruction="Represent the user's input.",
        nothing="NULL",
    ),
}
"""Name of a template -> what published models read that do not read as their family does here.

LLaVA-OneVision's own chat template begins every text on a new line, and the instructions of UniME's end in a line break
(so its authors say in their issue #4). UniME-V2 is by Embedding/src/model_utils.py of its authors: Qwen2-VL reads no
turn markers at all, and a lone placeholder. Qwen3-VL-Embedding is by src/models/qwen3_vl_embedding.py of its authors.
"""

_READ = """\
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
"""
_BARE = (
    _READ
    + """\
{%- set told = ns.instruction or '' -%}
{%- set text = ns.text -%}
{%- if STRIPS -%}{%- set told = told | trim -%}{%- set text = text | trim -%}{%- endif -%}
{%- set words = told + (NEWLINE if told and text else '') + text -%}
{%- if ns.media and not words -%}{%- set words = PROMPT -%}{%- endif -%}
{%- set between = BEFORE_ANY -%}
{%- if ns.media -%}{%- set between = BEFORE_TEXT if text else BEFORE_PROMPT -%}{%- endif -%}
{{- (START + ns.media + between + words + END) or NEWLINE -}}
"""
)
_SYSTEM = (
    _READ
    + """\
{%- set told = (ns.instruction or '') | trim -%}
{%- if told and told[-1] not in PUNCTUATION -%}{%- set told = told + '.' -%}{%- endif -%}
{%- set media = (ns.media | replace(IMAGE, '')) + IMAGE * ns.images -%}
{{- START + (told or INSTRUCTION) + BETWEEN + ((media + ns.text) or NOTHING) + END -}}
"""
)
_TEMPLATE = (
    _READ
    + """\
{%- if ns.instruction is none -%}
{%- if ns.media and ns.text -%}{%- set ns.instruction = BOTH -%}
{%- elif ns.media -%}{%- set ns.instruction = ONLY_IMAGE -%}
{%- else -%}{%- set ns.instruction = ONLY_TEXT -%}{%- endif -%}
{%- endif -%}
{{- START + (ns.media or BEFORE_TEXT) -}}
{%- if ns.media and ns.text and not MEDIA_ENDS_LINE -%}{{- NEWLINE -}}{%- endif -%}
{{- ns.text -}}
{%- if ns.text or not MEDIA_ENDS_LINE -%}{{- NEWLINE -}}{%- endif -%}
{{- ns.instruction + END -}}
"""
)


def chat_template(name: str) -> str:
    r"""Jinja chat template of a family, by a key of :data:`TURN_FORMATS` or :data:`PUBLISHED_FORMATS`.

    >>> from jinja2 import Environment
    >>> template = Environment().from_string(chat_template("llava_next"))
    >>> template.render(messages=[{"role": "user", "content": [{"type": "image"}]}])
    '[INST] <image>\nSummary above image in one word: [/INST]'
    """
    formats = {**TURN_FORMATS, **PUBLISHED_FORMATS}
    if name not in formats:
        raise ValueError(
            f"There is no prompt template {name!r}. Give one of {', '.join(sorted(formats))}, or a Jinja chat template "
            "of your own."
        )
    turn = formats[name]
    if isinstance(turn, SystemFormat):
        words = {key.upper(): quoted(text) for key, text in asdict(turn).items()}
        return filled(_SYSTEM, words | {"PUNCTUATION": quoted(PUNCTUATION)})
    before, _, after = turn.image.partition("{n}")
    image = f"{quoted(before)} + (ns.images | string) + {quoted(after)}" if "{n}" in turn.image else quoted(before)
    values = {
        "IMAGE": image,
        "VIDEO": quoted(turn.video),
        "START": quoted(turn.start),
        "BEFORE_TEXT": quoted(turn.before_text),
        "NEWLINE": quoted("\n"),
        "END": quoted(turn.end),
    }
    if isinstance(turn, BareFormat):
        values |= {
            "PROMPT": quoted(IMAGE_PROMPT_V2),
            "STRIPS": str(turn.strips).lower(),
            "BEFORE_PROMPT": quoted(turn.before_prompt),
            "BEFORE_ANY": quoted(turn.before_any),
        }
        return filled(_BARE, values)
    asked = {kind: quoted(words.rstrip() + turn.instruction_end) for kind, words in INSTRUCTIONS.items()}
    values |= {"BOTH": asked["image_text"], "ONLY_IMAGE": asked["image"], "ONLY_TEXT": asked["text"]}
    return filled(_TEMPLATE, values | {"MEDIA_ENDS_LINE": f"(ns.media.endswith({quoted(chr(10))}))"})


def with_generation_prompt(template: str) -> str:
    """A Jinja chat template that always opens the model's turn, where it does so on ``add_generation_prompt`` alone.

    Encoders render without that argument, stock ones too; written into the template, it is saved with it.

    >>> from jinja2 import Environment
    >>> own = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<answer>{% endif %}"
    >>> template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(with_generation_prompt(own))
    >>> template.render(messages=[{"role": "user", "content": "a cat"}], add_generation_prompt=False)
    'a cat<answer>'
    """
    return _OPENED + template


def is_encoders(template: str) -> bool:
    """Whether a template is one of an encoder's here, which gathers the media and ends in an instruction of its own.

    >>> is_encoders(chat_template("qwen2_vl")), is_encoders("{{ messages[0]['content'] }}")
    (True, False)
    """
    return template.startswith(_READ.partition("\n")[0])


def lacks_generation_prompt(template: str) -> bool:
    """Whether a template opens the model's turn only when asked to, which nobody does.

    >>> lacks_generation_prompt("{% if add_generation_prompt %}<answer>{% endif %}"), lacks_generation_prompt("x")
    (True, False)
    """
    return _OPENS in template and not template.startswith(_OPENED)


def filled(template: str, values: Mapping[str, str]) -> str:
    """Put each value where its key stands as a whole word."""
    return re.sub(rf"(?<![\w<|])({'|'.join(values)})(?![\w>|])", lambda found: values[found[1]], template)


def quoted(text: str) -> str:
    """A text as Jinja writes it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
