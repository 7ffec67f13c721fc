"""What works for which family of models: every check run on tiny random models of the real architectures.

    python benchmarks/families.py                    # all families
    python benchmarks/families.py --families qwen2_vl

A cell is "yes" when its check passed, or the reason why not. Writes `benchmarks/results/families.json`, from which
`benchmarks/readme.py` makes the table in `docs/models.md`. The models are those of the tests (`tests/tiny.py`).
"""

from __future__ import annotations

from basics import RESULTS as KEPT
from basics import keep, kept, parser

# isort: split
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.nn.parallel import DistributedDataParallel

from tiny import FAMILIES, PLUGIN_FAMILIES, picture, tiny_backbone
from two_processes import run_two
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules.speed.vision_cache import vision_tower

ALL = [*FAMILIES, *PLUGIN_FAMILIES]
RESULTS = KEPT / "families.json"
COLORS = ("red", "green", "white", "yellow", "purple", "black")
IMAGES = [picture(color) for color in COLORS]
TEXTS = [f"a {color} picture" for color in COLORS]
QUESTIONS = [{"image": IMAGES[1], "text": "what colour?"}, {"image": IMAGES[2:4], "text": "two"}]
MIXED = ["a red bus", IMAGES[0], *QUESTIONS, "b"]
TOLERANCE = 1e-5


class CheckError(Exception):
    """A check did not pass; the text is what the table says."""


def load(backbone: Path, folder: Path) -> None:
    """Every weight comes from the checkpoint, and what was saved gives the same embeddings when loaded."""
    model = build_encoder(backbone, device="cpu")
    model.save_pretrained(str(folder))
    _close(load_encoder(folder, device="cpu").encode(MIXED), model.encode(MIXED), "loaded again, embeddings differ")


def encode(backbone: Path, _folder: Path) -> None:
    """A mixed batch equals its rows one at a time; another image is another embedding."""
    model = build_encoder(backbone, device="cpu")
    together = model.encode(MIXED, batch_size=len(MIXED))
    _close(together, np.concatenate([model.encode([item]) for item in MIXED]), "a batch differs from its rows")
    if np.abs(model.encode([IMAGES[0]]) - model.encode([IMAGES[1]])).max() < 1e-3:
        raise CheckError("the embedding ignores the image")


def train(backbone: Path, folder: Path) -> None:
    """A step of the Trainer moves the weights of both parts."""
    model = build_encoder(backbone, device="cpu")
    moved = _trained(model, folder)
    tower = _tower(model)
    if not any(name.startswith(tower) for name in moved) or all(name.startswith(tower) for name in moved):
        raise CheckError("training moved one part of the model only")


def lora(backbone: Path, folder: Path) -> None:
    """A step of the Trainer moves LoRA weights and nothing else; merged, the embeddings stay."""
    model = build_encoder(backbone, device="cpu", peft_config=True)
    moved = _trained(model, folder)
    tower = _tower(model)
    if not moved or any("lora_" not in name or name.startswith(tower) for name in moved):
        raise CheckError("training moved other weights than the language model's adapters")
    export_encoder(model, folder / "merged")
    merged = load_encoder(folder / "merged", device="cpu")
    _close(merged.encode(MIXED), model.encode(MIXED), "merged, embeddings differ")


def cached_loss(backbone: Path, _folder: Path) -> None:
    """GradCache gives the loss and the gradients of the whole batch at once."""
    one, other = (_step(backbone, slice(None), mini_batch_size=size) for size in (None, 2))
    _same_step(one, other)


def two_processes(backbone: Path, folder: Path) -> None:
    """Half of the batch on each of two processes gives the loss and the gradients of the whole."""
    folder.mkdir(parents=True)
    ranks = run_two(_rank, folder, str(backbone))
    one = _step(backbone, slice(None), mini_batch_size=None)
    for _, gradients in ranks:
        _same_step(one, (sum(loss for loss, _ in ranks) / 2, gradients))


def multi_process_encode(backbone: Path, _folder: Path) -> None:
    """`encode` over a pool of two processes, started after images were encoded, equals one process."""
    model = build_encoder(backbone, device="cpu")
    alone = model.encode(MIXED)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        _close(model.encode(MIXED, pool=pool, chunk_size=2), alone, "over two processes, embeddings differ")
    finally:
        model.stop_multi_process_pool(pool)


