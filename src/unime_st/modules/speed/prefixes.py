"""The language model over a tree of tokens: rows of a batch that begin alike compute their beginning once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from unime_st.modules.speed import row_attention, tree_attention
from unime_st.modules.speed.row_attention import Branches, attends_by_branch, by_branch
from unime_st.modules.speed.token_tree import PREFIX_KEY, PackedTree, flatten_tree, pack_tree
from unime_st.modules.speed.tree_attention import attends_by_tree, by_tree, computed_dtype, moved, padded_length
from unime_st.placement import read

logger = logging.getLogger(__name__)

Attention = Literal["rows", "tree", "mask"]
"""How a packed pass attends: row by row; over the tree, by FlexAttention; or with a mask over all tokens."""

LANGUAGE_MODEL_NAMES = ("language_model", "text_model")
"""The names that multimodal models of transformers give their language model."""

_ATTENTION = ("sdpa", "eager", row_attention.NAME, tree_attention.NAME)  # these take a mask of four dimensions
_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of the batch
_CARRIED = ("inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache")
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
_PASSES_TO_BE_SURE = 8  # how positions are counted is a model's rule; looking at each pass would wait for the device
_UNEQUAL = "equal beginnings have no equal states in it, or its attention takes no masks of ours"
_NEEDS = {
    "rows": "row by row is for inference on a CPU, under sdpa that reaches all layers",
    "tree": "that needs FlexAttention, sdpa that reaches all layers, no attention dropout, and on a GPU triton and "
    "heads of 16, 32, 64, ... dimensions",
}
_UNKNOWN_OUTPUTS = ("past_key_values", "output_hidden_states", "output_attentions")


def language_model(model: nn.Module) -> nn.Module | None:
    """The causal decoder of a multimodal model, with a head or without, or None when it has none of the known names."""
    parts = (model, getattr(model, "model", None))
    found = [getattr(part, name) for part in parts for name in LANGUAGE_MODEL_NAMES if hasattr(part, name)]
    return found[0] if found else None


def shares_prefixes(model: nn.Module) -> bool:
    """Whether equal beginnings have equal states in a model, and its attention takes our masks.

    This holds for a causal decoder with full attention in every layer, and rotary positions that do not depend on the
    length of the batch: not for Gemma3 (images attend both ways, windows slide) and Phi-3.5-Vision (long positions).
    """
    decoder = language_model(model)
    config: Any = getattr(decoder, "config", None)
    if hasattr(model, "_orig_mod"):  # a model compiled as a whole keeps its parts
        return False
    if config is None or getattr(config, "_attn_implementation", None) not in _ATTENTION:
        return False
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    rope: Any = getattr(config, "rope_parameters", None)  # None for absolute positions or biases
    return (
        set(layers) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and not getattr(config, "use_bidirectional_attention", False)
        and getattr(config, "is_causal", None) is not False
        and bool(rope)
        and rope.get("rope_type", "default") in _ROPE
    )


class Turns:
    """A reentrant lock for one thread at a time; a copy of it, or one sent to a process, is free."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


