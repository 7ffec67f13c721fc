"""A search page over an encoded corpus, and ``/v1/embeddings``; needs the extra ``serve``.

``app`` makes the application of ``gate`` (who may ask, and how much), ``requests`` and ``uploads`` (what is asked),
``batching`` (the model, for many at a time) and ``rows`` (what a corpus is shown as); ``server`` listens, ``page/`` is
the page.
"""

from unime_st.serve.app import create_app
from unime_st.serve.limits import Limits

__all__ = ["Limits", "create_app"]
