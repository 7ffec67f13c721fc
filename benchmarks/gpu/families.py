"""Every family in small: embeddings, losses, gradients and saving on the device against the CPU.

Goals: float32 within 1e-4 of the CPU, bfloat16 a cosine of 0.999 with it (beside it what padded rows reach), one step
of each loss with the CPU's value and gradients, cached as plain, and the same embeddings after saving and loading.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, arguments
from sentence_transformers.util import batch_to_device

from models import with_wider_heads
from tiny import FAMILIES, PLUGIN_FAMILIES, picture, tiny_backbone
from unime_st import build_encoder, load_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules.speed.prefixes import shares_prefixes

KINDS = ("auto", "tree", "mask", "padded rows")  # the two in the middle where the family can pack


def inputs() -> list[Any]:
    images = [picture("red"), picture("green", (30, 60)), picture("yellow", (70, 20))]
    items: list[Any] = [{"image": image, "text": f"Is it {word}?"} for image in images for word in ("red", "very red")]
    items += [*images, "a cat", "a cat on a mat " * 6, "a dog", {"image": images[:2], "text": "Which?"}, "a cat"]
    return items


def embeddings(model: Any, kind: str) -> np.ndarray:
    model[0].share_prefixes = kind != "padded rows"
    if kind != "padded rows":
        model[0].prefixes.attention = kind
    model[0].vision_cache.clear()
    return np.asarray(model.encode(inputs(), batch_size=8), dtype=np.float64)


def step(model: Any, loss: Any, columns: list[list[Any]], labels: torch.Tensor | None, device: str) -> Any:
    """Loss, and gradients by name, on the CPU."""
    model.train()
    model.zero_grad(set_to_none=True)
    features = [batch_to_device(model.preprocess(column), device) for column in columns]
    value = loss(features, labels if labels is None else labels.to(device))
    value.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return float(value), found


def difference(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> list[float]:
    """Of the losses, and the largest of gradients over the largest gradient."""
    assert one[1].keys() == other[1].keys() and one[1]  # noqa: PT018
    largest = max(float(gradient.abs().max()) for gradient in one[1].values())
    gradients = max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1]) / largest
    return [abs(one[0] - other[0]), gradients]


def losses(model: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {"temperature": 1.0, "num_hard_negatives": 3}
    return {
        "distil": DistillKLLoss(model, temperature=0.5),
        "distil, cached": DistillKLLoss(model, temperature=0.5, mini_batch_size=3),
        "contrast": HardNegativeInfoNCELoss(model, **fixed),
        "contrast, cached": HardNegativeInfoNCELoss(model, **fixed, mini_batch_size=3),
    }


def family_checks(family: str, folder: Path, device: str) -> dict[str, Any]:
    tiny_backbone(family, folder)
    expected = embeddings(build_encoder(folder, device="cpu"), "padded rows")
    model = build_encoder(folder, device=device)
    found: dict[str, Any] = {}
    kinds = KINDS if shares_prefixes(model[0].model) else (KINDS[0], KINDS[-1])
    for kind in kinds:
        found[f"float32, {kind}"] = float(np.abs(embeddings(model, kind) - expected).max())
        if kind == "auto":
            found["attention"] = model[0].prefixes.taken
    narrow = build_encoder(folder, device=device, torch_dtype="bfloat16")
    for kind in kinds:
        found[f"bfloat16 cosine, {kind}"] = float((embeddings(narrow, kind) * expected).sum(-1).min())
    model.save_pretrained(str(folder / "saved"))
    again = load_encoder(folder / "saved", device=device)
    found["saved and loaded"] = float(np.abs(embeddings(again, "auto") - embeddings(model, "auto")).max())
    return found


def step_checks(folder: Path, device: str) -> dict[str, Any]:
    """A step of each loss on the device against the CPU's padded rows; with LoRA."""
    texts = [["a cat", "a cat on a mat", "no", "a dog " * 6], ["the cat", "a mat", "it is not", "dogs"]]
    half = len(inputs()) // 2
    pairs = [inputs()[:half], inputs()[half : 2 * half]]
    teacher = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    reference = build_encoder(folder, device="cpu", peft_config=True)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    reference.save_pretrained(str(folder / "adapter"))
    model = load_encoder(folder / "adapter", device=device)
    for one in (reference, model):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("lora_" in name)
    reference[0].share_prefixes = False
    found: dict[str, Any] = {}
    for name, loss in losses(model).items():
        columns, labels = (texts, teacher) if name.startswith("distil") else (pairs, None)
        expected = step(reference, losses(reference)[name.partition(",")[0]], columns, labels, "cpu")
        found[name] = difference(expected, step(model, loss, columns, labels, device))
    model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    model[0].model.enable_input_require_grads()
    columns, labels = pairs, None
    expected = step(reference, losses(reference)["contrast"], columns, labels, "cpu")
    found["contrast, checkpointed"] = difference(
        expected, step(model, losses(model)["contrast, cached"], columns, labels, device)
    )
    return found


def main() -> None:
    given = arguments(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(4)
    results = Results("families", given)
    with_wider_heads()
    families = (*FAMILIES, *PLUGIN_FAMILIES) if not given.tiny else ("qwen2_vl", "llava_next")
    with tempfile.TemporaryDirectory() as scratch:
        for family in families:
            folder = Path(scratch) / family
            results.measure(family, lambda family=family, folder=folder: family_checks(family, folder, given.device))
        for family in families:
            folder = Path(scratch) / family
            results.measure(f"{family}: steps", lambda folder=folder: step_checks(folder, given.device))


if __name__ == "__main__":
    main()
