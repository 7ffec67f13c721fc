"""Tiny random backbones of every family, made from configs: real architectures, nothing downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers import models as hf

from unime_st import build_encoder
from unime_st.models.phi3_v import Phi3VConfig, Phi3VImageProcessor, Phi3VProcessor

FAMILIES = (
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "gemma3",
    "fast_vlm",
)
PLUGIN_FAMILIES = ("phi3_v",)
"""Those that stock code cannot load: transformers lacks them."""

SPECIAL = {
    "llava_next": ["<image>"],
    "llava_onevision": ["<|im_start|>", "<|im_end|>", "<image>", "<video>"],
    "qwen2_vl": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics3": ["<|im_start|>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    "fast_vlm": ["<|im_start|>", "<|im_end|>", "<image>"],
    "phi3_v": ["<|user|>", "<|end|>", "<|assistant|>", "<|image|>"],
}
SPECIAL["qwen2_5_vl"] = SPECIAL["qwen3_vl"] = SPECIAL["qwen2_vl"]
SPECIAL["smolvlm"] = [*SPECIAL["idefics3"], "<video>"]

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "head_dim": 8,
    "initializer_range": 0.3,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.3,
}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture with two halves, so that it differs from others in more than its mean."""
    image = Image.new("RGB", size, color)
    image.paste(Image.new("RGB", (size[0] // 2, size[1]), "blue"), (0, 0))
    return image


def tokenizer_for(family: str, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's special tokens, whole words if wanted, and no merges."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    extra: dict[str, Any] = {}
    if family == "gemma3":
        extra = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    elif family in ("idefics3", "smolvlm"):
        extra = {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        }
    elif family == "phi3_v":
        extra = {"image_token": "<|image|>"}
    elif "<|image_pad|>" in SPECIAL[family]:
        extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        extra |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    else:
        extra = {"image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=4096,
        extra_special_tokens=extra,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(list(words))
    if family == "phi3_v":  # the published one opens every text with <s>
        opening = ("<bos>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[opening])
    return tokenizer


def tiny_backbone(family: str, folder: Path, seed: int = 0, words: Sequence[str] = ()) -> Path:
    """Write a random backbone of a family to `folder`, as its published checkpoints are laid out."""
    tokenizer = tokenizer_for(family, words)
    config = _config(family, tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some projectors start at zero: nothing of an image would pass
            if parameter.abs().max() == 0 or parameter.ndim > 3:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    _processor(family, tokenizer).save_pretrained(folder)
    return folder


def tiny_encoder(family: str, folder: Path, **kwargs: Any) -> SentenceTransformer:
    """An encoder on a tiny random backbone."""
    return build_encoder(tiny_backbone(family, folder), device="cpu", **kwargs)


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    text = {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    if family == "llava_next":
        return hf.llava_next.LlavaNextConfig(
            text_config={"model_type": "llama", **text},
            vision_config={"model_type": "clip_vision_model", **CLIP},
            image_token_index=token("<image>"),
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        )
    if family == "llava_onevision":
        return hf.llava_onevision.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={"model_type": "siglip_vision_model", **CLIP},
            image_token_index=token("<image>"),
            video_token_index=token("<video>"),
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
            vision_feature_layer=-1,
        )
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        return _qwen_config(family, text, token)
    if family in ("idefics3", "smolvlm"):
        module = getattr(hf, family)
        name = "Idefics3Config" if family == "idefics3" else "SmolVLMConfig"
        return getattr(module, name)(
            text_config={"model_type": "llama", **text},
            vision_config={**CLIP, "patch_size": 7},
            image_token_id=token("<image>"),
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    if family == "gemma3":
        return hf.gemma3.Gemma3Config(
            text_config={"model_type": "gemma3_text", **text, "sliding_window": 64, "query_pre_attn_scalar": 8},
            vision_config={**CLIP, "vision_use_head": False},
            mm_tokens_per_image=4,
            boi_token_index=token("<start_of_image>"),
            eoi_token_index=token("<end_of_image>"),
            image_token_index=token("<image_soft_token>"),
        )
    if family == "phi3_v":
        return phi3_v_config(tokenizer)
    return hf.fast_vlm.FastVlmConfig(
        text_config={"model_type": "llama", **text},
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "test_efficientnet",
            "do_pooling": False,
            "num_classes": 0,
            "hidden_size": 256,
            "label_names": [],
            "model_args": {},
        },
        image_token_index=token("<image>"),
    )


def phi3_v_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Phi3VConfig:
    """Phi-3-Vision in small: crops of 56 pixels, 4 embeddings each; long rope beyond 128 tokens."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    published = {
        "img_processor": {
            "image_dim_out": 32,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 4,
        },
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", **factors},
        "vision_config": {**CLIP, "num_hidden_layers": 3, "image_size": 56, "initializer_factor": 3.0},
    }
    return Phi3VConfig(
        **text,
        **{**published, **changes},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )


def _qwen_config(family: str, text: dict[str, Any], token: Any) -> Any:
    ids = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
    ids |= {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**text, "rope_parameters": rope}
    if family == "qwen2_vl":
        vision: dict[str, Any] = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return hf.qwen2_vl.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    if family == "qwen2_5_vl":
        vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return hf.qwen2_5_vl.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return hf.qwen3_vl.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


def _processor(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    square = {"height": 28, "width": 28}
    if family == "llava_next":
        images = hf.llava_next.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
        )
        return hf.llava_next.LlavaNextProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if family == "llava_onevision":
        images = hf.llava_onevision.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
        )
        videos = hf.llava_onevision.LlavaOnevisionVideoProcessor(size=square)
        return hf.llava_onevision.LlavaOnevisionProcessor(
            images, tokenizer, videos, num_image_tokens=4, vision_feature_select_strategy="full"
        )
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
        images = hf.qwen2_vl.Qwen2VLImageProcessor(patch_size=14, size=size)
        if family == "qwen3_vl":
            videos = hf.qwen3_vl.Qwen3VLVideoProcessor(patch_size=14, size=size)
            return hf.qwen3_vl.Qwen3VLProcessor(images, tokenizer, videos)
        videos = hf.qwen2_vl.Qwen2VLVideoProcessor(patch_size=14, size=size)
        kind = hf.qwen2_vl.Qwen2VLProcessor if family == "qwen2_vl" else hf.qwen2_5_vl.Qwen2_5_VLProcessor
        return kind(images, tokenizer, videos)
    if family in ("idefics3", "smolvlm"):
        sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
        if family == "idefics3":
            images = hf.idefics3.Idefics3ImageProcessor(**sizes, do_image_splitting=False)
            return hf.idefics3.Idefics3Processor(images, tokenizer, image_seq_len=4)
        images = hf.smolvlm.SmolVLMImageProcessor(**sizes, do_image_splitting=False)
        videos = hf.smolvlm.SmolVLMVideoProcessor(**sizes, do_image_splitting=False)
        return hf.smolvlm.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)
    if family == "gemma3":
        return hf.gemma3.Gemma3Processor(hf.gemma3.Gemma3ImageProcessor(size=square), tokenizer, image_seq_length=4)
    if family == "phi3_v":
        images = Phi3VImageProcessor(num_crops=4, num_img_tokens=4, size={"height": 56, "width": 56})
        return Phi3VProcessor(images, tokenizer)
    images = hf.llava.LlavaImageProcessor(size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64})
    return hf.llava.LlavaProcessor(images, tokenizer, patch_size=32, vision_feature_select_strategy="full")
