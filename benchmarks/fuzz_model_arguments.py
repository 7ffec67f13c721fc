"""Bad arguments of models, losses and samplers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from fuzz_cases import INF, NAN, Case, Things, calls, each, paths
from unime_st import build_encoder, export_encoder, functional, load_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.samplers import FalseNegativeAwareBatchSampler

# fmt: off
NO_INPUT: tuple[Any, ...] = (
    None, NAN, 5, ["a", "b", "c"], {}, {"text": 5}, {"text": NAN}, {"text": ["a"]}, {"image": 5}, {"image": b""},
    *({"image": array} for array in (
        np.zeros((2, 2, 7)), np.zeros(5), np.full((3, 3, 3), NAN), np.full((3, 3, 3), 300), np.zeros((3, 0, 3)),
        np.zeros((3, 3, 3), dtype=complex))),
    {"image": "data:image/png;base64,!!"}, object(), *([{"role": "user", "content": bad}] for bad in (5, [5])),
)
"""Inputs whose message must name their row."""
NAMED_INPUT: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ({"img": "x"}, ("img",)), ({"image": "none.png"}, ("none.png",)), ("none.png", ("none.png",)),
    ({"image": "a\0.png"}, ("row 1", "a\\x00")), ({"image": "x" * 5000}, ("row 1", "xxx")),
    ({"image": "\ud800"}, ("row 1", "\\ud800")), ({"image": Image.new("RGB", (2000, 3))}, ("row 1", "2000")),
    ({"image": "http://host/a.png"}, ("http://host/a.png",)), ({"text": "a <|image_pad|>"}, ("<|image_pad|>",)),
    ([{"role": "user"}], ("row 1", "content")), ({"video": "none.mp4"}, ("row 1", "none.mp4")),
    ({"text": "\ud800"}, ("row 1", "ud800")),
)
"""Inputs whose message must name what is wrong with them."""


def model_cases(things: Things) -> Iterator[Case]:
    """All of them."""
    for part in (_models, _encode, _losses, _samplers, _functional):
        yield from part(things)


def _models(t: Things) -> Iterator[Case]:
    yield from paths("build_encoder", partial(build_encoder, device="cpu"), t)
    yield from each("build_encoder", partial(build_encoder, t.backbone, device="cpu"), max_pixels=[0, -1, "x", NAN],
                    max_seq_length=[0, -5, "x", NAN], prompt_template=[5, "nonsense"], peft_config=["lora", 5],
                    torch_dtype=["float3"], vision_cache_bytes=[-1, "x"], prompts=["a", 5, {1: 2}], device=["nowhere"])
    yield from paths("load_encoder", partial(load_encoder, device="cpu"), t)
    yield from each("export_encoder", lambda **bad: export_encoder(**{"model": t.model(), "path": t.new(), **bad}),
                    model=[None, "x", 5], path=[None, 5, t.file])


def _encode(t: Things) -> Iterator[Case]:
    def encode(item: Any) -> Any:
        return t.model().encode([{"text": "good"}, item], show_progress_bar=False)

    words = t.root / "words.png"
    words.write_bytes(b"no image")
    yield from calls("encode", encode, NO_INPUT, ("row 1",))
    yield from calls("encode", encode, ("", "  "), ("row 1",), harmless=True)  # refused, or as stock code embeds it
    files = (({"image": str(path)}, (path.name,)) for path in (words, t.root))
    for item, named in (*NAMED_INPUT, *files):
        yield from calls("encode", encode, (item,), named)
    encode_two = partial(t.model().encode, ["a", "b"], show_progress_bar=False)
    yield from each("encode", encode_two, batch_size=[0, -1, "x", 1.5],
                    truncate_dim=[0, -1, "x"], prompt=[5], prompt_name=["none"], batch_num_tokens=[0, -1, "x"])


def _losses(_: Things) -> Iterator[Case]:
    yield from each("HardNegativeInfoNCELoss", partial(HardNegativeInfoNCELoss, None),
                    temperature=[0, -1, NAN, INF, "x", None], margin=[NAN, "x", -INF],
                    num_hard_negatives=[0, -1, 1.5, "x"], mini_batch_size=[0, -1, 1.5, "x"],
                    mini_batch_num_tokens=[0, -5, "x"], negative_selection=["easiest", None])
    yield from each("DistillKLLoss", partial(DistillKLLoss, None, temperature=0.1), temperature=[0, -1, NAN, INF, "x"],
                    student_temperature=[0, -1, NAN], teacher_temperature=[0, NAN, "x"], direction=["sideways", None],
                    mini_batch_size=[0])
    yield from each("LossMetricsCallback", LossMetricsCallback, loss=[None, {}, 5])


def _samplers(t: Things) -> Iterator[Case]:
    def sampled(**bad: Any) -> Any:
        return list(FalseNegativeAwareBatchSampler(**{"dataset": t.rows, "batch_size": 2, "drop_last": False, **bad}))

    one_column = Dataset.from_dict({"anchor": ["a"]})  # as stage 1 has them: equal texts are kept apart
    yield from each("FalseNegativeAwareBatchSampler", sampled, harmless=(one_column,), dataset=[None, one_column],
                    batch_size=[0, -1, 1.5, "x"], world_size=[0, -1], margin=[NAN, "x"],
                    hard_negatives_together=[-1, 5, "x"], max_rows_per_dataset=[0, -1],
                    guide_queries=["nowhere.npy", np.zeros((2, 3))])


def _functional(_: Things) -> Iterator[Case]:
    scores = torch.eye(3)
    hardest = partial(functional.hardest_valid_negatives, scores=scores, positive=torch.arange(3), k=1, margin=0.1)
    yield from each("hardest_valid_negatives", hardest, k=[0, -1], margin=[NAN])
    kl = partial(functional.in_batch_kl, scores, scores, student_temperature=0.1, teacher_temperature=0.1)
    yield from each("in_batch_kl", kl, direction=["sideways"], student_temperature=[0.0, NAN])
