"""Hashes of what inputs say; see :mod:`unime_st.identity.content`."""

from __future__ import annotations

from typing import Any

from unime_st.identity.content import Content, content_id, fingerprint

__all__ = ["content_id", "fingerprint", "media_and_text"]


def media_and_text(item: Any, *, read_files: bool = True) -> tuple[tuple[bytes, ...], str]:
    """Digests of an input's media, and its text, see :class:`~unime_st.identity.content.Content`.

    >>> media, text = media_and_text({"image": "a.png", "text": "a cat"}, read_files=False)
    >>> len(media), text
    (1, 'a cat')
    """
    content = Content(item, read_files=read_files)
    return content.media, content.text