class SharedPrefixes:
    """Lets the language model compute the shared beginnings of a batch once, and no padding."""

    def __init__(self) -> None:
        self.turns = Turns()  # held while inputs are encoded or the model runs, since its parts are replaced meanwhile
        self.active = False  # whether only embeddings are asked for
        self.last_token_only = False  # the last layer then feeds forward these states alone; the others mean nothing
        self.inference = False  # whether no pass has a backward pass: a CPU may then attend row by row
        self.taken: Attention | None = None  # the kind of the last packed pass
        self.tokens = 0  # of the rows seen, without padding
        self.padded = 0  # the same with padding
        self.computed = 0  # places that the language model ran over instead, with the padding of its sequences
        self._attention: Literal["auto"] | Attention = "auto"
        self._told: set[str] = set()
        self._fitting: Counter[tuple[Any, ...]] = Counter()  # passes whose positions were found to fit, by rule

    @property
    def attention(self) -> Literal["auto"] | Attention:
        """The wanted kind: one that is asked for by name and cannot be taken is an error, ``"auto"`` takes what can."""
        return self._attention

    @attention.setter
    def attention(self, wanted: Literal["auto"] | Attention) -> None:
        known = ("auto", *get_args(Attention))
        if wanted not in known:
            raise ValueError(f"`attention={wanted!r}`, but it must be one of {', '.join(map(repr, known))}.")
        self._attention = wanted

    @contextmanager
    def encoding(self, *, last_token_only: bool = False, inference: bool = False) -> Iterator[None]:
        """Within this context only embeddings are asked for, so beginnings may be shared; outside of it nothing is.

        A training step's passes over a batch must round alike, so all of them or none are in this context.
        """
        before = self.active, self.last_token_only, self.inference
        self.active, self.last_token_only, self.inference = True, last_token_only, inference
        try:
            yield
        finally:
            self.active, self.last_token_only, self.inference = before

    @contextmanager
    def serving(self, model: nn.Module, features: Mapping[str, Any]) -> Iterator[None]:
        """Within this context the language model runs over trees of the features' keys and mask, see ``pack_tree``."""
        if not self.active:
            yield
            return
        mask: Tensor = features["attention_mask"]
        why = _why_padded(model) if PREFIX_KEY in features else _UNEQUAL
        told = None if why else _told(features)
        if told is None:
            self._pad(why or "its rows are not padded on the left")
            yield
            return
        decoder: Any = language_model(model)
        kind = self._kind(decoder, mask.device)
        if kind == "mask":
            tree = pack_tree(*told, hidden_size=decoder.config.hidden_size, training=decoder.training)
        else:
            tree = flatten_tree(*told, *([padded_length] if kind == "tree" else []))
        self.tokens += int(told[1].sum())
        self.padded += mask.numel()
        self.computed += tree.source.size if tree is not None else mask.numel()
        shows_media = bool((told[0] < 0).any())
        shows_video = features.get("pixel_values_videos") is not None
        plain = decoder.forward

        def packed(*args: Any, **kwargs: Any) -> Any:
            embeddings = kwargs.get("inputs_embeds")
            known = not args and isinstance(embeddings, Tensor) and embeddings.shape[:2] == mask.shape
            if not known or any(kwargs.get(name) for name in _UNKNOWN_OUTPUTS):
                self._pad("its language model is called in an unknown way")
                return plain(*args, **kwargs)
            if tree is not None:
                positions = kwargs.get("position_ids")
                rule = (type(model), shows_media, shows_video, 0 if positions is None else positions.ndim)
                sure = self._fitting[rule] >= _PASSES_TO_BE_SURE
                media = told[0] < 0 if shows_media else None
                output = _run(
                    decoder, plain, tree, kind, kwargs, last_token_only=self.last_token_only, sure=sure, media=media
                )
                if output is not None:
                    self._fitting[rule] += 1
                    return output
                self._pad("its positions depend on more than the tokens before")
                return plain(**kwargs)
            last = np.arange(1, mask.shape[0] + 1) * mask.shape[1] - 1
            with _last_layer_at(decoder, last) if self.last_token_only else nullcontext():
                return plain(**kwargs)

        decoder.forward = packed
        try:
            yield
        finally:
            del decoder.forward

    def _kind(self, decoder: Any, device: torch.device) -> Attention:
        on_cpu = device.type == "cpu"
        wanted: Attention = self.attention if self.attention != "auto" else "rows" if on_cpu else "tree"
        can = {
            "rows": lambda: on_cpu and self.inference and attends_by_branch(decoder),
            "tree": lambda: attends_by_tree(decoder, device),
            "mask": lambda: True,
        }
        kind: Attention = wanted if can[wanted]() else "mask"
        if self.attention not in ("auto", kind):
            raise ValueError(
                f"`attention={wanted!r}`, but {_NEEDS[wanted]}. Set 'auto', which takes what can be taken."
            )
        self._tell(f"Packed passes on {device.type} attend by {kind}")
        self.taken = kind
        return kind

    def _pad(self, why: str) -> None:
        """Say once that rows stay padded, and refuse it where packing was asked for by name."""
        if self.attention != "auto":
            raise ValueError(
                f"`attention={self.attention!r}` asks for packed passes, but this model cannot run them: {why}. Set "
                "'auto', which then runs padded rows."
            )
        self._tell(f"Passes run in padded rows: {why}")

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.info(message)