def export(backbone: Path, folder: Path) -> None:
    """The exported folder gives the same embeddings in a new process, by stock sentence-transformers."""
    model = build_encoder(backbone, device="cpu")
    export_encoder(model, folder / "encoder")
    IMAGES[0].save(folder / "picture.png")
    lacked = type(model[0].model.config).__module__.startswith("unime_st.")  # by transformers
    code = f"import unime_st\n{_STOCK}" if lacked else f"{_STOCK}\nassert 'unime_st' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"stock code fails: {done.stderr.strip().splitlines()[-1]}")
    expected = np.concatenate([model.encode([item]) for item in ("a red bus", str(folder / "picture.png"))])
    _close(np.load(folder / "stock.npy"), expected, "in stock code, embeddings differ")


CHECKS: dict[str, Callable[[Path, Path], None]] = {
    "load": load, "encode": encode, "train": train, "LoRA": lora, "cached loss": cached_loss,
    "2 processes": two_processes, "multi-process encode": multi_process_encode, "export": export,
}  # fmt: skip
_STOCK = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1] + "/encoder", device="cpu")
items = ["a red bus", sys.argv[1] + "/picture.png"]
np.save(sys.argv[1] + "/stock.npy", np.concatenate([model.encode([item]) for item in items]))
"""


def _close(found: np.ndarray, expected: np.ndarray, complaint: str) -> None:
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise CheckError(f"{complaint} by {difference:.1e}")


def _tower(model: Any) -> str:
    tower = vision_tower(model[0].model)
    return next(name for name, module in model.named_modules() if module is tower)


def _trained(model: Any, folder: Path) -> set[str]:
    """Names of the parameters that two steps changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "training"), max_steps=2, per_device_train_batch_size=6, learning_rate=1e-2, **quiet
    )
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": [{"image": image, "text": "a"} for image in IMAGES]})
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=3, temperature=1.0)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
    trainer.train()
    if not all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row):
        raise CheckError("the loss is not finite")
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def _step(backbone: Path | str, rows: slice, wrap: Callable[[Any], Any] = lambda model: model, **options: Any) -> Any:
    """Loss and gradients of one step in double precision."""
    encoder = build_encoder(backbone, device="cpu").double()
    loss = HardNegativeInfoNCELoss(wrap(encoder), temperature=1.0, num_hard_negatives=3, **options)
    columns = [encoder.preprocess(list(column[rows])) for column in (TEXTS, IMAGES)]
    value = loss([dict(column) for column in columns])
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def _rank(rank: int, backbone: str) -> Any:
    def wrap(model: Any) -> Any:
        return DistributedDataParallel(model, find_unused_parameters=True)

    return _step(backbone, slice(3 * rank, 3 * rank + 3), wrap, gather_across_devices=True, mini_batch_size=2)


def _same_step(one: Any, other: Any) -> None:
    if abs(float(one[0] - other[0])) > 1e-6:
        raise CheckError(f"losses differ by {abs(float(one[0] - other[0])):.1e}")
    alive = [name for name, gradient in one[1].items() if gradient.abs().max() > 1e-4]
    if len(alive) < 10:
        raise CheckError("hardly any gradient")
    worst = max(float((one[1][name] - other[1][name]).abs().max()) for name in alive)
    if worst > TOLERANCE:
        raise CheckError(f"gradients differ by {worst:.1e}")


def check(family: str, scratch: Path) -> dict[str, str]:
    """Check -> "yes", or the reason why not."""
    backbone = tiny_backbone(family, scratch / family / "backbone")
    row = {}
    for name, run in CHECKS.items():
        folder = scratch / family / name.replace(" ", "-")
        try:
            run(backbone, folder)
        except CheckError as failure:
            row[name] = str(failure)
        else:
            row[name] = "yes, after `import unime_st`" if name == "export" and family in PLUGIN_FAMILIES else "yes"
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--families", nargs="+", choices=ALL, default=ALL)
    arguments = options.parse_args()
    table = kept(RESULTS)
    with tempfile.TemporaryDirectory() as scratch:
        for family in arguments.families:
            table[family] = check(family, Path(scratch))
            print(family, json.dumps(table[family]), flush=True)
    keep(RESULTS, {family: table[family] for family in ALL if family in table})


if __name__ == "__main__":
    main()
