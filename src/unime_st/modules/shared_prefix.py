"""The language model over a tree of tokens: rows of a batch that begin alike compute their beginning once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unime_st.modules.token_tree import PackedTree, pack_tree

LANGUAGE_MODEL_NAMES = ("language_model", "text_model")
"""What multimodal models of transformers call their language model."""

_ATTENTION = ("sdpa", "eager")  # those that take a mask of four dimensions
_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of the batch
_CARRIED = ("inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache")
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
_UNKNOWN_OUTPUTS = ("past_key_values", "output_hidden_states", "output_attentions")


def language_model(model: nn.Module) -> nn.Module | None:
    """The causal decoder of a multimodal model, None when it has none of the known names."""
    found = [getattr(model, name) for name in LANGUAGE_MODEL_NAMES if hasattr(model, name)]
    return found[0] if found else None


def shares_prefixes(model: nn.Module) -> bool:
    """Whether equal beginnings have equal states in a model, and its attention takes our masks.

    That is so for a causal decoder with full attention in every layer and rotary positions that do not depend on the
    length of the batch. Gemma3 (images attend both ways, sliding windows) and Phi-3.5-Vision (long positions chosen by
    length) are run in padded rows.
    """
    decoder = language_model(model)
    config: Any = getattr(decoder, "config", None)
    if config is None or getattr(config, "_attn_implementation", None) not in _ATTENTION:
        return False
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        set(layers) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and not getattr(config, "use_bidirectional_attention", False)
        and rope.get("rope_type", "default") in _ROPE
    )


class SharedPrefixes:
    """Lets the language model of a batch run over shared beginnings once; for inference.

    Attributes:
        active: Whether inputs are being encoded, see :meth:`encoding`.
        last_token_only: Whether only the state of each row's last token is read: the last layer then computes its
            feed-forward part for those alone, and other states mean nothing.
        tokens: Of the rows seen, padding left out.
        padded: With padding.
        computed: Places the language model ran over in their stead, padding of its sequences included.
    """

    def __init__(self) -> None:
        self.active = False
        self.last_token_only = False
        self.tokens = 0
        self.padded = 0
        self.computed = 0

    @contextmanager
    def encoding(self, *, last_token_only: bool = False) -> Iterator[None]:
        """Within this context inputs are encoded, not trained on: beginnings may be shared.

        Outside of it nothing is, for a training step's passes over a batch must round alike.
        """
        self.active, self.last_token_only = True, last_token_only
        try:
            yield
        finally:
            self.active = self.last_token_only = False

    @contextmanager
    def serving(self, model: nn.Module, keys: Tensor | None, mask: Tensor) -> Iterator[None]:
        """Within this context the model's language model runs over packed trees.

        Args:
            model: The multimodal model, without a head.
            keys: What each token is, see :func:`~unime_st.modules.token_tree.pack_tree`; None shares nothing.
            mask: Attention mask of the batch, shape (B, T).
        """
        decoder: Any = language_model(model)
        refused = torch.is_grad_enabled() or torch.compiler.is_compiling() or not shares_prefixes(model)
        if keys is None or refused or "forward" in vars(decoder):
            yield
            return
        tree = pack_tree(keys.cpu().numpy(), mask.cpu().numpy().astype(bool), hidden_size=decoder.config.hidden_size)
        self.tokens += int(mask.sum())
        self.padded += mask.numel()
        self.computed += tree.source.size if tree is not None else mask.numel()
        if tree is None:
            yield
            return
        plain = decoder.forward

        def packed(*args: Any, **kwargs: Any) -> Any:
            embeddings = kwargs.get("inputs_embeds")
            if args or not isinstance(embeddings, Tensor) or embeddings.shape[:2] != tree.place.shape:
                return plain(*args, **kwargs)
            return _run(decoder, plain, tree, kwargs, last_token_only=self.last_token_only)

        decoder.forward = packed
        try:
            yield
        finally:
            del decoder.forward


@contextmanager
def _last_layer_at(decoder: Any, places: np.ndarray) -> Iterator[None]:
    """Within this context the last layer mixes and feeds forward the tokens at some places alone, the rest staying."""
    layer = decoder.layers[-1]
    parts = (getattr(layer.self_attn, "o_proj", None), layer.mlp)
    served = [part for part in parts if isinstance(part, nn.Module) and "forward" not in vars(part)]

    def at_places(plain: Any) -> Any:
        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (P, L, D)
            chosen = torch.from_numpy(places).to(states.device)
            some = plain(states.flatten(0, 1)[chosen][None], *args, **kwargs)[0]
            whole = some.new_zeros(states.shape[0] * states.shape[1], some.shape[-1])
            return whole.index_copy_(0, chosen, some).view(*states.shape[:2], -1)

        return forward

    for part in served:
        part.forward = at_places(part.forward)
    try:
        yield
    finally:
        for part in served:
            del part.forward


def _run(decoder: Any, plain: Any, tree: PackedTree, kwargs: dict[str, Any], *, last_token_only: bool) -> Any:
    """The language model's output for the rows, made from its output for the sequences."""
    embeddings: Tensor = kwargs["inputs_embeds"]  # (B, T, D)
    device = embeddings.device
    source, place = (torch.from_numpy(array).to(device) for array in (tree.source, tree.place))
    positions = _positions(kwargs.get("position_ids"), tree, source)
    carried = {name: value for name, value in kwargs.items() if value is not None and name not in _CARRIED}
    if positions is None or any(carried.pop(name, None) for name in _UNKNOWN_OUTPUTS):
        return plain(**kwargs)
    carried |= _deepstack(carried, tree, source)
    if any(isinstance(value, Tensor) and name not in _DEEPSTACK for name, value in carried.items()):
        return plain(**kwargs)
    closed = ~torch.from_numpy(tree.allowed).to(device)[:, None]
    mask = embeddings.new_zeros(closed.shape).masked_fill_(closed, torch.finfo(embeddings.dtype).min)
    packed = embeddings.flatten(0, 1)[source]  # (P, L, D)
    with _last_layer_at(decoder, tree.place[:, -1]) if last_token_only else nullcontext():
        output = plain(
            **{**carried, "use_cache": False}, inputs_embeds=packed, attention_mask=mask, position_ids=positions
        )
    output["last_hidden_state"] = output["last_hidden_state"].flatten(0, 1)[place]  # (B, T, D)
    return output


