"""Training that is killed at a random moment after its first checkpoint and goes on, against two undisturbed runs.

What two undisturbed runs differ in is what the device's own arithmetic allows; one that went on may differ by no more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, scratch_folder
from safetensors.torch import load_file
from trained import encoder, largest_difference, trainer

from models import real_backbone
from unime_st.checkpoints import last_complete_checkpoint

STEPS = 6
PROCESSES = multiprocessing.get_context("forkserver")  # imports are paid once, in a process that computes nothing
PROCESSES.set_forkserver_preload(["trained"])


def run(folder: Path, output: Path, device: str, tiny: bool) -> None:
    given = argparse.Namespace(device=device, tiny=tiny)
    own = trainer(encoder(folder, given), output, given, save_steps=1, steps=STEPS, save_total_limit=2)
    checkpoint = last_complete_checkpoint(output)
    own.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class Bench:
    def __init__(self, given: Any, folder: Path) -> None:
        self.given, self.folder = given, folder
        real_backbone("qwen2_vl", folder / "backbone", given.device, small=given.tiny)

    def start(self, name: str) -> Any:
        told = self.folder, self.folder / name, self.given.device, self.given.tiny
        process = PROCESSES.Process(target=run, args=told)
        process.start()
        return process

    def undisturbed(self, name: str) -> dict[str, float]:
        begun = time.monotonic()
        process = self.start(name)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError("A run ended with an error, which is above.")
        return {"seconds": round(time.monotonic() - begun, 1), "steps": STEPS}

    def killed(self, name: str) -> dict[str, Any]:
        """Soon after the first whole checkpoint, at a moment that is drawn."""
        child = self.start(name)
        while last_complete_checkpoint(self.folder / name) is None and child.is_alive():
            time.sleep(0.05)
        time.sleep(random.random() * (0.5 if self.given.tiny else 5))
        child.kill()
        child.join()
        checkpoint = last_complete_checkpoint(self.folder / name)
        found = {
            "killed": child.exitcode == -signal.SIGKILL,
            "goes on from": checkpoint.name if checkpoint else "the start",
        }
        return found | self.undisturbed(name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / f"checkpoint-{STEPS}" / "adapter_model.safetensors")

    def compare(self) -> dict[str, float]:
        one = self.weights("one")
        pairs = {"two undisturbed runs": self.weights("two"), "one that was killed": self.weights("killed")}
        learned = max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name)
        found = {name: largest_difference(one, other) for name, other in pairs.items()}
        return found | {"largest weight that began at 0": learned}


def main() -> None:
    given = arguments(__doc__)
    results = Results("kills", given)

    with scratch_folder() as scratch:
        bench = Bench(given, Path(scratch))
        for name in ("one", "two"):
            results.measure(f"undisturbed, {name}", lambda name=name: bench.undisturbed(name))
        results.measure("killed", lambda: bench.killed("killed"))
        results.measure("largest difference of weights", bench.compare)


if __name__ == "__main__":
    main()
