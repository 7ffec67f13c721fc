"""``unime push``: an encoder with its card to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unime_st.cli.options import UsageError, say

HELP = "upload an encoder with its model card to the Hugging Face Hub, as a stock checkpoint"
EXAMPLE = "unime push photos_encoder/encoder me/photos --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("encoder", metavar="MODEL", help="a saved encoder's folder")
    parser.add_argument("repo_id", metavar="REPO", help="name or organisation/name on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="print the model card, upload nothing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, made when it is not there (default: the main one)")
    parser.add_argument("--commit-message", help="of the one commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--new", action="store_true", help="refuse a repository that is there already")
    parser.add_argument("--card", metavar="FILE", help="a model card of your own, as the folder's README.md")
    parser.add_argument("--keep-adapters", action="store_true", help="upload adapters alone, which need their backbone")


def run(given: argparse.Namespace) -> int:
    """Upload, and print the address; the token is the one that `hf auth login` or HF_TOKEN gives."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from unime_st.hub import encoder_card, push_encoder_to_hub
    from unime_st.modules import load_encoder

    try:
        validate_repo_id(given.repo_id)
    except HFValidationError as error:
        raise UsageError(str(error)) from error
    card = None if given.card is None else Path(given.card).read_text(encoding="utf-8")
    model = load_encoder(given.encoder, device="cpu")
    if given.dry_run:
        say(encoder_card(model, repo_id=given.repo_id) if card is None else card)
        return 0
    http: Any = sys.modules[type(get_session()).__module__.partition(".")[0]]  # httpx, or httpx2 in later versions
    options: dict[str, Any] = {} if given.commit_message is None else {"commit_message": given.commit_message}
    try:
        address = push_encoder_to_hub(
            model,
            given.repo_id,
            private=True if given.private else None,
            revision=given.revision,
            create_pr=given.create_pr,
            exist_ok=not given.new,
            merge_adapters=not given.keep_adapters,
            model_card=card,
            **options,
        )
    except http.TransportError as error:
        raise ConnectionError(f"The Hub cannot be reached: {error}") from error
    say(f"wrote {address}")
    return 0
