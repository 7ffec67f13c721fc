"""Publishing an encoder on the Hugging Face Hub: a stock sentence-transformers checkpoint and its model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from sentence_transformers import SentenceTransformer

from unime_st.losses.in_batch import UNIME_CITATION
from unime_st.modules import export_encoder
from unime_st.modules.checks import loading_note
from unime_st.prompts import chat_template
from unime_st.published import CITATIONS, PUBLISHED

_POOLED = {"lasttoken": "hidden state of the last token", "mean": "mean of all tokens' hidden states"}
_TEMPLATE = Path(__file__).parent / "model_card_template.md"
_SENTENCE = "<your text>"
KINDS: dict[str, list[dict[str, str]]] = {
    "image": [{"type": "image"}],
    "text": [{"type": "text", "text": _SENTENCE}],
    "image and text": [{"type": "image"}, {"type": "text", "text": _SENTENCE}],
}
"""What an input may hold -> the parts of its chat message."""


def push_encoder_to_hub(
    model: SentenceTransformer,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add a multimodal sentence-transformers encoder",
    create_pr: bool = False,
    exist_ok: bool = True,
    merge_adapters: bool = True,
    model_card: str | None = None,
    widget_images: bool | None = None,
) -> str:
    """Upload an encoder so that ``SentenceTransformer(repo_id)`` loads it without this package.

    What is uploaded is the folder :func:`unime_st.export_encoder` writes, its model card among it.

    Args:
        model: the encoder.
        repo_id: ``name`` or ``organisation/name``.
        private: make a new repository private; None follows the organisation's default.
        token: of the Hub; None takes the one you logged in with.
        revision: branch to commit to; None takes the main one. It is made when it is not there.
        commit_message: of the one commit.
        create_pr: open a pull request in place of a commit.
        exist_ok: a repository that is there already is written to; False refuses.
        merge_adapters: merge LoRA weights into the backbone; False uploads adapters alone.
        model_card: text of README.md in place of :func:`encoder_card`'s.
        widget_images: upload rows of the training set in the card and its ``assets/`` folder, see
            :func:`unime_st.export_encoder`; never unless asked for.

    Returns:
        The address of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_encoder(
            model, Path(scratch) / "encoder", merge_adapters=merge_adapters, widget_images=widget_images
        )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=exist_ok, repo_type="model").repo_id
        card = model_card if model_card is not None else encoder_card(model, repo_id=repo_id)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def encoder_card(model: SentenceTransformer, *, repo_id: str = "path/to/this/folder", title: str | None = None) -> str:
    """Write the card of an encoder, Markdown with a YAML header; a model without a chat template is refused.

    Base model, licence, language, training data, arguments and results are what sentence-transformers has noted in
    ``model.model_card_data``: set them there (``model.model_card_data.license = "apache-2.0"``) before calling.
    """
    processor: Any = getattr(model[0], "processor", None)
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"The first module, {type(model[0]).__name__}, has no chat template. Give an encoder of `build_encoder`."
        )
    backbone: Any = model[0].model
    data: Any = model.model_card_data
    data.model_name = data.model_name or title or repo_id
    data.tags = list(dict.fromkeys([*(data.tags or []), "multimodal", "unime"]))
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=title or repo_id.rpartition("/")[2],
        repo_id=repo_id,
        architecture=type(backbone).__name__,
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        prompts=[name for name, prompt in model.prompts.items() if prompt],
        loading_note=loading_note(backbone),
        pooling=_POOLED.get(getattr(model[1], "pooling_mode", ""), "see `modules.json`"),
        rendered_prompts={kind: _rendered(processor, parts) for kind, parts in KINDS.items()},
        recipe_citation="\n\n".join(_citations(processor)),
    )
    return str(card)


def _citations(processor: Any) -> list[str]:
    """Of the recipe, and of UniME-V2 or Qwen3-VL-Embedding where the prompts are theirs."""
    own = str(processor.chat_template).strip()
    papers = {row.paper for row in PUBLISHED.values() if row.template and chat_template(row.template).strip() == own}
    return [
        UNIME_CITATION.strip(),
        *(citation.strip() for paper, citation in CITATIONS.items() if paper in papers),
    ]


def _rendered(processor: Any, parts: list[dict[str, str]]) -> str:
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, tokenize=False)  # as encoders render it
    return on_one_line(str(text))


def on_one_line(prompt: str) -> str:
    """A prompt as it stands in a cell of a Markdown table."""
    return prompt.replace("\n", "\\n").replace("|", "\\|")
