"""Building, loading and exporting a judge or reranker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

from unime_st.folders import new_folder
from unime_st.modules.adapters import check_merged, default_lora_config, merged_adapters
from unime_st.modules.build import add_adapters, bound_pixels, check_adapters
from unime_st.modules.checks import check_family
from unime_st.modules.options import check_device, check_dtype, check_sizes, weight_options
from unime_st.modules.reranker.cross_encoder import MultimodalCrossEncoder
from unime_st.modules.reranker.pair_encoder import PairEncoder
from unime_st.modules.reranker.pairs import HALVES
from unime_st.modules.saved import folder_of, holds_saved_encoder
from unime_st.prompts import is_encoders
from unime_st.published import PUBLISHED_RERANKERS, PublishedReranker, published_reranker
from unime_st.rerank_prompts import PAIR_PROMPTS, PairPrompt, pair_template

_PROBES = "unime probe alpha", "unime probe bravo"
_COUNTED = ("none", "one", "two")


def build_reranker(
    backbone: str | Path,
    *,
    prompt: str | PairPrompt = "unime_v2",
    template: str | None = None,
    max_pixels: int | None = None,
    max_seq_length: int | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    peft_config: PeftConfig | bool | None = None,
    allow_remote_images: bool = False,
    vision_cache_bytes: int = 2**28,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> CrossEncoder:
    """Make a judge of a multimodal LLM: p(yes) / (p(yes) + p(no)) of the next token, for a query and a candidate.

    As it is, it judges mined negatives (:func:`unime_st.data.judge_negatives`); trained by ``CrossEncoderTrainer``, it
    is a reranker. ``predict`` takes pairs and ``rank`` a query and candidates, each a text, an image or ``{"image",
    "text"}``. What it saves is a stock ``CrossEncoder`` whose template carries the prompt.

    Args:
        backbone: a Hub name or a folder of a transformers checkpoint with a language-model head.
        prompt: a name of :data:`unime_st.rerank_prompts.PAIR_PROMPTS`, or words of your own.
        template: a Jinja chat template that renders the roles ``query`` and ``document`` itself, as published rerankers
            have one; of ``prompt`` only the answers count then. None puts the words into the backbone's own template,
            or the family's turn where it has none or is an encoder.
        max_pixels: bound on an image's pixels, for families that keep an image's own resolution (Qwen-VL).
        max_seq_length: tokens of a pair at the most; longer texts lose their last tokens, the candidate's first.
        torch_dtype: type of the weights; "auto" keeps the checkpoint's.
        attn_implementation: attention of transformers.
        device: where to put the model; None chooses.
        peft_config: adapters to train; True takes :func:`default_lora_config`, on the language model.
        allow_remote_images: open images at ``http(s)`` addresses.
        vision_cache_bytes: memory for features of images between passes; 0 keeps none.
        model_kwargs: more arguments of ``from_pretrained``.
        processor_kwargs: more arguments of the processor.

    Raises:
        ValueError: an answer is no single token of the vocabulary, the template drops a half or an image of a pair,
            there is no template, the backbone is a reranker with a prompt of its own, or weights are missing.

    References:
        UniME-V2, section 3.2: https://arxiv.org/abs/2510.13515.
    """
    check_sizes(max_pixels=max_pixels, max_seq_length=max_seq_length)
    check_device(device)
    check_dtype(torch_dtype)
    check_adapters(peft_config)
    words = _words(prompt)
    encoder = PairEncoder(
        str(backbone),
        allow_remote_images=allow_remote_images,
        vision_cache_bytes=vision_cache_bytes,
        model_kwargs=weight_options(torch_dtype, attn_implementation, model_kwargs),
        processor_kwargs=dict(processor_kwargs or {}),
        max_seq_length=max_seq_length,
    )
    encoder.set_template(template or pair_template(words, _own_template(encoder), encoder.model.config.model_type))
    _check_rendered(encoder)
    if max_pixels is not None:
        bound_pixels(encoder, max_pixels)
    yes, no = _token(encoder.tokenizer, "yes", words.yes), _token(encoder.tokenizer, "no", words.no)
    model = MultimodalCrossEncoder(modules=[encoder, LogitScore(yes, no)], device=device)
    if peft_config:
        add_adapters(model, default_lora_config() if peft_config is True else peft_config)
    return model


def load_reranker(
    path: str | Path,
    *,
    published: str | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    allow_remote_images: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> CrossEncoder:
    """Load a saved multimodal ``CrossEncoder``, one of :func:`export_reranker` or another, or a published reranker.

    Args:
        path: a folder or a Hub name of a sentence-transformers checkpoint; or of a reranker of
            :data:`unime_st.published.PUBLISHED_RERANKERS`, which is a plain transformers repository.
        published: the Hub name of the published reranker that the folder is a copy of.
        torch_dtype: as in :func:`build_reranker`, as the other arguments.
        attn_implementation: attention of transformers.
        device: where to put the model; None chooses.
        allow_remote_images: open images at ``http(s)`` addresses.
        model_kwargs: more arguments of ``from_pretrained``.
        processor_kwargs: more arguments of the processor.

    Raises:
        FileNotFoundError: there is no such folder, or it is no sentence-transformers checkpoint and no published
            reranker is named.
        ValueError: weights are missing, a file is damaged, the template drops a half or an image of a pair, or the
            folder holds another model than ``published``.
    """
    check_device(device)
    check_dtype(torch_dtype)
    folder = folder_of(path)
    options: dict[str, Any] = {"processor_kwargs": processor_kwargs, "allow_remote_images": allow_remote_images}
    if holds_saved_encoder(folder) and published is not None:
        raise ValueError(f"{folder} is a saved reranker, which knows its prompt. Leave `published` out.")
    if not holds_saved_encoder(folder) and (published is not None or str(path) in PUBLISHED_RERANKERS):
        return _load_published(
            folder,
            published_reranker(published or str(path)),
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            model_kwargs=model_kwargs,
            device=device,
            **options,
        )
    weights = weight_options(torch_dtype, attn_implementation, model_kwargs)
    model = MultimodalCrossEncoder.of_folder(folder, device=device, model_kwargs=weights, **options)
    encoder: Any = model[0]
    _check_rendered(encoder)
    return model


def _load_published(folder: Path, known: PublishedReranker, **options: Any) -> CrossEncoder:
    model = build_reranker(folder, prompt=known.prompt, **options)
    encoder: Any = model[0]
    check_family(encoder.model, known)
    encoder.processor.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), known.pixels, strict=True))
    return model


def export_reranker(model: CrossEncoder, path: str | Path, *, merge_adapters: bool = True) -> Path:
    """Write a reranker as a stock ``CrossEncoder`` folder, which appears only when complete.

    Args:
        model: the reranker; it stays as it is.
        path: the folder to make.
        merge_adapters: merge LoRA weights into the backbone; False saves adapters alone, which then need the backbone.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and is no saved model.
        TypeError: ``model`` is no ``CrossEncoder``.
        ValueError: a stock ``CrossEncoder`` that was loaded with adapters was to be merged.
    """
    if not isinstance(model, CrossEncoder):
        raise TypeError(f"`model` is a {type(model).__name__}, but a reranker of `build_reranker` is needed.")
    target = Path(path)
    if target.exists() and any(target.iterdir()) and not (target / "modules.json").is_file():
        raise FileExistsError(f"{target} exists and holds something other than a saved model. Give another `path`.")
    with new_folder(target) as scratch, merged_adapters(model) if merge_adapters else nullcontext():
        model.save_pretrained(str(scratch))
        if merge_adapters:
            check_merged(scratch)
    return target


def _words(prompt: str | PairPrompt) -> PairPrompt:
    if isinstance(prompt, PairPrompt):
        return prompt
    if prompt not in PAIR_PROMPTS:
        raise ValueError(f"`prompt={prompt!r}`, but it must be one of {', '.join(PAIR_PROMPTS)}, or a `PairPrompt`.")
    return PAIR_PROMPTS[prompt]


def _own_template(encoder: PairEncoder) -> str | None:
    """The backbone's own chat template, but for an encoder's, which ends in words of its own; refuses a reranker's."""
    own = getattr(encoder.processor, "chat_template", None)
    if own is None or is_encoders(own):
        return None
    if all(re.search(rf"""['"]{role}['"]""", own) for role in HALVES):
        raise ValueError(
            "The backbone's chat template renders the roles 'query' and 'document', so it is a reranker with a prompt "
            "of its own, which `prompt` would replace. Load it by `load_reranker`; to train it on, pass that template "
            "as `template`."
        )
    return own


