"""Cards of the published models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment

from unime_st.evaluation import published_results
from unime_st.hub import KINDS, on_one_line
from unime_st.losses.in_batch import UNIME_CITATION
from unime_st.prompts import chat_template
from unime_st.published import CITATIONS, PublishedCheckpoint

_TEMPLATE = Path(__file__).parent / "published_card_template.md"


def published_card(known: PublishedCheckpoint) -> str:
    """Write the card of a published model as an encoder of this package: its prompts, its results, how to load it.

    Markdown with a YAML header. Numbers are those its authors published, with their source; none is ours.
    """
    markdown = Environment(autoescape=False, keep_trailing_newline=True)  # noqa: S701 (not HTML)
    chat = markdown.from_string(chat_template(known.prompts))
    header = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        base_model=known.repo_id,
        tags=["sentence-transformers", "multimodal", *(["unime"] if known.benchmark == "mmeb" else [])],
    )
    scores = next(row for row in published_results(known.benchmark) if row["model"] == known.results)
    rendered = {kind: chat.render(messages=[{"role": "user", "content": parts}]) for kind, parts in KINDS.items()}
    return markdown.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        known=known,
        header=header.to_yaml(),
        title=known.repo_id.rpartition("/")[2],
        prompts={kind: on_one_line(prompt) for kind, prompt in rendered.items()},
        numbers={name: value for name, value in scores.items() if isinstance(value, (int, float))},
        source=scores["source"],
        told=_told(scores),
        citation=CITATIONS.get(known.paper, UNIME_CITATION).strip(),
    )


def _told(scores: Mapping[str, Any]) -> str:
    """What numbers cannot be compared without: which mean is the overall one, and the frames of a video."""
    if "frames" in scores:
        return f"{scores['frames']} frames of a video"
    return str(scores["average"]).replace("_", " ")
