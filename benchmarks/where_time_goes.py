"""Where each path spends its time: decoding, processing, vision, language model, loss, and the rest.

    python benchmarks/where_time_goes.py

CPU time on one thread, the miniature in 12 of its layers; each moment belongs to the innermost part that is running.
Encoding takes the workloads of `benchmarks/encode.py`. A training step has 16 pairs (stage 2, images with questions and
texts, GradCache in mini-batches of 8) or 32 texts (stage 1), LoRA on the language model, features made in the same
process as a data loader without workers does. Writes `benchmarks/results/where_time_goes.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, machine, parser

# isort: split
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import workloads
from encode import COUNTS, Inputs, inputs_for
from small_models import miniature
from unime_st import load_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config
from unime_st.modules.speed.prefixes import language_model
from unime_st.modules.speed.vision_cache import vision_tower

PARTS = ("identity and order", "decoding", "processing", "planning", "vision",
         "language model", "backward", "transfer", "loss", "other")  # fmt: skip


class Clock:
    """CPU seconds by part; a part that another interrupts does not count the other's time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        self._turn()
        self._running.append(part)

    def leave(self) -> None:
        self._turn()
        self._running.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run


@contextmanager
def watching(model: Any, clock: Clock, loss: nn.Module | None = None) -> Iterator[None]:
    """Within this context the parts of the encoder, and of a loss, are timed."""
    from unime_st.modules import inputs, sentence_transformer
    from unime_st.modules.speed import batches as inference
    from unime_st.modules.speed import prefixes as shared_prefix

    inner = model[0].model
    with ExitStack() as stack:
        named = [
            (inputs, "open_image", "decoding"), (sentence_transformer, "encoding_order", "identity and order"),
            (inference, "select_rows", "processing"), (sentence_transformer, "_moved", "transfer"),
            (shared_prefix, "pack_tree", "planning"), (shared_prefix, "flatten_tree", "planning"),
            (model[0], "preprocess", "processing"), *([(loss, "compute_loss", "loss")] if loss is not None else []),
        ]  # fmt: skip
        for owner, name, part in named:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        for module, part in ((vision_tower(inner), "vision"), (language_model(inner), "language model")):
            assert module is not None
            stack.callback(module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part)).remove)
            stack.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        yield


def encoding(checkpoint: Path, items: list[Any]) -> Callable[[Clock], None]:
    model = load_encoder(str(checkpoint), device="cpu").float()
    model.encode(items[:4])

    def run(clock: Clock) -> None:
        model[0].vision_cache.clear()
        with watching(model, clock):
            clock.timed("other", model.encode)(items, batch_size=32, show_progress_bar=False)

    return run


def training(checkpoint: Path, columns: list[list[Any]], stage: int) -> Callable[[Clock], None]:
    model = load_encoder(str(checkpoint), device="cpu").float()
    model.add_adapter(default_lora_config(rank=16))
    model.train()
    loss: nn.Module = HardNegativeInfoNCELoss(model, temperature=0.05, mini_batch_size=8)
    label = None
    if stage == 1:
        loss = DistillKLLoss(model, temperature=0.05)
        label = torch.nn.functional.normalize(torch.randn(len(columns[0]), 384), dim=1)

    def step(clock: Clock) -> None:
        features = [model.preprocess(column) for column in columns]
        value = loss(features, label)
        clock.timed("backward", value.backward)()
        model.zero_grad(set_to_none=True)

    def run(clock: Clock) -> None:
        model[0].vision_cache.clear()
        with watching(model, clock, loss):
            clock.timed("other", step)(clock)

    run(Clock())
    return run


def paths(checkpoint: Path, inputs: Inputs) -> dict[str, Callable[[], Callable[[Clock], None]]]:
    """What is measured, made when its turn comes."""
    images = inputs.images[:16]
    asked = [{**image, "text": workloads.QUESTIONS[row % 8]} for row, image in enumerate(images)]  # type: ignore[dict-item]
    return {
        "encode texts": lambda: encoding(checkpoint, inputs.draw("texts", 0.0, COUNTS["texts"])),
        "encode images": lambda: encoding(checkpoint, inputs.images[:32]),
        "encode mixed": lambda: encoding(checkpoint, inputs.draw("mixed", 0.25, COUNTS["mixed"])),
        "encode questions": lambda: encoding(checkpoint, workloads.questions(images[:6])),
        "stage-1 step": lambda: training(checkpoint, [inputs.draw("texts", 0.0, 32)], 1),
        "stage-2 step": lambda: training(checkpoint, [asked, inputs.texts[:16]], 2),
    }


def main() -> None:
    options = parser(__doc__, cache=True, runs=3, output=RESULTS / "where_time_goes.json")
    options.add_argument("--layers", type=int, default=12, help="of the miniature, for a quick look")
    given = options.parse_args()
    torch.set_num_threads(1)
    checkpoint = miniature(given.cache, given.layers)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, made in paths(checkpoint, inputs_for(checkpoint, Path(folder))).items():
            work = made()
            clocks = [Clock() for _ in range(given.runs)]
            for clock in clocks:
                work(clock)
            seconds = {part: statistics.median(clock.seconds[part] for clock in clocks) for part in PARTS}
            total = sum(seconds.values())
            shares = {part: round(value / total, 4) for part, value in seconds.items()}
            table[name] = {"seconds": round(total, 2), "share": shares}
            print(name, table[name], flush=True)
    about = {"command": "python benchmarks/where_time_goes.py", "machine": machine(threads=1), "layers": given.layers}
    keep(given.output, {**about, "runs": given.runs, "paths": table})


if __name__ == "__main__":
    main()
