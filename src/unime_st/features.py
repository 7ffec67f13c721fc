"""Rows of preprocessed features: which there are, and some of them without the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unime_st.placement import IMAGES, NUMBERS, AtHand, images_of_rows, ranges, read
from unime_st.step_encoder import StepEncoder

_GRIDS = (  # families that put the patches of all media one after the other, with a grid each (Qwen-VL)
    ("image_grid_thw", "pixel_values", "num_images_per_sample"),
    ("video_grid_thw", "pixel_values_videos", "num_videos_per_sample"),
)
_BY_IMAGE = ("pixel_values", "image_sizes", "image_position_ids")
_BY_ROW_OF_IMAGES = ("pixel_attention_mask", "aspect_ratio_ids")  # families that pad the images of each row (Idefics3)


def num_rows(features: Mapping[str, Any]) -> int:
    """Rows of a column of features, ``B``."""
    if isinstance(features.get("cu_seq_lens_q"), Tensor):  # packed into one sequence
        return len(features["cu_seq_lens_q"]) - 1
    for key in ("input_ids", "attention_mask"):
        if isinstance(features.get(key), Tensor):
            return len(features[key])
    return next(len(value) for value in features.values() if isinstance(value, Tensor) and value.ndim > 0)


def token_counts(features: Mapping[str, Any]) -> Tensor | None:
    """Tokens of each row, padding left out, ``(B,)``; None where the features have no attention mask."""
    mask = features.get("attention_mask")
    return mask.sum(dim=1) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def select_rows(features: Mapping[str, Any], rows: Sequence[int], *, trim_leading: bool = False) -> dict[str, Any]:
    """Take some rows, with the media that are theirs, and without the padding that they do not need.

    Tensors have an entry for each row, each image or each patch of all images; other values stay as they are. Padding
    behind the rows always goes, with ``trim_leading`` that before them too, which moves absolute positions.
    """
    if "cu_seq_lens_q" in features:
        raise ValueError(
            "These features are packed into one sequence without padding, which cannot be cut into rows. Load the "
            "model with `unime_st.load_encoder`, or set `unpad_inputs=False` on its Transformer."
        )
    total = num_rows(features)
    chosen = torch.as_tensor(rows, dtype=torch.long)
    entries = _media_entries(features, chosen, total)
    start, end, width = _kept_columns(features, chosen, trim_leading)
    selected: dict[str, Any] = {}
    if IMAGES in features:
        selected |= _images_of(features, chosen)
        features = {key: value for key, value in features.items() if key not in (IMAGES, NUMBERS)}
    for key, value in features.items():
        if isinstance(value, AtHand):
            continue  # it is of all rows
        if not isinstance(value, Tensor):
            selected[key] = value
            continue
        if key == "pixel_values_videos" and key not in entries and len(value) != total:
            raise ValueError(
                f"A batch of {total} rows shows {len(value)} videos, and the features of this family do not tell which "
                "row shows which. Embed such a batch at once: leave out `mini_batch_size` and `mini_batch_num_tokens`."
            )
        index = entries.get(key, chosen)
        if len(index) == 0:
            continue  # no media in these rows
        is_medium = key in entries or key in _BY_IMAGE or key in _BY_ROW_OF_IMAGES
        by_token = not is_medium and value.ndim >= 2 and value.shape[1] == width
        needed = value[:, start:end] if by_token else value
        selected[key] = needed.index_select(0, index.to(value.device))
    return selected


def _images_of(features: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The distinct images of some rows, none if they show none; on a device all of the batch stay where they are."""
    images, numbers = features[IMAGES], features[NUMBERS]
    told = read(features, NUMBERS)
    assert told is not None
    shown = told.index_select(0, rows)
    if not bool((shown >= 0).any()):
        return {}
    if any(value.device.type != "cpu" for value in images.values()):
        return {IMAGES: images, NUMBERS: numbers.index_select(0, rows.to(numbers.device))}
    images, kept = images_of_rows(images, shown)
    return {IMAGES: images, NUMBERS: kept.to(numbers.device)}


def _kept_columns(features: Mapping[str, Any], rows: Tensor, trim_leading: bool) -> tuple[int, int, int]:
    """First and last column that the rows need, and the columns there are; (0, 0, -1) without an attention mask."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return 0, 0, -1
    width = mask.shape[1]
    needed = mask.index_select(0, rows.to(mask.device)).bool()
    expansion = features.get("query_expansion_positions")  # of late-interaction models: masked, but scored
    if isinstance(expansion, Tensor):
        needed |= expansion.index_select(0, rows.to(mask.device)).bool()
    columns = needed.any(dim=0).nonzero().flatten()
    if len(columns) == 0:
        return 0, width, width
    first, last = torch.stack([columns[0], columns[-1]]).tolist()
    return first if trim_leading else 0, last + 1, width


def _media_entries(features: Mapping[str, Any], rows: Tensor, total: int) -> dict[str, Tensor]:
    """Entries that belong to the rows, of each tensor that has no entry for each row."""
    entries: dict[str, Tensor] = {}
    for grid_key, pixel_key, count_key in _GRIDS:
        grid, counts = features.get(grid_key), features.get(count_key)
        if not isinstance(grid, Tensor) or not isinstance(features.get(pixel_key), Tensor):
            continue
        if not isinstance(counts, Tensor):
            counts = torch.ones(total, dtype=torch.long)
        media = ranges(counts.cpu(), rows)
        entries[grid_key] = media
        if grid_key == "video_grid_thw" and isinstance(features.get("second_per_grid_ts"), Tensor):
            entries["second_per_grid_ts"] = media
        entries[pixel_key] = ranges(grid.cpu().prod(dim=1), media)
    counts = features.get("num_videos_per_sample")
    if isinstance(counts, Tensor) and "pixel_values_videos" in features and "pixel_values_videos" not in entries:
        entries["pixel_values_videos"] = ranges(counts.cpu(), rows)  # frames of a video stand in it (LLaVA-OneVision)
    counts, pixels = features.get("num_images_per_sample"), features.get("pixel_values")
    by_row = any(key in features for key in _BY_ROW_OF_IMAGES)
    if isinstance(counts, Tensor) and isinstance(pixels, Tensor) and "pixel_values" not in entries and not by_row:
        images = int(counts.sum())
        media = ranges(counts.cpu(), rows)
        entries |= {key: media for key in _BY_IMAGE if key in features and len(features[key]) == images}
    return entries


def forget_kept_features(model: Any) -> None:
    """Empty the caches that keep features of a frozen vision tower between calls.

    Features differ in the last bits with the batch they were made in, and a run that goes on has none of before: to
    give the same bytes as one never stopped, both forget at the same points.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, StepEncoder):
            module.forget_features()


def check_finite(embeddings: Any, inputs: Sequence[Any]) -> Any:
    """Refuse NaN and infinity among the embeddings (N, D) of inputs; whatever else a model gave passes through."""
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or bool(torch.isfinite(embeddings).all()):
        return embeddings
    broken = (~torch.isfinite(embeddings).all(dim=1)).nonzero()[:, 0].tolist()
    row = getattr(inputs, "first_row", 0) + broken[0]
    raise ValueError(
        f"The model gave NaN or infinity for row {row} ({inputs[broken[0]]!r:.80}) and {len(broken) - 1} more of "
        f"{len(embeddings)}. Its weights may have diverged; if not, load it in float32 or bfloat16, not in float16."
    )
