"""Bad arguments of models, losses and samplers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from fuzz_cases import INF, NAN, Case, Things, each, paths
from unime_st import build_encoder, export_encoder, functional, load_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.samplers import FalseNegativeAwareBatchSampler


def model_cases(things: Things) -> Iterator[Case]:
    """All of them."""
    for part in (_models, _encode, _losses, _samplers, _functional):
        yield from part(things)


def _models(t: Things) -> Iterator[Case]:

    yield from paths("build_encoder", lambda path: build_encoder(path, device="cpu"), t)
    yield from each(
        "build_encoder",
        lambda **bad: build_encoder(t.backbone, device="cpu", **bad),
        max_pixels=[0, -1, "x", NAN],
        max_seq_length=[0, -5, "x", NAN],
        prompt_template=[5, "nonsense"],
        peft_config=["lora", 5],
        torch_dtype=["float3"],
        vision_cache_bytes=[-1, "x"],
        prompts=["a", 5, {1: 2}],
    )
    yield Case(
        "build_encoder", "device='nowhere'", lambda: build_encoder(t.backbone, device="nowhere"), ("device", "nowhere")
    )
    yield from paths("load_encoder", lambda path: load_encoder(path, device="cpu"), t)
    yield from each(
        "export_encoder",
        lambda **bad: export_encoder(**{"model": t.model(), "path": t.new(), **bad}),
        model=[None, "x", 5],
        path=[None, 5, t.file],
    )


def _encode(t: Things) -> Iterator[Case]:
    def encode(item: Any) -> Any:
        return t.model().encode([{"text": "good"}, item], show_progress_bar=False)

    (t.root / "words.png").write_bytes(b"no image")
    zeros = np.zeros
    items: list[tuple[Any, tuple[str, ...]]] = [
        (None, ("row 1",)),
        (NAN, ("row 1",)),
        (5, ("row 1",)),
        (["a", "b", "c"], ("row 1",)),
        ({}, ("row 1",)),
        ({"img": "x"}, ("img",)),
        ("", ("row 1",)),
        ("  ", ("row 1",)),
        ({"text": 5}, ("row 1",)),
        ({"text": NAN}, ("row 1",)),
        ({"text": ["a"]}, ("row 1",)),
        ({"image": 5}, ("row 1",)),
        ({"image": "none.png"}, ("none.png",)),
        ("none.png", ("none.png",)),
        ({"image": b""}, ("row 1",)),
        ({"image": str(t.root / "words.png")}, ("words.png",)),
        ({"image": str(t.root)}, (t.root.name,)),
        ({"image": "a\0.png"}, ("row 1", "a\\x00")),
        ({"image": "x" * 5000}, ("row 1", "xxx")),
        ({"image": "\ud800"}, ("row 1", "\\ud800")),
        ({"image": zeros((2, 2, 7))}, ("row 1",)),
        ({"image": zeros(5)}, ("row 1",)),
        ({"image": np.full((3, 3, 3), NAN)}, ("row 1",)),
        ({"image": np.full((3, 3, 3), 300)}, ("row 1",)),
        ({"image": zeros((3, 0, 3))}, ("row 1",)),
        ({"image": zeros((3, 3, 3), dtype=complex)}, ("row 1",)),
        ({"image": Image.new("RGB", (2000, 3))}, ("row 1", "2000")),
        ({"image": "http://host/a.png"}, ("http://host/a.png",)),
        ({"image": "data:image/png;base64,!!"}, ("row 1",)),
        ({"text": "a <|image_pad|>"}, ("<|image_pad|>",)),
        ([{"role": "user", "content": 5}], ("row 1",)),
        ([{"role": "user", "content": [5]}], ("row 1",)),
        ([{"role": "user"}], ("row 1", "content")),
        ({"video": "none.mp4"}, ("row 1", "none.mp4")),
        ({"text": "\ud800"}, ("row 1", "ud800")),
        (object(), ("row 1",)),
    ]
    for item, words in items:
        blank = isinstance(item, str) and not item.strip()  # embedded as stock code embeds it, or refused
        yield Case("encode", f"{item!r:.60}", partial(encode, item), words, harmless=blank)
    yield from each(
        "encode",
        lambda **bad: t.model().encode(["a", "b"], show_progress_bar=False, **bad),
        batch_size=[0, -1, "x", 1.5],
        truncate_dim=[0, -1, "x"],
        prompt=[5],
        prompt_name=["none"],
        batch_num_tokens=[0, -1, "x"],
    )


def _losses(_: Things) -> Iterator[Case]:

    yield from each(
        "HardNegativeInfoNCELoss",
        lambda **bad: HardNegativeInfoNCELoss(None, **bad),
        temperature=[0, -1, NAN, INF, "x", None],
        margin=[NAN, "x", -INF],
        num_hard_negatives=[0, -1, 1.5, "x"],
        mini_batch_size=[0, -1, 1.5, "x"],
        mini_batch_num_tokens=[0, -5, "x"],
        negative_selection=["easiest", None],
    )
    yield from each(
        "DistillKLLoss",
        lambda **bad: DistillKLLoss(None, **{"temperature": 0.1, **bad}),
        temperature=[0, -1, NAN, INF, "x"],
        student_temperature=[0, -1, NAN],
        teacher_temperature=[0, NAN, "x"],
        direction=["sideways", None],
        mini_batch_size=[0],
    )
    yield from each("LossMetricsCallback", LossMetricsCallback, loss=[None, {}, 5])


def _samplers(t: Things) -> Iterator[Case]:

    good = {"dataset": t.rows, "batch_size": 2, "drop_last": False}
    one_column = Dataset.from_dict({"anchor": ["a"]})  # as stage 1 has them: equal texts are kept apart
    yield from each(
        "FalseNegativeAwareBatchSampler",
        lambda **bad: list(FalseNegativeAwareBatchSampler(**{**good, **bad})),
        harmless=(one_column,),
        dataset=[None, one_column],
        batch_size=[0, -1, 1.5, "x"],
        world_size=[0, -1],
        margin=[NAN, "x"],
        hard_negatives_together=[-1, 5, "x"],
        max_rows_per_dataset=[0, -1],
        guide_queries=["nowhere.npy", np.zeros((2, 3))],
    )


def _functional(_: Things) -> Iterator[Case]:

    scores = torch.eye(3)
    yield from each(
        "hardest_valid_negatives",
        lambda **bad: functional.hardest_valid_negatives(
            **{"scores": scores, "positive": torch.arange(3), "k": 1, "margin": 0.1, **bad}
        ),
        k=[0, -1],
        margin=[NAN],
    )
    yield from each(
        "in_batch_kl",
        lambda **bad: functional.in_batch_kl(
            scores, scores, **{"student_temperature": 0.1, "teacher_temperature": 0.1, **bad}
        ),
        direction=["sideways"],
        student_temperature=[0.0, NAN],
    )
