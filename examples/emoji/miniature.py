"""The miniature MLLM: a standard FastVLM checkpoint of real pretrained parts, and the text teacher.

SmolLM2-135M-Instruct (de-quantised from a 4-bit GGUF) is the language model, EfficientNet-lite0 the vision tower,
joined by transformers' own `FastVlmForConditionalGeneration`. `AutoModelForImageTextToText` and `AutoProcessor` load
the folder with no code of ours. The projector between them starts untrained: aligning it is the demo's first step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from emoji.packages import Fetched, whole_folder
from unime_st import build_encoder

FORMAT = 2  # of the folder; a change rebuilds it
STRIDE = 32  # pixels a visual token stands for, each way
VISION_DIM = 1280
IMAGE_TOKEN = "<image>"
STAGE_SIZES = (1, 2, 2, 3, 3, 4, 1)  # blocks a stage of EfficientNet-lite0

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


PROMPT = """\
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
"""The encoder's chat template: what is given, after one token that takes the attention a model has left over."""


def build_miniature(
    fetched: Fetched,
    output_dir: str | Path,
    *,
    layers: Sequence[int] | None = None,
    image_size: int = 160,
    seed: int = 0,
) -> Path:
    """Write the miniature MLLM to `output_dir`, unless it is there with the same settings.

    An image becomes `(image_size / 32) ** 2` visual tokens: 25 at the default 160 px. The folder appears only when
    complete and takes up to 555 MB.

    Args:
        fetched: the unpacked packages.
        output_dir: the checkpoint folder; replaced if it holds a miniature of other settings.
        layers: which layers of the language model (of 30) to keep; None keeps all.
        image_size: side of the square that every image is resized to, a multiple of 32.
        seed: of the untrained projector.

    Raises:
        ValueError: `image_size` or `layers` out of range.
        FileExistsError: `output_dir` is a folder that this function did not make.
    """
    if image_size < STRIDE or image_size % STRIDE:
        raise ValueError(f"`image_size={image_size}`: the vision tower needs a multiple of {STRIDE} pixels, e.g. 160.")
    target = Path(output_dir)
    settings = {
        "format": FORMAT,
        "layers": None if layers is None else list(layers),
        "image_size": image_size,
        "dtype": "float32",
        "seed": seed,
    }
    marker = target / "miniature.json"
    if target.exists():
        if not marker.is_file():
            raise FileExistsError(f"{target} exists and is not a miniature made here. Give another `output_dir`.")
        if json.loads(marker.read_text()) == settings:
            return target
    model, tokenizer = _assemble(fetched, layers, seed)
    with whole_folder(target) as scratch:
        model.save_pretrained(scratch)
        make_processor(tokenizer, image_size).save_pretrained(scratch)
        (scratch / marker.name).write_text(json.dumps(settings, indent=2) + "\n")
    return target


def start_encoder(backbone: Path) -> SentenceTransformer:
    """An encoder of a miniature: the mean over all tokens, L2-normalised, where UniME reads the last one."""
    model = build_encoder(backbone, prompt_template=PROMPT, device="cpu")
    model[1] = Pooling(model.get_embedding_dimension(), pooling_mode="mean")
    return model


def text_teacher(fetched: Fetched) -> SentenceTransformer:
    """The text teacher of stage 1: all-MiniLM-L6-v2, 384 dimensions, unit length."""
    return SentenceTransformer(str(fetched.teacher), device="cpu")


def init_projector(model: FastVlmForConditionalGeneration, seed: int = 0) -> None:
    """Start a FastVLM's projector at random, its outputs about as long as word embeddings; in place."""
    projector = model.model.multi_modal_projector
    scale = model.model.language_model.embed_tokens.weight.float().std()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.weight.shape[1] ** -0.5)
            layer.bias.zero_()
        projector.linear_2.weight.mul_(scale)


