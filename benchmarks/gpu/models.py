"""Random backbones: every family in small, with heads that GPU kernels take, and two at their real shapes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers import models as hf

import tiny

_HEAD = 16  # dimensions of a head: compiled kernels take no fewer


def with_wider_heads() -> None:
    """Make the tests' tiny backbones with heads of 16 dimensions."""
    tiny.TEXT["head_dim"] = _HEAD
    narrow = tiny._qwen_config

    def wide(family: str, text: dict[str, Any], token: Any) -> Any:
        config = narrow(family, text, token)
        config.text_config.rope_parameters["mrope_section"] = [2, 2, 4]
        if family != "qwen3_vl":  # these take a head's size from the width
            config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 1
        return config

    tiny._qwen_config = wide


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {  # Qwen2-VL-2B
        "text": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "mrope_section": [16, 24, 24],
        },
        "vision": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 1536,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
        },
    },
    "qwen3_vl": {  # Qwen3-VL-2B
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mrope_section": [24, 20, 20],
        },
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "num_heads": 16,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
}


def real_backbone(family: str, folder: Path, device: str, *, small: bool) -> dict[str, Any]:
    """Write a backbone of a real shape, bfloat16, with the tests' tokenizer (bytes) and the real image sizes.

    Args:
        family: Of :data:`SHAPES`.
        folder: Where to.
        device: To make the weights on.
        small: In two layers and narrow, for a look.

    Returns:
        Parameters in millions, and the seconds that it took.
    """
    begun = time.monotonic()
    shape = SHAPES[family]
    tokenizer = tiny.tokenizer_for(family)
    config = tiny._config(family, tokenizer)
    text, vision = dict(shape["text"]), dict(shape["vision"])
    if small:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {"num_key_value_heads": 1, "head_dim": 128}
        vision |= {"depth": 3, "num_heads": 2, "deepstack_visual_indexes": [0, 1]}
        vision |= {"embed_dim": 64, "hidden_size": 256} if family == "qwen2_vl" else {"hidden_size": 64}
        vision |= {"out_hidden_size": 256, "intermediate_size": 128}
    sections = text.pop("mrope_section")
    if "head_dim" not in text and family == "qwen2_vl":
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    rope = {
        "rope_type": "default",
        "mrope_section": sections,
        "rope_theta": 1e6,
        "mrope_interleaved": family == "qwen3_vl",
    }
    own = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.02}
    text |= {**own, "max_position_embeddings": 32768, "rope_parameters": rope}
    ids = {name: getattr(config, name) for name in
           ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}  # fmt: skip
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    kind = hf.qwen2_vl.Qwen2VLConfig if family == "qwen2_vl" else hf.qwen3_vl.Qwen3VLConfig
    config = kind(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor = tiny._processor(family, tokenizer)
    edge = vision["patch_size"] * 2
    images = hf.qwen2_vl.Qwen2VLImageProcessor(
        patch_size=vision["patch_size"], size={"shortest_edge": 4 * edge**2, "longest_edge": 1344**2}
    )
    processor.image_processor = images
    processor.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"million parameters": round(count / 1e6), "seconds": round(time.monotonic() - begun, 1)}
