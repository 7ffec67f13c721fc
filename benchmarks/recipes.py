"""What the recipes ask of a GPU, computed: parameters and an estimate of memory, from the backbones' shapes.

    python benchmarks/recipes.py

No weights and no network: the shapes of the published configurations are below, models are made on the meta device, and
the estimate is that of `--dry-run` (`unime_st.training.planning.memory` says what it leaves out). Writes
`benchmarks/results/recipes.json`, from which `benchmarks/readme.py` makes the table in `docs/recipes.md`.
"""

from __future__ import annotations

from basics import RESULTS, ROOT, keep, parser

# isort: split
import json
import tempfile
from pathlib import Path
from typing import Any

from dry_run import planned_model
from recipe import Stage1Recipe, Stage2Recipe, read_recipe
from transformers import models as hf

from unime_st.models.phi3_v import Phi3VConfig
from unime_st.training.planning import GIB, flops_of_a_row, memory, parameters_by_part

PROCESSES = 8
QWEN = {"qwen2_vl": 14, "qwen3_vl": 16}  # backbones that keep an image's resolution -> pixels a side of a patch
SIDES = (224, 448, 896, 1344)
PAIR_TOKENS = 80  # prompts, templates, a question and a caption
TOKENS_A_TEXT = 64  # of stage 1, whose mini-batches are counted in texts

CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}


def shape(backbone: str) -> Any:
    """The configuration of a backbone, as far as it decides what its parts weigh."""
    if backbone == "phi3_v":
        text = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32}
        embedding = {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp"}
        embedding |= {"use_hd_transform": True, "with_learnable_separator": True}
        return Phi3VConfig(**text, vocab_size=32064, embd_layer=embedding, pad_token_id=32000)
    if backbone == "llava_next":
        text = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        text |= {"num_key_value_heads": 8, "vocab_size": 32064, "model_type": "mistral"}
        return hf.llava_next.LlavaNextConfig(text_config=text, vision_config=CLIP | {"model_type": "clip_vision_model"})
    if backbone == "llava_onevision":
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        text |= {"num_key_value_heads": 4, "vocab_size": 152000, "model_type": "qwen2"}
        vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
        vision |= {"image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"}
        return hf.llava_onevision.LlavaOnevisionConfig(text_config=text, vision_config=vision)
    if backbone == "qwen2_vl":
        text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        text |= {"num_key_value_heads": 2, "vocab_size": 151936}
        vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
        return hf.qwen2_vl.Qwen2VLConfig(text_config=text, vision_config=vision)
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048, "num_heads": 16}
    vision |= {"patch_size": 16, "deepstack_visual_indexes": [5, 11, 17]}
    return hf.qwen3_vl.Qwen3VLConfig(text_config=text, vision_config=vision)


def recipe_path(stage: int, backbone: str) -> Path:
    return ROOT / "examples" / "recipes" / f"stage{stage}_{backbone}.yaml"


def plan(stage: int, backbone: str) -> dict[str, Any]:
    """The settings, parameters and memory of a recipe."""
    kind = Stage1Recipe if stage == 1 else Stage2Recipe
    recipe = read_recipe(kind, recipe_path(stage, backbone))
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(shape(backbone).to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        model, _ = planned_model(read_recipe(kind, recipe_path(stage, backbone), [f"backbone={folder}"]))
    training, loss = recipe.training, recipe.loss
    tokens = loss.get("mini_batch_num_tokens") or loss["mini_batch_size"] * TOKENS_A_TEXT
    parts = parameters_by_part(model)
    sizes = memory(model, tokens, checkpointing=bool(training.get("gradient_checkpointing")))
    if stage == 2 and backbone in QWEN:
        by_side = {str(side): _of_a_pair(model, backbone, side) for side in SIDES}
    else:
        by_side = {}
    return {
        "by_side": by_side,
        "rank": recipe.lora["rank"],
        "learning_rate": training["learning_rate"],
        "global_batch": training["per_device_train_batch_size"] * PROCESSES,
        "length": f"{training['max_steps']:,} steps"
        if "max_steps" in training
        else f"{training['num_train_epochs']} epochs",
        "trained": sum(trained for trained, _ in parts.values()),
        "frozen": sum(frozen for _, frozen in parts.values()),
        "tokens_a_pass": tokens,
        "gib": {name: round(size / GIB, 2) for name, size in sizes.items()},
    }


def _of_a_pair(model: Any, backbone: str, side: int) -> dict[str, float]:
    """Tokens, patches and arithmetic of a pair: an image of so many pixels a side, with `PAIR_TOKENS` around it."""
    patches = 4 * (side // (2 * QWEN[backbone])) ** 2  # four are merged into a token
    tokens = patches // 4 + PAIR_TOKENS
    return {"tokens": tokens, "patches": patches, "tflop": round(flops_of_a_row(model, tokens, patches) / 1e12, 3)}


def main() -> None:
    parser(__doc__).parse_args()
    names = ("phi3_v", "llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl")
    keep(RESULTS / "recipes.json", {f"stage{stage}_{name}": plan(stage, name) for name in names for stage in (1, 2)})


if __name__ == "__main__":
    main()