def _positions(given: Tensor | None, tree: PackedTree, source: Tensor) -> Tensor | None:
    """Positions counted from each row's first token, None when they do not depend on what stands before alone.

    Rotary attention sees differences of positions only. Qwen-VL has three or four of them a token, (3, B, T).
    """
    if given is None:
        return torch.from_numpy(tree.depth).to(source.device)
    if given.shape[-2:] != tree.mask.shape:
        given = given.expand(*given.shape[:-2], *tree.mask.shape)
    mask = torch.from_numpy(tree.mask).to(source.device)
    first = mask.int().argmax(dim=1)
    counted = given - given.gather(-1, first.expand(*given.shape[:-1])[..., None])
    packed = counted.flatten(-2)[..., source]
    place = torch.from_numpy(tree.place).to(source.device)
    same = (packed.flatten(-2)[..., place] == counted) | ~mask
    return packed if bool(same.all()) else None


def _deepstack(kwargs: dict[str, Any], tree: PackedTree, source: Tensor) -> dict[str, Any]:
    """Qwen3-VL adds features of its vision tower to image tokens of the first layers: those of the tokens kept."""
    is_visual = kwargs.get("visual_pos_masks")
    if is_visual is None:
        return {}
    number = is_visual.flatten().cumsum(0) - 1  # of each token's feature
    kept = is_visual.flatten()[source] & torch.from_numpy(tree.used).to(source.device)
    chosen = number[source[kept]]
    return {
        "visual_pos_masks": kept,
        "deepstack_visual_embeds": [features[chosen] for features in kwargs["deepstack_visual_embeds"]],
    }
