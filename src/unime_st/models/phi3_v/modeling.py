"""Phi-3-Vision: Phi-3's language model with the features of images among its inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, CLIPVisionModel, Phi3ForCausalLM, Phi3Model
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3PreTrainedModel, Phi3RotaryEmbedding

from unime_st.models.phi3_v.configuration import Phi3VConfig

# Redundant tensors of older checkpoints: a second name of the token embeddings, and a range.
_REDUNDANT = [r"vision_embed_tokens\.wte\.weight", r"img_processor\..*position_ids"]


class Phi3VVisionTower(nn.Module):
    """CLIP's vision model, of which one hidden state is used, up to which its layers run.

    ``output_hidden_states`` would make the host add hooks that stay, and the model could not be sent to a process.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        whole: Any = CLIPVisionModel._from_config(config.vision_config)
        self.vision_model = getattr(whole, "vision_model", whole)  # it is nested in some versions of the host
        count = len(self.vision_model.encoder.layers)
        layer = config.image_feature_layer
        self.depth = layer if layer >= 0 else count + 1 + layer

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """Encode crops (crops, 3, S, S) into patch features (crops, patches, width), without the class token."""
        states = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values))
        for layer in self.vision_model.encoder.layers[: self.depth]:
            states = layer(states, attention_mask=None)
        return BaseModelOutput(last_hidden_state=states[:, 1:])


class Phi3VImageEmbedding(nn.Module):
    """From crops to an image's embeddings: the lines of its grid of crops, a separator, the lines of the whole."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        merged = 4 * vision.hidden_size  # 2 x 2 neighbours side by side
        self.crop_size = int(vision.image_size)
        self.img_processor = Phi3VVisionTower(config)
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        """Embed the image processor's images, one after the other, as (embeddings of all images, hidden size)."""
        grids = [(height // self.crop_size, width // self.crop_size) for height, width in image_sizes.tolist()]
        crops = torch.cat(
            [image[: 1 + rows * columns] for image, (rows, columns) in zip(pixel_values, grids, strict=True)]
        )
        features = self.img_processor(crops.to(self.sub_GN.dtype)).last_hidden_state
        parts: list[Tensor] = []
        for own, (rows, columns) in zip(features.split([1 + h * w for h, w in grids]), grids, strict=True):
            parts += [self._lines(own[1:], rows, columns), self.glb_GN[0], self._lines(own[:1], 1, 1)]
        return self.img_projection(torch.cat(parts))

    def _lines(self, features: Tensor, rows: int, columns: int) -> Tensor:
        """Join a grid of crops to one picture, merge its 2 x 2 neighbours, and end each line with ``sub_GN``."""
        width = features.shape[-1]
        side = math.isqrt(features.shape[1]) // 2
        picture = features.reshape(rows, columns, side, 2, side, 2, width)
        picture = picture.permute(0, 2, 1, 4, 3, 5, 6).reshape(rows * side, columns * side, 4 * width)
        newlines = self.sub_GN[0].expand(rows * side, 1, -1)
        return torch.cat([picture, newlines], dim=1).flatten(0, 1)


class Phi3VRotaryEmbedding(Phi3RotaryEmbedding):
    """Phi-3's rotary embedding, with short or long factors chosen for each row by its own length.

    Stock code chooses once for a batch, by its longest row, so that a row's embedding would depend on its neighbours.
    """

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B or 1, length, head size), for positions (B or 1, length)."""
        if self.rope_type == "default":
            return super().forward(x, position_ids)
        parameters: Any = self.config.rope_parameters
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        limit = int(parameters["original_max_position_embeddings"])
        short, scaling = compute(self.config, x.device)
        long, _ = compute(self.config, x.device, seq_len=limit + 1)
        is_long = position_ids.amax(dim=-1) + 1 > limit
        angles = position_ids[..., None].float() * torch.where(is_long[:, None, None], long, short)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


class Phi3VModel(Phi3Model):
    """Phi-3's decoder over tokens and images; its tensors have the names of the published checkpoints."""

    config_class = Phi3VConfig
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012 (the host's way)
    _keys_to_ignore_on_load_unexpected = _REDUNDANT
    input_modalities = ["image", "text"]  # noqa: RUF012 (the host's way)

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.rotary_emb = Phi3VRotaryEmbedding(config=config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        """Embeddings of all images, one after the other; see :class:`Phi3VImageEmbedding`."""
        return self.vision_embed_tokens(pixel_values, image_sizes)

    def forward(  # noqa: PLR0917 (the host's order)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; each placeholder in ``input_ids`` takes one embedding of the images, in order.

        Positions count the tokens that are attended to, so padding on either side changes nothing. The images of all
        rows stand in turn; rows may have none or several.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values, image_sizes)
        if (
            position_ids is None
            and attention_mask is not None
            and attention_mask.ndim == 2
            and inputs_embeds is not None
        ):
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None) -> Tensor:
        embeddings = self.embed_tokens(input_ids)
        if pixel_values is None:
            return embeddings
        if image_sizes is None:
            raise ValueError("`pixel_values` came without `image_sizes`. Pass both, as the processor made them.")
        features = self.get_image_features(pixel_values, image_sizes).to(embeddings.dtype)
        places = input_ids == self.config.image_token_id
        found = int(places.sum())
        if found != len(features):
            raise ValueError(
                f"`input_ids` hold {found} image placeholders (id {self.config.image_token_id}), but the images have "
                f"{len(features)} embeddings. Make both with one call of the processor, without truncation."
            )
        return embeddings.masked_scatter(places[..., None], features)


class Phi3VForCausalLM(Phi3ForCausalLM):
    """The decoder and its language-modelling head, as published."""

    config_class = Phi3VConfig
    _keys_to_ignore_on_load_unexpected = _REDUNDANT
    input_modalities = ["image", "text"]  # noqa: RUF012 (the host's way)

    def __init__(self, config: Phi3VConfig) -> None:
        Phi3PreTrainedModel.__init__(self, config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict tokens from the arguments of :class:`Phi3VModel` and of the stock head."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of one step; the images come with their placeholders, in the first step."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        ids = inputs.get("input_ids")
        if ids is None or not bool((ids == self.config.image_token_id).any()):
            inputs.pop("pixel_values", None)
            inputs.pop("image_sizes", None)
        return inputs
