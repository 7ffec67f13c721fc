"""Publishing an encoder on the Hugging Face Hub, as a stock sentence-transformers checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer

from unime_st.modules import export_encoder


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
        model_card: text of README.md in place of the generated one.

    Returns:
        The address of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_encoder(model, Path(scratch) / "encoder", merge_adapters=merge_adapters)
        if model_card is not None:
            (folder / "README.md").write_text(model_card, encoding="utf-8")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=exist_ok, repo_type="model").repo_id
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
