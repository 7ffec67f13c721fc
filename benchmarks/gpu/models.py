"""Random backbones: every family in small, with heads that GPU kernels take, and two at their real shapes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText
from transformers import models as hf

import tiny
from unime_st import build_encoder, export_encoder

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


# fmt: off
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {  # Qwen2-VL-2B
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                 "num_key_value_heads": 2, "head_dim": 128},
        "sections": [16, 24, 24],
        "vision": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4,
                   "patch_size": 14},
        "small": {"embed_dim": 64, "hidden_size": 256},
    },
    "qwen3_vl": {  # Qwen3-VL-2B
        "text": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
                 "num_key_value_heads": 8, "head_dim": 128},
        "sections": [24, 20, 20],
        "vision": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048,
                   "num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304,
                   "deepstack_visual_indexes": [5, 11, 17]},
        "small": {"hidden_size": 64},
    },
}
SMALL_TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 128}
SMALL_VISION = {"depth": 3, "num_heads": 2, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 256,
                "intermediate_size": 128}
# fmt: on
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


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
    tokenizer = tiny.tokenizer_for(family)
    vision = real_vision(family, small=small)
    kind = hf.qwen2_vl.Qwen2VLConfig if family == "qwen2_vl" else hf.qwen3_vl.Qwen3VLConfig
    tiny_config = tiny._config(family, tokenizer)
    ids = {name: getattr(tiny_config, name) for name in IDS}
    config = kind(text_config=real_text(family, tokenizer, small=small), vision_config=vision, **ids)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor = tiny._processor(family, tokenizer)
    size = {"shortest_edge": 4 * (2 * vision["patch_size"]) ** 2, "longest_edge": 1344**2}
    processor.image_processor = hf.qwen2_vl.Qwen2VLImageProcessor(patch_size=vision["patch_size"], size=size)
    processor.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"million parameters": round(count / 1e6), "seconds": round(time.monotonic() - begun, 1)}


def real_text(family: str, tokenizer: Any, *, small: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": SHAPES[family]["sections"], "rope_theta": 1e6}
    rope["mrope_interleaved"] = family == "qwen3_vl"
    own = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.02}
    own |= {"max_position_embeddings": 32768, "rope_parameters": rope}
    return SHAPES[family]["text"] | (SMALL_TEXT if small else {}) | own


def real_vision(family: str, *, small: bool) -> dict[str, Any]:
    smaller = SMALL_VISION | SHAPES[family]["small"] if small else {}
    return SHAPES[family]["vision"] | smaller | {"spatial_merge_size": 2, "temporal_patch_size": 2}


def with_peer(
    family: str, folder: Path, given: Any, peft_config: Any = None
) -> tuple[SentenceTransformer, SentenceTransformer, dict[str, Any]]:
    """An encoder of a real shape, stock sentence-transformers with the same weights, and what is told of them."""
    about = real_backbone(family, folder / "backbone", given.device, small=given.tiny)
    options = {"device": given.device, "torch_dtype": "bfloat16"}
    ours = build_encoder(folder / "backbone", **options)
    export_encoder(ours, folder / "encoder")
    if peft_config is not None:
        ours = build_encoder(folder / "backbone", **options, peft_config=peft_config)
    kwargs = {"dtype": torch.bfloat16}
    return ours, SentenceTransformer(str(folder / "encoder"), device=given.device, model_kwargs=kwargs), about
