"""A linear baseline: ridge regression from frozen vision features to the teacher's embedding of the label.

It sees the same drawings of the same concepts that training shows, and is scored on the same retrieval lists as the
model. Its penalty is chosen by cross-validation over training concepts; validation and test are only scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.lib.format import open_memmap
from PIL import Image

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import SPLITS, TRAINED_VENDORS, VENDORS
from emoji.images import on_white
from emoji.miniature import STRIDE, VISION_DIM, load_vision_state, text_teacher
from emoji.packages import Fetched
from unime_st.files import write_atomically

PENALTIES = tuple(10.0**exponent for exponent in np.arange(2, 6.01, 0.5))
FOLDS = 5
KS = (1, 5, 10)

Scores = dict[str, float]


@dataclass(frozen=True)
class Ridge:
    """A fitted map: standardised features times weights plus a mean."""

    mean: torch.Tensor  # of the training features, (F,)
    deviation: torch.Tensor  # of the training features, (F,)
    weight: torch.Tensor  # (F, D)
    bias: torch.Tensor  # mean of the training targets, (D,)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Predict embeddings (N, D) of features (N, F)."""
        return ((features.double() - self.mean) / self.deviation) @ self.weight + self.bias


def fit_ridge(features: torch.Tensor, targets: torch.Tensor, penalties: Sequence[float]) -> list[Ridge]:
    """Fit (N, F) to (N, D) once a penalty, in float64, from one eigendecomposition of the smaller Gram matrix.

    >>> x = torch.eye(2)
    >>> fit_ridge(x, x, [1e-9])[0](x).round(decimals=3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    x, y = features.double(), targets.double()
    mean, deviation, bias = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    x, y = (x - mean) / deviation, y - bias
    dual = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if dual else x.T @ x)
    rotated = vectors.T @ (y if dual else x.T @ y)
    fits = []
    for penalty in penalties:
        solution = vectors @ (rotated / (values + penalty)[:, None])
        fits.append(Ridge(mean, deviation, x.T @ solution if dual else solution, bias))
    return fits


def choose_penalty(
    features: Sequence[torch.Tensor], targets: torch.Tensor, penalties: Sequence[float] = PENALTIES, seed: int = 0
) -> float:
    """Choose the penalty with the best mean reciprocal rank of text->image retrieval over five folds of concepts.

    Args:
        features: one (N, F) tensor a vendor, rows in the same order of concepts.
        targets: the teacher's embeddings. (N, D)
        penalties: to choose from.
        seed: of the folds.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    gains = np.zeros(len(penalties))
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        kept = torch.ones(len(targets), dtype=torch.bool)
        kept[held] = False
        fits = fit_ridge(
            torch.cat([rows[kept] for rows in features]), targets[kept].repeat(len(features), 1), penalties
        )
        for index, fit in enumerate(fits):
            for rows in features:
                gains[index] += (1.0 / _ranks(targets[held].double(), fit(rows[held]))).mean().item()
    return float(penalties[int(gains.argmax())])


def recalls(images: torch.Tensor, texts: torch.Tensor) -> dict[str, Scores]:
    """R@1, R@5 and R@10 in percent both ways; row i of the images (N, D) belongs to row i of the texts (N, D)."""
    both = {"text_to_image": _ranks(texts, images), "image_to_text": _ranks(images, texts)}
    return {way: {f"R@{k}": 100.0 * (rank <= k).double().mean().item() for k in KS} for way, rank in both.items()}


def _ranks(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Rank, from 1, of each query's own candidate by cosine; ties count against it."""
    unit = torch.nn.functional.normalize
    scores = unit(queries, dim=1) @ unit(candidates, dim=1).T
    return (scores >= scores.diagonal()[:, None]).sum(1).double()


def vision_features(
    fetched: Fetched,
    images: Sequence[Path],
    cache: Path,
    *,
    image_size: int = 160,
    batch_size: int = 32,
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Frozen EfficientNet-lite0 features in float16, (N, (image_size / 32) ** 2, 1280), kept in the .npy file `cache`.

    A file that holds as many rows of this size is read in place of the images: name it after what it holds.
    """
    shape = (len(images), (image_size // STRIDE) ** 2, VISION_DIM)
    if cache.is_file():
        kept = np.load(cache, mmap_mode="r")
        if kept.shape == shape:
            return kept
    tower: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    tower.load_state_dict(load_vision_state(fetched.vision_state))
    tower = tower.to(memory_format=torch.channels_last)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial")
    features = open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(images), batch_size):
        pixels = torch.stack([_pixels(path, image_size) for path in images[start : start + batch_size]])
        with torch.inference_mode():
            maps = tower.forward_features(pixels.to(memory_format=torch.channels_last))
        features[start : start + len(pixels)] = maps.flatten(2).transpose(1, 2).half().numpy()
        if start // batch_size % 20 == 19:
            report(f"vision features: {start + len(pixels)} of {len(images)}")
    features.flush()
    del features
    partial.replace(cache)
    return np.load(cache, mmap_mode="r")


def pooled(features: np.ndarray) -> torch.Tensor:
    """Pool features (N, P, C) into mean and maximum over positions, (N, 2C)."""
    maps = torch.from_numpy(np.array(features)).float()
    return torch.cat([maps.mean(1), maps.amax(1)], dim=1)


def ridge_baseline(
    fetched: Fetched,
    benchmark: EmojiBenchmark,
    cache_dir: str | Path,
    *,
    image_size: int = 160,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fit the baseline on the training concepts and score it on validation and test; kept in `cache_dir`.

    Returns:
        "penalty"; and "validation" and "test": vendor -> "text_to_image" and "image_to_text" -> "R@1", "R@5", "R@10"
        in percent.
    """
    cache = Path(cache_dir)
    seed = benchmark.info["settings"]["seed"]
    name = f"{benchmark.info['settings']['format']}-{seed}-{image_size}"
    kept = cache / f"ridge-{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    teacher = text_teacher(fetched)

    def features(split: str, vendor: str) -> torch.Tensor:
        images, _ = benchmark.retrieval(split, vendor)
        file = cache / f"vision-{name}-{split}-{vendor}.npy"
        return pooled(vision_features(fetched, images, file, image_size=image_size, report=report))

    def embeddings(split: str) -> torch.Tensor:
        _, captions = benchmark.retrieval(split, TRAINED_VENDORS[0])
        return torch.from_numpy(teacher.encode([texts[0] for texts in captions], show_progress_bar=False)).double()

    report("ridge baseline: computing vision features")
    seen = [features("train", vendor) for vendor in TRAINED_VENDORS]
    targets = embeddings("train")
    report(f"ridge baseline: choosing the penalty by {FOLDS}-fold cross-validation")
    penalty = choose_penalty(seen, targets)
    fit = fit_ridge(torch.cat(seen), targets.repeat(len(seen), 1), [penalty])[0]
    result: dict[str, Any] = {"penalty": penalty, "image_size": image_size}
    for split in SPLITS[1:]:
        texts = embeddings(split)
        result[split] = {vendor: recalls(fit(features(split, vendor)), texts) for vendor in VENDORS}
    write_atomically(kept, json.dumps(result, indent=1) + "\n")
    return result


def _pixels(path: Path, image_size: int) -> torch.Tensor:
    """Preprocess as the miniature does: on white, bicubic to a square, (x - 127) / 128; (3, image_size, image_size)."""
    with Image.open(path) as image:
        square = on_white(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(square)).float().permute(2, 0, 1) - 127) / 128
