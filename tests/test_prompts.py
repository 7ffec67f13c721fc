"""The prompts, to the letter."""

import pytest
from jinja2 import Environment

from unime_st.prompts import (
    INSTRUCTIONS,
    TURN_FORMATS,
    chat_template,
    lacks_generation_prompt,
    with_generation_prompt,
)

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def render(name, *parts, system=None):
    messages = [{"role": "user", "content": list(parts)}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [text(system)]})
    return Environment().from_string(chat_template(name)).render(messages=messages, add_generation_prompt=True)


CHATML_END = "<|im_end|>\n<|im_start|>assistant\n"
QWEN2_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
BOTH = "Summary above image and sentence in one word: "
GOLDEN = [  # LLaVA-1.6 and Phi-3.5-V as the published evaluation code has them
    ("llava_next", [IMAGE], "[INST] <image>\nSummary above image in one word: [/INST]"),
    ("llava_next", [text("<sent>")], "[INST] <sent>\nSummary above sentence in one word: [/INST]"),
    ("phi3_v", [IMAGE], "<|user|>\n<|image_1|>\nSummary above image in one word: <|end|>\n<|assistant|>\n"),
    ("phi3_v", [text("<sent>")], "<|user|>\n<sent>\nSummary above sentence in one word: <|end|>\n<|assistant|>\n"),
    ("chatml_open", [text("a cat")], "<|im_start|>user\na cat\nSummary above sentence in one word: "),
    ("fast_vlm", [IMAGE], f"<|im_start|>user\n<image>\nSummary above image in one word: {CHATML_END}"),
    (
        "qwen2_vl",
        [IMAGE, text("What?")],
        f"{QWEN2_SYSTEM}<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat?\n{BOTH}{CHATML_END}",
    ),
    (
        "gemma3",
        [IMAGE, text("What?")],
        f"<bos><start_of_turn>user\n<start_of_image>\nWhat?\n{BOTH}<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        "idefics3",
        [text("a cat")],
        "<|im_start|>User:a cat\nSummary above sentence in one word: <end_of_utterance>\nAssistant:",
    ),
    (
        "llava_onevision",
        [IMAGE],
        "<|im_start|>user <image>\nSummary above image in one word: <|im_end|><|im_start|>assistant\n",
    ),
    (
        "unime_llava_onevision",
        [IMAGE, IMAGE],
        "<|im_start|>user <image><image>\nSummary above image in one word:\n<|im_end|><|im_start|>assistant\n",
    ),
    (
        "unime_llava_onevision",
        [text("a cat")],
        "<|im_start|>user \na cat\nSummary above sentence in one word:\n<|im_end|><|im_start|>assistant\n",
    ),
    ("unime_v2_qwen2_vl", [text(" a cat\n")], " a cat\n"),
    ("unime_v2_qwen2_vl", [text("")], "\n"),
]


@pytest.mark.parametrize(("name", "parts", "expected"), GOLDEN)
def test_golden(name, parts, expected):
    assert render(name, *parts) == expected


@pytest.mark.parametrize("name", sorted(TURN_FORMATS))
def test_content_comes_before_the_instruction_whatever_the_order_given(name):
    rendered = render(name, text("what is it?"), IMAGE)
    assert rendered == render(name, IMAGE, text("what is it?"))
    assert rendered.index("what is it?") < rendered.index(INSTRUCTIONS["image_text"])
    assert rendered.endswith(INSTRUCTIONS["image_text"] + TURN_FORMATS[name].end)


@pytest.mark.parametrize("name", sorted(TURN_FORMATS))
def test_a_system_message_replaces_the_instruction(name):
    rendered = render(name, IMAGE, system="Find its caption: ")
    assert rendered.endswith("Find its caption: " + TURN_FORMATS[name].end)
    assert "Summary above" not in rendered


def test_images_of_phi3_v_are_numbered():
    rendered = render("phi3_v", IMAGE, IMAGE, text("which?"))
    assert rendered.startswith("<|user|>\n<|image_1|>\n<|image_2|>\nwhich?\nSummary above image and sentence")


@pytest.mark.parametrize("words", ["{{ 7 * 7 }}", "it's \\n <|im_end|>", "END START BOTH", "  two  spaces\n"])
def test_the_users_text_is_left_as_it_is(words):
    assert f"\n{words}\nSummary" in render("chatml_open", text(words))


def test_plain_strings_as_content():
    messages = [{"role": "user", "content": "a cat"}]
    rendered = Environment().from_string(chat_template("llava_next")).render(messages=messages)
    assert rendered == "[INST] a cat\nSummary above sentence in one word: [/INST]"


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no prompt template 'llama'.*chatml_open"):
        chat_template("llama")


OWN = [  # templates that open the model's turn when asked to, with white space where blocks could eat it
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}",
    "\n  <s>{{ messages[0]['content'] }}{%- if add_generation_prompt -%} <answer> {%- endif %}\n",
    "  {% if 1 %}\n    {{ messages[0]['content'] }}\n  {% endif %}\n{% if add_generation_prompt %}\nA:{% endif %}",
    "{% macro end() %}{% if add_generation_prompt %}<a>{% endif %}{% endmacro %}{{ messages[0]['content'] + end() }}",
]


@pytest.mark.parametrize("own", OWN)
def test_a_template_that_opens_the_models_turn_renders_as_when_asked_to(own):
    as_transformers = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False)
    messages = [{"role": "user", "content": "a cat"}]
    asked = as_transformers.from_string(own).render(messages=messages, add_generation_prompt=True)
    assert asked != as_transformers.from_string(own).render(messages=messages, add_generation_prompt=False)
    opened = with_generation_prompt(own)
    assert as_transformers.from_string(opened).render(messages=messages, add_generation_prompt=False) == asked
    assert lacks_generation_prompt(own)
    assert not lacks_generation_prompt(opened)
