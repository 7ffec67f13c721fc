"""FSDP2 through the Trainer, in one process: five steps, a checkpoint, going on from it, export, the same embeddings.

accelerate starts FSDP on GPUs only; on a CPU it is told here that it did, and all that follows is its own code. QLoRA
is tried where bitsandbytes is installed.
"""

from __future__ import annotations

import importlib.util
import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from common import Results, arguments, peak, scratch_folder
from sentence_transformers import SentenceTransformer
from torch.distributed.tensor import DTensor
from trained import SAVED, STEPS, adapters, dtype, encoder, largest_difference, losses, trainer
from work import questions
from work import text as words

from models import real_backbone
from unime_st import export_encoder, load_encoder

LAYER = "Qwen2VLDecoderLayer"
FSDP = {
    "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [LAYER],
    "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False,
}  # fmt: skip


class Bench:
    def __init__(self, given: Any, folder: Path) -> None:
        self.given, self.folder = given, folder
        real_backbone("qwen2_vl", folder / "backbone", given.device, small=given.tiny)
        self.model: Any = None
        self.weights: dict[str, torch.Tensor] = {}

    def train(self, resumed: bool) -> dict[str, Any]:
        on_cpu = self.given.device == "cpu"
        output = self.folder / "split"
        model = encoder(self.folder, self.given)
        own = trainer(model, output, self.given, **({} if on_cpu else {"fsdp": True, "fsdp_config": dict(FSDP)}))
        if on_cpu:
            tell_accelerate(own)
        peak(self.given.device)
        own.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if resumed else None)
        found = {"split": sum(isinstance(weight, DTensor) for weight in model.parameters())}
        found |= {"losses": losses(own.state.log_history), "MB": peak(self.given.device)}
        weights = adapters(model)
        if resumed:
            return found | {"largest difference of weights": largest_difference(self.weights, weights)}
        self.model, self.weights = model, weights
        return found

    def whole(self) -> dict[str, float]:
        """Embeddings of the split model, of its checkpoint, and of what is exported from that."""
        side = (56,) if self.given.tiny else (336,)
        items = [*questions(1, side), "a text", words(random.Random(0))]
        expected = np.asarray(self.model.encode(items), dtype=np.float64)
        where = {"device": self.given.device, "torch_dtype": dtype(self.given)}
        loaded = load_encoder(self.folder / "split" / f"checkpoint-{STEPS}", **where)
        exported = export_encoder(loaded, self.folder / "exported")
        kinds = {"checkpoint": loaded, "exported": SentenceTransformer(str(exported), device=self.given.device)}
        found = {name: np.asarray(model.encode(items), dtype=np.float64) for name, model in kinds.items()}
        return {f"least cosine, {name}": float((value * expected).sum(-1).min()) for name, value in found.items()}

    def quantised(self) -> Any:
        if importlib.util.find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed"
        from transformers import BitsAndBytesConfig

        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = encoder(self.folder, self.given, model_kwargs={"quantization_config": four_bits})
        own = trainer(model, self.folder / "quantised", self.given)
        peak(self.given.device)
        own.train()
        return {"losses": losses(own.state.log_history), "MB": peak(self.given.device)}


def tell_accelerate(trainer: Any) -> None:
    """Be as under FSDP2 on a GPU, which accelerate does not start on a CPU."""
    kept = {name: FSDP[name] for name in ("auto_wrap_policy", "state_dict_type", "cpu_ram_efficient_loading")}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=[LAYER], **kept)
    for state in (PartialState, trainer.accelerator.state):  # the second copies the first's whenever it is made
        state._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.accelerator.state._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


def main() -> None:
    given = arguments(__doc__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(
            {name: str(value) for name, value in (ranks | {"MASTER_PORT": free.getsockname()[1]}).items()}
        )
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl")
    results = Results("fsdp", given)
    with scratch_folder() as scratch:
        bench = Bench(given, Path(scratch))
        results.measure("five steps", lambda: bench.train(resumed=False))
        results.measure("going on from the third", lambda: bench.train(resumed=True))
        results.measure("saved whole", bench.whole)
        results.measure("QLoRA", bench.quantised)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