def _why_padded(model: nn.Module) -> str:
    """Why rows of a model are to stay as they are; an empty text where they need not."""
    decoder: Any = language_model(model)
    if not shares_prefixes(model):
        return _UNEQUAL
    if torch.compiler.is_compiling() or _is_compiled(decoder):
        return "it is compiled"
    if "forward" in vars(decoder):
        return "`forward` of its language model is replaced"
    return "it gives the states of all layers" if _asks_for_states(model, decoder) else ""


def _told(features: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and mask as arrays, or None when rows are not padded on the left."""
    keys, mask = (read(features, name) for name in (PREFIX_KEY, "attention_mask"))
    if keys is None or mask is None or keys.shape != mask.shape:
        return None
    told, is_token = keys.numpy(), mask.numpy().astype(bool)
    on_the_left = is_token[:, -1].all() and (is_token[:, :-1] <= is_token[:, 1:]).all()
    return (told, is_token) if on_the_left else None


def _is_compiled(decoder: Any) -> bool:
    """Whether the decoder or its layers are compiled for the shapes they have seen."""
    parts = (decoder, decoder.layers[-1])
    return any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts)


def _asks_for_states(*models: Any) -> bool:
    """Whether the output includes the states of all layers, as stock losses over layers require."""
    return any(getattr(model.config, name, False) for model in models for name in _UNKNOWN_OUTPUTS[1:])


@contextmanager
def _last_layer_at(decoder: Any, places: np.ndarray) -> Iterator[None]:
    """Within this context the last layer's query, output and feed-forward parts serve some places only."""
    layer = decoder.layers[-1]
    attention = getattr(layer, "self_attn", None)  # None in families with other names, which compute all
    own = [getattr(attention, name, None) for name in ("q_proj", "o_proj")] + [getattr(layer, "mlp", None)]
    parts = () if _is_computed_again(layer) else own
    served = [part for part in parts if isinstance(part, nn.Module) and "forward" not in vars(part)]

    def at_places(plain: Any, chosen: Tensor) -> Any:
        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (P, L, D)
            some = plain(states.flatten(0, 1).index_select(0, chosen)[None], *args, **kwargs)[0]
            whole = some.new_zeros(states.shape[0] * states.shape[1], some.shape[-1])
            return whole.index_copy_(0, chosen, some).view(*states.shape[:2], -1)

        return forward

    chosen = moved(places, next(layer.parameters()).device)
    for part in served:
        part.forward = at_places(part.forward, chosen)
    try:
        yield
    finally:
        for part in served:
            del part.forward


def _is_computed_again(layer: nn.Module) -> bool:
    """Whether gradient checkpointing runs a layer again in the backward pass, after this context."""
    own = isinstance(layer, GradientCheckpointingLayer)
    return layer.training and (not own or bool(layer.gradient_checkpointing))


def _run(
    decoder: Any,
    plain: Any,
    tree: PackedTree,
    kind: Attention,
    kwargs: dict[str, Any],
    *,
    last_token_only: bool,
    sure: bool,
    media: np.ndarray | None,
) -> Any:
    """The language model's output for the rows, made from its output for the sequences; None where that is not it."""
    embeddings: Tensor = kwargs["inputs_embeds"]  # (B, T, D)
    device = embeddings.device
    source, place = (moved(array, device) for array in (tree.source, tree.place))
    positions = _positions(kwargs.get("position_ids"), tree, source, sure=sure)
    dropped = (*_CARRIED, *_UNKNOWN_OUTPUTS)
    carried = {name: value for name, value in kwargs.items() if value is not None and name not in dropped}
    if positions is None:
        return None
    carried |= _deepstack(carried, tree, media)
    if any(isinstance(value, Tensor) and name not in _DEEPSTACK for name, value in carried.items()):
        return None
    carried |= {"use_cache": False, "inputs_embeds": _taken(embeddings, source), "position_ids": positions}  # (P, L, D)
    with (
        _attending(decoder, tree, kind, embeddings) as mask,
        _last_layer_at(decoder, tree.place[:, -1]) if last_token_only else nullcontext(),
    ):
        output = plain(**carried, **mask)
    states = output["last_hidden_state"]
    if last_token_only:  # (B, T, D) without its memory, since other places are not read
        output["last_hidden_state"] = _taken(states, place[:, -1:]).expand(*place.shape, -1)
    else:
        output["last_hidden_state"] = _taken(states, place)
    return output


def _attending(decoder: Any, tree: PackedTree, kind: Attention, embeddings: Tensor) -> Any:
    """A context with the pass's attention, which yields further arguments for the decoder."""
    dtype = computed_dtype(embeddings.dtype, embeddings.device)
    if tree.allowed is not None:
        return nullcontext({"attention_mask": _attention_mask(tree.allowed, embeddings.device, dtype)})
    if kind == "rows":
        return by_branch(decoder, Branches(tree, dtype))
    assert tree.end is not None
    again = _is_computed_again(decoder.layers[-1])
    return by_tree(decoder, tree.end, embeddings.device, computed_again=again)


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """The states (N, M, D) at flat places, by `index_select`, whose backward pass is faster than indexing's."""
    return states.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, -1)


