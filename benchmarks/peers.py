"""What the speed benchmarks compare with: stock sentence-transformers, mteb's wrappers, published-style scripts.

Each is a callable from inputs (texts, ``{"image": path}``, ``{"image": path, "text": ...}``) to embeddings, of the same
checkpoint and with the same prompt as ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

from unime_st import build_encoder, load_encoder
from unime_st.embedding.distinct import encode_indexed

Encode = Callable[[Sequence[Any]], np.ndarray]
BATCH = 32
STOCK_BATCHES = (2, 4, 6, 8, 16, 32)
CONVERSATION = (  # what an image is to UniME-V2's wrapper
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}\n{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}<|im_start|>assistant\n"
)
IMAGE_ALONE = (  # what it is to VLM2Vec's: the placeholder, no turns
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% endif %}{% endfor %}{% endfor %}"
)


class Ours:
    """``encode`` of a loaded encoder; every call starts without remembered images."""

    def __init__(self, checkpoint: Path, *, share_prefixes: bool = True) -> None:
        self.model = load_encoder(str(checkpoint), device="cpu").float()
        self.model[0].share_prefixes = share_prefixes
        self.inner: Any = self.model[0].model

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        self.model[0].vision_cache.clear()
        return self.model.encode(list(items), batch_size=BATCH, show_progress_bar=False)


class Stock:
    """``SentenceTransformer.encode`` of the same checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = SentenceTransformer(str(checkpoint), device="cpu").float()
        self.inner: Any = self.model[0].model
        self.batch_size = BATCH

    def at(self, batch_size: int) -> Stock:
        """The same model in batches of so many."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        return self.model.encode(list(items), batch_size=self.batch_size, show_progress_bar=False)


class PublishedStyle:
    """What published evaluation scripts do, in code of our own: fixed batches as they come, all logits, no reuse."""

    def __init__(self, checkpoint: Path, batch_size: int = 4) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.inner, self.batch_size = self.model.model, batch_size

    @torch.inference_mode()
    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        rows = []
        for start in range(0, len(items), self.batch_size):
            features = self.processor.apply_chat_template(
                [conversation(item) for item in items[start : start + self.batch_size]], tokenize=True,
                return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
            )  # fmt: skip
            output = self.model(**features, output_hidden_states=True)  # its logits are (B, T, vocabulary)
            rows.append(torch.nn.functional.normalize(output.hidden_states[-1][:, -1], dim=-1))
        return torch.cat(rows).numpy()


def conversation(item: Any) -> list[dict[str, Any]]:
    """A user's turn, its image opened."""
    parts = {"text": item} if isinstance(item, str) else item
    content: list[dict[str, Any]] = []
    if "image" in parts:
        content.append({"type": "image", "image": opened(parts)})
    if "text" in parts:
        content.append({"type": "text", "text": parts["text"]})
    return [{"role": "user", "content": content}]


class _Loader:
    """Stands for mteb's data loader: batches of columns, images opened as they are asked for."""

    dataset = SimpleNamespace(features=("image",))

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        for start in range(0, len(self.items), BATCH):
            yield {"image": [opened(item) for item in self.items[start : start + BATCH]]}


def opened(item: dict[str, str]) -> Image.Image:
    with Image.open(item["image"]) as file:
        return file.convert("RGB")


def unime_v2(folder: Path, square: tuple[int, int]) -> tuple[Encode, Encode]:
    """UniME-V2 as mteb wraps it, and our encoder with its conversation and its square images."""
    from mteb.models.model_implementations import unime_v2_models as module

    module._IMAGE_SIZE = square
    wrapper = module.UniMEV2Wrapper(str(folder), device="cpu", dtype=torch.float32)
    wrapper.processor.chat_template = CONVERSATION
    model = build_encoder(folder, device="cpu", prompt_template=CONVERSATION)

    def prepare(item: dict[str, str]) -> Any:
        return wrapper._build_conversation(text=None, image=opened(item), video=None, instruction="")

    return _wrapped(wrapper), _prepared(model, prepare)


def vlm2vec_v2(folder: Path) -> tuple[Encode, Encode]:
    """VLM2Vec-V2.0 as mteb wraps it, with merged weights from a folder, and our encoder with its bare prompt."""
    from mteb.models.model_implementations.vlm2vec_models import VLM2VEC2Wrapper

    wrapper = VLM2VEC2Wrapper.__new__(VLM2VEC2Wrapper)  # its constructor asks for the published 2B model
    wrapper.device, wrapper.fps, wrapper.max_frames, wrapper.num_frames = "cpu", None, None, 8
    wrapper.processor = AutoProcessor.from_pretrained(folder)
    wrapper.processor.tokenizer.padding_side = "left"
    wrapper.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return _wrapped(wrapper), _prepared(build_encoder(folder, device="cpu", prompt_template=IMAGE_ALONE), None)


def _wrapped(wrapper: Any) -> Encode:
    options = {"hf_split": "test", "hf_subset": "default", "show_progress_bar": False}
    task = SimpleNamespace(prompt=None, name="images")
    return lambda items: wrapper.encode(_Loader(items), task_metadata=task, **options).numpy()


def _prepared(model: SentenceTransformer, prepare: Callable[[Any], Any] | None) -> Encode:
    def encode(items: Sequence[Any]) -> np.ndarray:
        model[0].vision_cache.clear()
        embeddings, index, _ = encode_indexed(model, items, batch_size=BATCH, prepare=prepare, show_progress_bar=False)
        return embeddings[index]

    return encode