def _token(tokenizer: Any, kind: str, word: str) -> int:
    """The number of the one token that an answer is."""
    numbers = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(numbers) != 1 or numbers[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"The answer {kind}={word!r} is {len(numbers)} token(s) {numbers} of this vocabulary, but it must be one "
            f"that it knows: the score is read at the next token alone. Give a `PairPrompt` with another `{kind}`."
        )
    return int(numbers[0])


def _check_rendered(encoder: PairEncoder) -> None:
    """Refuse a template that drops the text or the image of a half, turns the halves round, or cannot render pairs."""
    token = getattr(encoder.processor, "image_token", None)
    image, texts = {"type": "image"}, [{"type": "text", "text": text} for text in _PROBES]
    for shown in product(((1, 1), (1, 0), (0, 1)), repeat=2):  # images and texts of query and document
        parts = [[image] * images + [said] * words for (images, words), said in zip(shown, texts, strict=True)]
        messages = [{"role": role, "content": own} for role, own in zip(("query", "document"), parts, strict=True)]
        try:
            rendered = str(encoder.processor.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise what they like
            raise ValueError(
                f"The chat template cannot render a pair of the roles query and document: {error}"
            ) from error
        _check_parts(rendered, shown, token)


def _check_parts(rendered: str, shown: tuple[tuple[int, int], ...], token: Any) -> None:
    halves = zip(("query", "document"), shown, _PROBES, strict=True)
    lost = [f"the text of the {role}" for role, (_, words), text in halves if words and text not in rendered]
    images = sum(count for count, _ in shown)
    if isinstance(token, str) and rendered.count(token) < images:
        lost.append(f"an image ({rendered.count(token)} {token!r} of {_COUNTED[images]})")
    if lost:
        raise ValueError(
            f"The chat template drops {' and '.join(lost)}, so scores would not depend on it. Give a `template` that "
            "renders the messages of the roles 'query' and 'document', or none, for the backbone's own."
        )
    if all(words for _, words in shown) and rendered.index(_PROBES[1]) < rendered.index(_PROBES[0]):
        raise ValueError(
            "The chat template renders the document before the query, but images are given to the model the query's "
            "first, so it would take one for the other. Give a `template` that renders the query first."
        )
