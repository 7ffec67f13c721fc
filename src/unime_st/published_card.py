"""Cards of the published UniME models."""

from __future__ import annotations

from huggingface_hub import ModelCardData
from jinja2 import Environment

from unime_st.evaluation import published_results
from unime_st.hub import KINDS, on_one_line
from unime_st.losses.in_batch import UNIME_CITATION
from unime_st.prompts import chat_template
from unime_st.published import UNIME_V2_CITATION, PublishedCheckpoint

_NEEDS_US = " transformers lacks this architecture, so `import unime_st` before loading that."
_POSITIONS = (
    " Their code counts an image's tokens like words, transformers 5 by rows and columns: set "
    "`model[0].flat_image_positions = True` for theirs, which stock sentence-transformers cannot."
)
_BARE = (
    " They were measured by the benchmark's own script, which gives its texts as they are, outside of any turn and "
    'without "in one word".'
)
_CITATIONS = {"2504.17432": UNIME_CITATION, "2510.13515": UNIME_V2_CITATION}


def published_card(known: PublishedCheckpoint) -> str:
    """Write the card of a published model as an encoder of this package: its prompts, its results, how to load it.

    Markdown with a YAML header. Numbers are those its authors published, with their source; none is ours.
    """
    template = Environment(autoescape=False).from_string(chat_template(known.prompts))  # noqa: S701 (not HTML)
    prompts = [(kind, template.render(messages=[{"role": "user", "content": p}])) for kind, p in KINDS.items()]
    header = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        base_model=known.repo_id,
        tags=["sentence-transformers", "multimodal", "unime"],
    ).to_yaml()
    needs = "" if known.family != "phi3_v" else _NEEDS_US
    scores = next(row for row in published_results("mmeb") if row["model"] == known.results)
    numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
    title = known.repo_id.rpartition("/")[2]
    lines = [
        f"---\n{header}\n---",
        f"# {title} as a sentence-transformers encoder",
        "",
        (
            f"[{known.repo_id}](https://huggingface.co/{known.repo_id}) is a plain transformers repository "
            f"(`{known.family}`). `unime_st` knows its prompts and makes an encoder of it; exported, that is a stock "
            f"sentence-transformers checkpoint.{needs}"
        ),
        "",
        "```python",
        "from unime_st import export_encoder, load_encoder",
        "",
        f'model = load_encoder("{known.repo_id}")',
        f'export_encoder(model, "{title}")  # afterwards: SentenceTransformer("{title}")',
        "```",
        "",
        "| input | what the model reads |",
        "|---|---|",
        *(f"| {kind} | `{on_one_line(prompt)}` |" for kind, prompt in prompts),
        "",
        (
            f"Last token, L2-normalised, padded on the left. Trained on images resized to {known.trained_at} x "
            f"{known.trained_at} pixels (arXiv {known.paper}); the encoder resizes as the repository's processor does."
            f"{_evaluated(known)}"
        ),
        "",
        f"## MMEB, as published ({scores['source']}; {str(scores['average']).replace('_', ' ')})",
        "",
        f"| {' | '.join(numbers)} |",
        "|---" * len(numbers) + "|",
        f"| {' | '.join(str(value) for value in numbers.values())} |",
        "",
        (
            "These are the authors' numbers, not repeated here: loading was tested on tiny random models laid out as "
            "the repository is, not on its weights. Its licence is on its own card."
            f"{_BARE if known.paper == '2504.17432' else ''}"
        ),
        "",
        "```bibtex",
        _CITATIONS[known.paper].strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _evaluated(known: PublishedCheckpoint) -> str:
    if known.evaluated_at is None:
        return ""
    side = known.evaluated_at
    positions = _POSITIONS if known.family == "qwen2_vl" else ""
    return (
        f" Its authors' evaluation forces every image to {side} x {side} pixels, whatever its shape: give "
        f"`MMEBEvaluator` or `MTEBEncoder` `image_size={side}` to repeat it.{positions}"
    )
