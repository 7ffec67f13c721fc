"""Loading a saved encoder, or a published model that is a plain transformers repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from unime_st.modules.build import build_encoder
from unime_st.modules.checks import check_family
from unime_st.modules.options import check_device, check_dtype, check_sizes, weight_options
from unime_st.modules.saved import folder_of, holds_saved_encoder, saved_parts
from unime_st.modules.sentence_transformer import MultimodalSentenceTransformer
from unime_st.published import PUBLISHED, PublishedCheckpoint, published_checkpoint
from unime_st.videos import VideoSettings


def load_encoder(
    path: str | Path,
    *,
    published: str | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    truncate_dim: int | None = None,
    allow_remote_images: bool = False,
    videos: VideoSettings | None = None,
    late_media: int | None = None,
    text_only: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Load a saved encoder with our module in place of the stock one, or a published model.

    Args:
        path: a folder, or a Hub name, of a saved encoder; or of a model of :data:`unime_st.published.PUBLISHED`, which
            is a plain transformers repository.
        published: the Hub name of the published model that the folder is a copy of.
        torch_dtype: type of the weights; "auto" keeps the checkpoint's.
        attn_implementation: attention of transformers.
        device: where to put the model; None chooses.
        truncate_dim: as in :func:`build_encoder`; it is not saved, as in stock code.
        allow_remote_images: open images at ``http(s)`` addresses; a checkpoint's own settings never allow it.
        videos: which frames of a video are shown and how large, a :class:`~unime_st.videos.VideoSettings`; None takes
            what was saved, else its defaults.
        late_media: as in :func:`build_encoder`; it is not saved.
        text_only: as in :func:`build_encoder`.
        model_kwargs: more arguments of ``from_pretrained``.
        processor_kwargs: more arguments of the processor.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no sentence-transformers checkpoint and no published
            model is named.
        ValueError: weights are missing, a file is damaged, an adapter was not loaded, or the folder holds another model
            than `published`.
    """
    check_sizes(truncate_dim=truncate_dim)
    check_device(device)
    check_dtype(torch_dtype)
    folder = folder_of(path)
    options: dict[str, Any] = {
        "processor_kwargs": processor_kwargs,
        "allow_remote_images": allow_remote_images,
        "videos": videos,
        "late_media": late_media,
        "text_only": text_only,
    }
    if not holds_saved_encoder(folder) and (published is not None or str(path) in PUBLISHED):
        return _load_published(
            folder,
            published_checkpoint(published or str(path)),
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            model_kwargs=model_kwargs,
            device=device,
            truncate_dim=truncate_dim,
            **options,
        )
    if holds_saved_encoder(folder) and published is not None:
        raise ValueError(f"{folder} is a saved encoder, which knows its prompts. Leave `published` out.")
    weights = weight_options(torch_dtype, attn_implementation, model_kwargs)
    parts = saved_parts(folder, model_kwargs=weights, **options)
    return MultimodalSentenceTransformer(device=device, truncate_dim=truncate_dim, **parts)


def _load_published(folder: Path, known: PublishedCheckpoint, **options: Any) -> SentenceTransformer:
    model = build_encoder(folder, prompt_template=known.prompts, **options)
    backbone: Any = model[0].model
    check_family(backbone, known)
    if known.pixels is not None:
        encoder: Any = model[0]
        encoder.processor.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), known.pixels, strict=True))
    return model
