"""Three calls on a tiny random model, followed through the package: the walks of `structure.py`."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

HASHES = ("fingerprint", "content_id", "content_id_and_media", "media_and_text", "_parts", "_digest", "_medium")
"""Functions of `fingerprint.py` or below `identity/` whose calls are counted, as are those of `hashlib.blake2b`."""
_MODELS = f"{os.sep}transformers{os.sep}models{os.sep}"


class Walk:
    """What runs of a package while a function is called; what importing a module runs is left out."""

    def __init__(self, package: Path) -> None:
        self.package = f"{package}{os.sep}"
        self.functions: dict[tuple[str, str], None] = {}
        self.deepest = 0
        self.at_forward: int | None = None
        self.hashes: Counter[str] = Counter()
        self._generators: set[FrameType] = set()

    def of(self, call: Callable[[], Any]) -> None:
        """Follow one call, in the threads that it starts too."""
        with patch.object(hashlib, "blake2b", wraps=hashlib.blake2b) as blake2b:
            threading.setprofile(self._seen)
            sys.setprofile(self._seen)
            try:
                call()
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
        self.hashes["blake2b"] = blake2b.call_count

    def _seen(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "call":
            return
        if not code.co_filename.startswith(self.package):
            if self.at_forward is None and code.co_name == "forward" and _MODELS in code.co_filename:
                self.at_forward = self._depth(frame)
            return
        depth = self._depth(frame)
        if not depth or code.co_name.startswith("<"):
            return
        file = Path(code.co_filename).relative_to(self.package)
        self.functions[file.as_posix(), code.co_qualname] = None
        if self.at_forward is None:
            self.deepest = max(self.deepest, depth)
        if code.co_name in HASHES and (file.name == "fingerprint.py" or "identity" in file.parts[:-1]):
            self.hashes[code.co_name] += frame not in self._generators  # one that goes on is seen again
            if code.co_flags & CO_GENERATOR:
                self._generators.add(frame)

    def _depth(self, frame: FrameType | None) -> int:
        """Named functions of the package on the stack, 0 while one of its modules is imported."""
        depth = 0
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.package):
                if frame.f_code.co_name == "<module>":
                    return 0
                depth += not frame.f_code.co_name.startswith("<")
            frame = frame.f_back
        return depth

    def read(self, inputs: int) -> dict[str, Any]:
        """The figures; hashes for each of so many distinct inputs."""
        order = list(dict.fromkeys(file for file, _ in self.functions))
        return {
            "files": len(order), "functions": len(self.functions), "deepest_before_forward": self.deepest,
            "depth_at_forward": self.at_forward, "distinct_inputs": inputs,
            "hashes": {name: round(count / inputs, 2) for name, count in sorted(self.hashes.items()) if count},
            "order": order,
        }  # fmt: skip


def encoding(model: Any, _folder: Path) -> tuple[Callable[[], Any], int]:
    """`encode` of a text, an image, and both."""
    from tiny import picture

    inputs = ["a cat", picture("red"), {"image": picture("green"), "text": "a dog"}]
    return lambda: model.encode(inputs), len(inputs)


def training(model: Any, _folder: Path) -> tuple[Callable[[], Any], int]:
    """One step on two triplets with images, in mini-batches of one."""
    import torch

    from tiny import picture
    from unime_st.losses import HardNegativeInfoNCELoss

    loss = HardNegativeInfoNCELoss(model, mini_batch_size=1, num_hard_negatives=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    anchors = [{"image": picture(color), "text": "what is it?"} for color in ("red", "green")]
    columns = (anchors, ["a red square", "a green one"], ["a sad song", "a long way home"])

    def step() -> None:
        loss([model.preprocess(column) for column in columns], None).backward()
        optimizer.step()

    return step, sum(map(len, columns))


def evaluating(model: Any, folder: Path) -> tuple[Callable[[], Any], int]:
    """One MMEB task: two questions about pictures, the same three answers to choose from."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tiny import picture
    from unime_st.evaluation import MMEBEvaluator

    answers, rows = ["a cat", "a dog", "a bird"], []
    (folder / "images").mkdir(parents=True)
    (folder / "VOC2007").mkdir()
    for color in ("red", "green"):
        picture(color).save(folder / "images" / f"{color}.png")
        query = {"qry_text": "<|image_1|>\nWhat is it?", "qry_img_path": f"{color}.png"}
        rows.append({**query, "tgt_text": answers, "tgt_img_path": [""] * len(answers)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "VOC2007" / "test-00000-of-00001.parquet")
    evaluator = MMEBEvaluator(folder, ["VOC2007"])
    time.sleep(2.5)  # files that changed just now would be read, and hashed, each time
    return lambda: evaluator(model), len(rows) + len(answers)


def walks(package: Path, tests: Path, family: str = "qwen2_vl") -> dict[str, Any]:
    """Follow each of the calls, on a model of its own."""
    sys.path[:0] = [str(package.parent), str(tests)]
    from tiny import tiny_encoder

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, made in {"encode": encoding, "training step": training, "MMEB task": evaluating}.items():
            folder = Path(scratch) / made.__name__
            call, inputs = made(tiny_encoder(family, folder / "backbone"), folder / "data")
            walk = Walk(package)
            walk.of(call)
            found[name] = walk.read(inputs)
    return found
