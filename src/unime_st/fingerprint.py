"""Hashes of what inputs say; see :mod:`unime_st.identity.content`."""

from unime_st.identity.content import content_id, fingerprint, media_and_text

__all__ = ["content_id", "fingerprint", "media_and_text"]
