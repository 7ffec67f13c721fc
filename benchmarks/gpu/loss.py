"""The loss alone, on embeddings of 2,048 dimensions: seconds and memory of a forward and backward pass.

Ours, and the arithmetic of the stock loss: one matrix of all scores.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Results, arguments, median, peak, timed
from torch.nn.functional import cross_entropy

from unime_st.losses import HardNegativeInfoNCELoss

TEMPERATURE = 0.02


def ours(k: int | None) -> Any:
    loss = HardNegativeInfoNCELoss(None, temperature=TEMPERATURE, margin=0.1, num_hard_negatives=k)
    return lambda query, target: loss.compute_loss_from_embeddings([query, target])


def stock(query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    scores = query @ target.T / TEMPERATURE
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def measured(compute: Any, count: int, dimensions: int, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    parts = [torch.randn(count, dimensions, device=device, generator=generator) for _ in range(2)]
    parts = [torch.nn.functional.normalize(part, dim=1).requires_grad_() for part in parts]

    def step() -> float:
        for part in parts:
            part.grad = None
        compute(*parts).backward()
        return 0.0

    step()
    peak(device)
    before = torch.cuda.memory_allocated() / 1e6 if device.startswith("cuda") else 0
    seconds, _ = timed(step, device, 3)
    return {"seconds": median(seconds), "MB above the embeddings": round(peak(device) - before)}


def main() -> None:
    given = arguments(__doc__)
    results = Results("loss", given)
    sizes, dimensions = ((64, 256), 32) if given.tiny else ((1024, 4096, 16384, 65536), 2048)
    for count in sizes:
        for name, compute in {"k = 8": ours(8), "all negatives": ours(None), "stock": stock}.items():
            results.measure(f"{count}, {name}", lambda c=compute, n=count: measured(c, n, dimensions, given.device))


if __name__ == "__main__":
    main()
