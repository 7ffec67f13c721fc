"""Memory and time of a GradCache step whose images are files of 1,000 pixels a side, from the data collator on.

    python benchmarks/media_memory.py

A batch of 256 texts, each with the image file that it asks for, goes through the Trainer's data collator and a forward
and backward pass of the loss, in mini-batches of 8, on LLaVA-NeXT's architecture with its real tiles of 336 pixels
(2,928 tokens an image of 1,000 x 1,000) but tiny random weights: of a real model activations come on top, the same for
all, and for ours the features of its frozen tower that a step keeps; of the one layer of its language model, ours
computes the feed-forward part for last tokens alone. Contenders: stock modules with
`CachedMultipleNegativesRankingLoss`; ours with all media processed by the collator; and ours with media left until
their mini-batch is embedded (`late_media=0`).

Each run is a process of its own on one thread. Memory is the growth of its peak over the model, and over what one row
leaves behind, such as loaded libraries; time is that of the processor. Losses and gradients are compared with stock's.
Files of as many sizes as there are files are the worst case: the processor is asked for the tokens of each size once.
Writes `benchmarks/results/media_memory.json`.
"""

from __future__ import annotations

from basics import RESULTS, in_process, keep, kept, machine, parser, peak_above

# isort: split
import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from small_models import full_tiles_llava_next
from train_step import difference
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config

BATCH, MINI_BATCH, TEMPERATURE, SIDE = 256, 8, 0.05, 1000
STOCK, AT_ONCE, LATE = "stock", "unime_st, all at once", "unime_st, late media"
KINDS = (STOCK, AT_ONCE, LATE)
CASES = {
    "frozen vision": {"sizes": 1, "trained": False, "kinds": KINDS},
    "frozen vision, no two files of one size": {"sizes": BATCH, "trained": False, "kinds": (STOCK, LATE)},
    "trained vision": {"sizes": 1, "trained": True, "kinds": (STOCK, LATE)},
}


def write_files(folder: Path, sizes: int) -> None:
    """Files of coarse noise, of one size or of so many, about 1,000 pixels a side."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(BATCH):
        noise = Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        size = (SIDE - number % sizes, SIDE - number % sizes // 2)
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def encoder(kind: str, path: Path, *, trained: bool) -> SentenceTransformer:
    """The model on stock modules or ours; the language model has LoRA."""
    if kind == STOCK:
        transformer = Transformer(str(path), processor_kwargs={"padding_side": "left"})
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    else:
        model = load_encoder(path, device="cpu", late_media=0 if kind == LATE else None)
    model.add_adapter(default_lora_config(rank=16))
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
        elif trained and "vision_tower.encoder.layers.0" in name:
            parameter.requires_grad_()
    return model.train()


def loss_of(kind: str, model: SentenceTransformer) -> nn.Module:
    if kind == STOCK:
        return CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=MINI_BATCH)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "margin": None, "num_hard_negatives": None}
    return HardNegativeInfoNCELoss(model, **options, mini_batch_size=MINI_BATCH)


def step(model: SentenceTransformer, loss: nn.Module, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The loss of a batch and the seconds that the collator took, after a backward pass."""
    started = time.process_time()
    batch = SentenceTransformerDataCollator(model.preprocess)(rows)
    seconds = time.process_time() - started
    columns = [
        {name.removeprefix(column): value for name, value in batch.items() if name.startswith(column)}
        for column in ("anchor_", "positive_")
    ]
    del batch
    value = loss(columns, None)
    value.backward()
    return value.item(), seconds


def run(kind: str, path: Path, files: Path, gradients: Path, *, trained: bool) -> dict[str, float]:
    """Measure one contender in this process; write its gradients."""
    torch.set_num_threads(1)
    model = encoder(kind, path, trained=trained)
    loss = loss_of(kind, model)
    rows = [
        {"anchor": f"the picture with number {row}", "positive": {"image": str(files / f"{row}.jpg")}}
        for row in range(BATCH)
    ]
    step(model, loss, rows[:2])
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    with peak_above() as peak:
        value, collating = step(model, loss, rows)
    seconds = time.process_time() - started
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    save_file(found, gradients)
    return {"megabytes": round(peak.bytes / 2**20), "seconds": seconds, "of them collating": collating, "loss": value}


def compare(path: Path, folder: Path, *, sizes: int, trained: bool, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Each contender in a process of its own, and how far its results are from stock's."""
    files = folder / "files"
    write_files(files, sizes)
    found: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        where = [str(place) for place in (path, files, folder / f"{number}.safetensors")]
        found[kind] = in_process(__file__, "--one", kind, *where, str(int(trained)))
        print(kind, json.dumps(found[kind]), flush=True)
    reference = load_file(folder / "0.safetensors")
    for number, kind in enumerate(kinds):
        own = load_file(folder / f"{number}.safetensors")
        found[kind]["difference of loss"] = abs(found[kind]["loss"] - found[STOCK]["loss"])
        found[kind]["difference of gradients"] = difference(own, reference)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="cases whose name holds this; the others' results stay")
    options.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        kind, path, files, gradients, trained = given.one
        found = run(kind, Path(path), Path(files), Path(gradients), trained=trained == "1")
        print(json.dumps(found))
        return
    file = RESULTS / "media_memory.json"
    results = kept(file) | {"command": "python benchmarks/media_memory.py", "batch": BATCH, "mini_batch": MINI_BATCH}
    with tempfile.TemporaryDirectory() as temporary:
        backbone = full_tiles_llava_next(Path(temporary) / "backbone")
        path = Path(temporary) / "encoder"
        export_encoder(build_encoder(backbone, device="cpu"), path)
        for name, case in CASES.items():
            if given.only in name:
                print(name)
                folder = Path(temporary) / name
                folder.mkdir()
                results[name] = compare(path, folder, **case)
                keep(file, results | {"machine": machine()})


if __name__ == "__main__":
    main()
