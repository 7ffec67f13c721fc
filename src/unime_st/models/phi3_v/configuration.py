"""The configuration of Phi-3-Vision, in the form of its published ``config.json``."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, Phi3Config, PreTrainedConfig

CLIP_LARGE_336 = "openai/clip-vit-large-patch14-336"
_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_IMG_PROCESSOR = {
    "name": "clip_vision_model",
    "model_name": CLIP_LARGE_336,
    "image_dim_out": 1024,
    "num_img_tokens": 144,
}
_EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


@strict
class Phi3VConfig(Phi3Config):
    """Phi-3's configuration, and keys about images.

    The published files describe the vision tower by name only (``img_processor["model_name"]``); ``vision_config``
    describes it fully. ``rope_scaling`` of the old type "su" is today's "longrope".
    """

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}  # noqa: RUF012 (the host's way)

    # The vision tower: `name`, `model_name`, `image_dim_out` (its width), `num_img_tokens` (per crop, after merging)
    # and optionally `layer_idx` (-2), the hidden state to take.
    img_processor: dict[str, Any] | None = None
    embd_layer: dict[str, Any] | str | None = None  # how features become embeddings: as in published checkpoints only
    vision_config: dict[str, Any] | PreTrainedConfig | None = None  # of the CLIP model; None takes the published one
    image_token_id: int = 32044  # stands for one image embedding in `input_ids`

    def __post_init__(self, **kwargs: Any) -> None:
        rope = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        kind = rope.pop("type", None)
        kind = rope.get("rope_type", kind)
        if kind == "yarn":
            raise ValueError(
                "The rope scaling 'yarn' of phi3_v is not supported: no published vision checkpoint has it. Give 'su' "
                "or 'longrope'."
            )
        if kind is not None:
            self.rope_parameters = {**rope, "rope_type": "longrope" if kind == "su" else kind}
        self.img_processor = {**_IMG_PROCESSOR, **(self.img_processor or {})}
        self.embd_layer = {**_EMBD_LAYER, **(self.embd_layer if isinstance(self.embd_layer, dict) else {})}
        for key, value in _EMBD_LAYER.items():
            if self.embd_layer[key] != value:
                raise ValueError(
                    f"`embd_layer` has {key}={self.embd_layer[key]!r}, but phi3_v knows {value!r} only, as all "
                    "published checkpoints have it."
                )
        if (
            self.img_processor["name"] != "clip_vision_model"
            or self.img_processor.get("type_feature", "patch") != "patch"
        ):
            raise ValueError(
                f"`img_processor` describes {self.img_processor}, but phi3_v takes the patch features of a "
                "'clip_vision_model' only."
            )
        if self.vision_config is None and self.img_processor["model_name"] != CLIP_LARGE_336:
            raise ValueError(
                f"`img_processor` names the vision tower {self.img_processor['model_name']!r}, whose size is not "
                "known. Give its `vision_config` too."
            )
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or _VISION_DEFAULTS))
        super().__post_init__(**kwargs)

    @property
    def image_feature_layer(self) -> int:
        """The index of the vision tower's hidden state that is used; 0 is its input."""
        layer = (self.img_processor or {}).get("layer_idx", -2)
        return int(layer)