def _attention_mask(allowed: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The additive mask of scores, (P, 1, L, L): one of booleans would be made additive, and kept, in every layer."""
    asked = moved(allowed, device)[:, None]
    mask = torch.full(asked.shape, torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.masked_fill_(asked, 0)


def _positions(given: Tensor | None, tree: PackedTree, source: Tensor, *, sure: bool = False) -> Tensor | None:
    """Positions counted from each row's first token, or None when they depend on more than the tokens before.

    When that is ``sure`` not to be so, it is not looked at.

    Rotary attention sees only differences of positions. Qwen-VL has three or four positions per token, (3, B, T).
    """
    if given is None:
        return moved(tree.depth, source.device)
    if given.shape[-2:] != tree.mask.shape:
        given = given.expand(*given.shape[:-2], *tree.mask.shape)
    mask = moved(tree.mask, source.device)
    first = mask.int().argmax(dim=1)
    counted = given - given.gather(-1, first.expand(*given.shape[:-1])[..., None])
    packed = counted.flatten(-2)[..., source]
    if sure:
        return packed
    place = moved(tree.place, source.device)
    same = (packed.flatten(-2)[..., place] == counted) | ~mask
    return packed if bool(same.all()) else None


def _deepstack(kwargs: dict[str, Any], tree: PackedTree, media: np.ndarray | None) -> dict[str, Any]:
    """The features that Qwen3-VL's vision tower adds to image tokens in the first layers, for the tokens kept.

    ``media`` (B, T) are the tokens of images and videos, which ``visual_pos_masks`` tells on the device.
    """
    masks = kwargs.get("visual_pos_masks")
    if masks is None or media is None:
        return {}
    number = np.cumsum(media & tree.mask) - 1  # the index of each token's feature
    kept = (media & tree.mask).ravel()[tree.source] & tree.used
    chosen = moved(number[tree.source[kept]], masks.device)
    return {
        "visual_pos_masks": moved(kept, masks.device),
        "deepstack_visual_embeds": [features[chosen] for features in kwargs["deepstack_visual_embeds"]],
    }
