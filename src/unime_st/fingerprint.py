"""Hashes of what inputs say; see :mod:`unime_st.identity.content`."""

from __future__ import annotations

from typing import Any

from unime_st.identity.content import Content, content_id, fingerprint

__all__ = ["content_id", "content_id_and_media", "fingerprint", "media_and_text"]


def content_id_and_media(item: Any, *, read_files: bool = True) -> tuple[int, tuple[bytes, ...]]:
    """The content's identity and digests of its media, see :class:`~unime_st.identity.content.Content`."""
    content = Content(item, read_files=read_files)
    return content.id, content.media


def media_and_text(item: Any, *, read_files: bool = True) -> tuple[tuple[bytes, ...], str]:
    """Digests of an input's media, and its text, see :class:`~unime_st.identity.content.Content`.

    Example:
        >>> media, text = media_and_text({"image": "a.png", "text": "a cat"}, read_files=False)
        >>> len(media), text
        (1, 'a cat')
    """
    content = Content(item, read_files=read_files)
    return content.media, content.text
