"""What the rows of a batch *are*, apart from how they are embedded: the integers false negatives are recognised by."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unime_st import distributed
from unime_st.features import num_rows
from unime_st.placement import IMAGES, LATE, LATE_ROWS, NUMBERS

logger = logging.getLogger(__name__)

CONTENT_KEY = "content_id"
_MEDIA_KEYS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
_TOLD_BY_CONTENT = {  # tensors that follow from the tokens and the content
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "content_id", "prefix_key"),
    *("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "image_position_ids"),
    *("num_images_per_sample", "batch_num_images", "aspect_ratio_ids", NUMBERS, LATE_ROWS),
    *("pixel_values_videos", "video_grid_thw", "num_videos_per_sample", "second_per_grid_ts"),
    *("token_embeddings", "sentence_embedding"),  # which a forward pass has put there: MatryoshkaLoss asks twice
}


def mix64(x: Tensor) -> Tensor:
    """Scramble 64-bit integers one to one (the finaliser of splitmix64), on any device."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        logical = (x >> shift) & ((1 << (64 - shift)) - 1)  # torch's own shift drags the sign along
        x = (x ^ logical) * factor
    return x


def hash_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hash each row's tokens ``(B, T)``, ``(B,)`` >= 0, the same whichever side and however far it is padded.

    >>> left = hash_tokens(torch.tensor([[0, 7, 8]]), torch.tensor([[0, 1, 1]]))
    >>> right = hash_tokens(torch.tensor([[7, 8]]), torch.tensor([[1, 1]]))
    >>> bool(left == right)
    True
    """
    active = attention_mask.long()
    position = active.cumsum(dim=1)  # 1, 2, ... over the tokens that count
    mixed = mix64(mix64(input_ids.long() + 1) + mix64(-position))
    return (mixed * active).sum(dim=1) & (2**63 - 1)


def content_ids(features: Mapping[str, Any]) -> Tensor | None:
    """Integer identity of each row's content in one column, ``(B,)``, or None when it cannot be told.

    It is the feature ``content_id`` of our encoder. Without that, rows of text are told apart by their tokens (a prompt
    among them counts); images, and text packed without padding, are not.
    """
    if CONTENT_KEY in features:
        return features[CONTENT_KEY]
    tokens, mask = features.get("input_ids"), features.get("attention_mask")
    text_only = not any(features.get(key) is not None for key in (*_MEDIA_KEYS, IMAGES, LATE))
    if text_only and isinstance(tokens, Tensor) and isinstance(mask, Tensor) and tokens.shape == mask.shape:
        return hash_tokens(tokens, mask)
    return None


def batch_identities(columns: Sequence[Mapping[str, Any]]) -> tuple[Tensor | None, list[int]]:
    """Identities of a batch, ``(B, n_columns)``, from the features of each column, and the numbers of unknown columns.

    A column whose content is unknown gets numbers below 0 that occur nowhere else in the global batch, so its rows
    equal nothing. None when no column is known.
    """
    known = [content_ids(features) for features in columns]
    unknown = [index for index, ids in enumerate(known) if ids is None]
    if len(unknown) == len(columns):
        return None, unknown
    example = next(ids for ids in known if ids is not None)
    nothing = equal_to_nothing(len(example), len(columns), example.device)
    filled = [nothing[:, index] if ids is None else ids.long() for index, ids in enumerate(known)]
    return torch.stack(filled, dim=1), unknown


def input_keys(columns: Sequence[Mapping[str, Any]]) -> Tensor:
    """Integer identity ``(n_columns, B)`` of each input as the model gets it, its instruction included.

    Equal numbers are the same to the model, so they need embedding only once. A column whose inputs cannot be told
    (images without ``content_id``, or tensors that are not known) gets numbers below 0 that occur nowhere else.

    >>> words = {"input_ids": torch.tensor([[7], [8], [7]]), "attention_mask": torch.ones(3, 1)}
    >>> first, second, third = input_keys([words])[0].tolist()
    >>> first == third, first == second
    (True, False)
    """
    known = [_input_keys(features) for features in columns]
    example = next((keys for keys in known if keys is not None), None)
    batch = num_rows(columns[0])
    device = next(value.device for value in columns[0].values() if isinstance(value, Tensor))
    nothing = equal_to_nothing(batch, len(columns), device if example is None else example.device)
    return torch.stack([nothing[:, index] if keys is None else keys for index, keys in enumerate(known)])


def _input_keys(features: Mapping[str, Any]) -> Tensor | None:
    content = content_ids(features)
    tokens, mask = features.get("input_ids"), features.get("attention_mask")
    unknown = any(isinstance(value, Tensor) and key not in _TOLD_BY_CONTENT for key, value in features.items())
    if content is None or unknown or not (isinstance(tokens, Tensor) and isinstance(mask, Tensor)):
        return None
    others = (
        (key, value) for key, value in features.items() if not isinstance(value, Tensor) and key not in (IMAGES, LATE)
    )
    settings = sorted((key, repr(value)) for key, value in others)
    salt = int.from_bytes(hashlib.blake2b(repr(settings).encode(), digest_size=7).digest(), "big")
    return mix64(mix64(content.long() + salt) + hash_tokens(tokens, mask)) & (2**63 - 1)


def equal_to_nothing(batch: int, columns: int, device: torch.device) -> Tensor:
    """Numbers below 0, ``(B, n_columns)``, that occur nowhere else in the global batch, for unknown contents."""
    rows = torch.arange(batch, device=device) + distributed.rank() * batch
    total = batch * distributed.world_size()
    return -1 - (rows[:, None] + total * torch.arange(columns, device=device))