def make_processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    """The miniature's processor: plain bicubic resize to a square and (x - 127) / 128, transparency on white."""
    square = {"height": image_size, "width": image_size}
    images = LlavaImageProcessor(
        size=square,
        crop_size=square,  # read by the processor to count visual tokens, though nothing is cropped
        do_center_crop=False,
        resample=3,  # bicubic
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def load_vision_state(path: Path) -> dict[str, torch.Tensor]:
    """Read the packaged EfficientNet-lite0 (tensors, never pickled code) under timm's names, without classifier."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {_timm_name(name): value for name, value in state.items() if not name.startswith("_fc.")}


def _timm_name(name: str) -> str:
    """Translate a parameter name of the package into timm's."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        module, leaf = name.split(".")
        return {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}[module] + "." + leaf
    index, module, leaf = int(match[1]), match[2], match[3]
    if index == 0:  # the first block does not expand: its norms and convolutions count from there
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
        names |= {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}
    stage = 0
    while index >= STAGE_SIZES[stage]:
        index -= STAGE_SIZES[stage]
        stage += 1
    return f"blocks.{stage}.{index}.{names[module]}.{leaf}"


def _assemble(
    fetched: Fetched, layers: Sequence[int] | None, seed: int
) -> tuple[FastVlmForConditionalGeneration, PreTrainedTokenizerBase]:
    """Put the parts together in float32 and check that no weight is left over or missing."""
    text_config, text_state = _language_model(fetched.gguf, layers)
    tokenizer = AutoTokenizer.from_pretrained(fetched.gguf.parent, gguf_file=fetched.gguf.name, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.model_max_length = text_config.max_position_embeddings
    text_config.vocab_size = -(-len(tokenizer) // 64) * 64
    table = text_state["model.embed_tokens.weight"]
    text_state["model.embed_tokens.weight"] = torch.cat(  # new rows start at the mean word
        [table, table.mean(0, keepdim=True).expand(text_config.vocab_size - len(table), -1)]
    )
    config = FastVlmConfig(
        text_config=text_config.to_dict(),
        vision_config=_vision_config(),
        image_token_index=tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)[0],
        projector_hidden_act="linear",  # so that a least-squares fit can be written into it
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    state = {f"model.vision_tower.timm_model.{k}": v for k, v in load_vision_state(fetched.vision_state).items()}
    state |= {f"model.language_model.{k.removeprefix('model.')}": v for k, v in text_state.items()}
    state["lm_head.weight"] = text_state["model.embed_tokens.weight"]
    outcome = model.load_state_dict(state, strict=False)
    missing = [name for name in outcome.missing_keys if "multi_modal_projector" not in name]
    if missing or outcome.unexpected_keys:
        raise RuntimeError(f"The packaged weights do not fit: missing {missing}, left over {outcome.unexpected_keys}.")
    model.tie_weights()
    init_projector(model, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _vision_config() -> dict[str, Any]:
    """Pooling off: FastVLM projects each position of the last feature map, (B, 1280, h, w)."""
    return {
        "model_type": "timm_wrapper",
        "architecture": "tf_efficientnet_lite0",
        "hidden_size": VISION_DIM,
        "do_pooling": False,
        "model_args": {},
        "num_classes": 0,
        "label_names": [],
    }


def _language_model(gguf: Path, layers: Sequence[int] | None) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """De-quantise the GGUF: its plain config, and its float32 weights without the tied output layer.

    transformers leaves what it reads from a GGUF flagged as quantised, so that it can be neither saved nor cast: config
    and weights are taken out of it here and the flag stays behind.
    """
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    depth = settings["num_hidden_layers"]
    kept = list(range(depth)) if layers is None else list(layers)
    if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < depth:
        raise ValueError(f"`layers={layers}`: give ascending numbers from 0 to {depth - 1}, each once, or None.")
    renamed = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, value in quantised.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None and name != "lm_head.weight":
            state[name] = value.float()
        elif layer is not None and int(layer[1]) in renamed:
            state[f"model.layers.{renamed[int(layer[1])]}.{name[layer.end() :]}"] = value.float()
    return LlamaConfig(**settings | {"num_hidden_layers": len(kept)}), state
