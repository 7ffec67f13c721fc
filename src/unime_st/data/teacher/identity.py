"""Which folder of a cache belongs to a teacher and a prompt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from pathlib import Path

from unime_st.embedding.full_disk import explained_full_disk
from unime_st.files import write_atomically
from unime_st.identity.model import is_outdated

logger = logging.getLogger(__name__)

_NOTE = "identity.json"


def teacher_folder(cache_dir: Path, identity: dict[str, str]) -> Path:
    """Folder of one teacher and prompt, with a readable note of what it is."""
    folder = cache_dir / hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
    if not (folder / _NOTE).exists():
        _tell_of_outdated(cache_dir)
        with explained_full_disk(folder):
            write_atomically(folder / _NOTE, json.dumps(identity, indent=1).encode())
    return folder


def _tell_of_outdated(cache_dir: Path) -> None:
    """Say which folders belong to teachers as an earlier version knew them: no teacher is found there any more."""
    old = []
    for note in cache_dir.glob(f"*/{_NOTE}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # one that cannot be read is not looked for
            teacher = json.loads(note.read_bytes()).get("teacher")
            if is_outdated(teacher) or re.fullmatch(r"[0-9a-f]{32}", str(teacher)):
                old.append(note.parent.name)
    if old:
        logger.warning(
            "%s holds embeddings of teachers that an earlier version knew by less of their tokenizers, in %s: they are "
            "not used any more, and a teacher of then is embedded anew. Delete them.", cache_dir, ", ".join(sorted(old))
        )  # fmt: skip
