"""An encoder in LanceDB's registry of embedding functions, for texts, images and both together."""

from __future__ import annotations

from typing import Any

import numpy as np
from lancedb.embeddings import EmbeddingFunction, register
from pydantic import PrivateAttr

from unime_st.modules import load_encoder


@register("unime_st")
class UnimeEmbeddings(EmbeddingFunction):
    """Embeds a table's source column, and what it is searched by, with an encoder.

    Import this module before a table that uses it is opened: its metadata hold the name ``"unime_st"`` and the
    arguments below. A query is a text, an image (PIL, bytes) or ``{"image": ..., "text": ...}``.

    Args:
        model: Folder or Hub name of a saved encoder.
        images: Strings of the source column are paths of images, not texts. Bytes are images anyway.
        batch_size: Inputs encoded at once.
        device: Of the encoder; None takes the best there is.
        max_retries: How often LanceDB tries again after an error; 0, for a broken input stays broken.
    """

    model: str
    images: bool = False
    batch_size: int = 16
    device: str | None = None
    max_retries: int = 0
    _encoder: Any = PrivateAttr(default=None)

    def ndims(self) -> int:
        """The number of dimensions of the embeddings."""
        return int(self._loaded().get_embedding_dimension())

    def compute_query_embeddings(self, *args: Any, **_: Any) -> list[np.ndarray | None]:
        """Embed one query; see the class."""
        return self._encoded([args[0]])

    def compute_source_embeddings(self, *args: Any, **_: Any) -> list[np.ndarray | None]:
        """Embed cells of the source column: texts, bytes of images or paths of images."""
        cells = self.sanitize_input(args[0])
        return self._encoded([{"image": cell} if self.images and isinstance(cell, str) else cell for cell in cells])

    def _encoded(self, items: list[Any]) -> list[np.ndarray | None]:
        told = [{"text": item} if isinstance(item, str) else item for item in items]
        return list(self._loaded().encode(told, batch_size=self.batch_size, show_progress_bar=False))

    def _loaded(self) -> Any:
        if self._encoder is None:
            self._encoder = load_encoder(self.model, device=self.device)
        return self._encoder
