"""What the parts with a Trainer share: an encoder with adapters, questions about images, and where weights are read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from torch.distributed.tensor import DTensor
from work import image, text

from unime_st import build_encoder
from unime_st.checkpoints import CheckpointCallback, ResumingTrainer
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config

STEPS, SAVED = 5, 3


def rows(folder: Path, count: int, sides: tuple[int, ...]) -> Dataset:
    """Texts, and paths of images."""
    paths = []
    for number in range(count):
        paths.append(str(folder / f"{number}.png"))
        image(number, sides).save(paths[-1])
    return Dataset.from_dict({"query": [text(random.Random(number), 5, 60) for number in range(count)], "image": paths})


def dtype(given: Any) -> str:
    """Small ones compute in single precision, in which a difference is a mistake."""
    return "float32" if given.tiny else "bfloat16"


def encoder(folder: Path, given: Any, **options: Any) -> Any:
    """With adapters, whose weights are the same each time."""
    torch.manual_seed(0)
    options = {"torch_dtype": dtype(given), "peft_config": default_lora_config(rank=8)} | options
    return build_encoder(folder / "backbone", device=given.device, **options)


def trainer(
    model: Any, folder: Path, given: Any, *, save_steps: int = SAVED, steps: int = STEPS, **settings: Any
) -> Any:
    batch = 4 if given.tiny else 32
    sides = (56,) if given.tiny else (336,)
    images = folder.parent / "images"
    images.mkdir(exist_ok=True)
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=steps, save_steps=save_steps, logging_steps=1,
        learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=given.device == "cpu", seed=0,
        bf16=not given.tiny, **settings,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model, temperature=0.5, num_hard_negatives=None, mini_batch_size=batch // 2)
    return ResumingTrainer(model, arguments, train_dataset=rows(images, batch * steps, sides), loss=loss,
                           callbacks=[CheckpointCallback()])  # fmt: skip


def adapters(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are trained, whole and on the CPU."""
    found = {name: weight.detach() for name, weight in model.named_parameters() if "lora_" in name}
    whole = {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in found.items()}
    return {name: weight.float().cpu().clone() for name, weight in whole.items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one  # noqa: PT018
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]
