"""A linear baseline: ridge regression from frozen vision features to the teacher's embedding of the label.

It sees the same drawings of the same concepts that training shows, and is scored on the same retrieval lists as the
model. Its penalty is chosen by cross-validation over training concepts; validation and test are only scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import TRAINED_VENDORS, VENDORS
from emoji.images import on_white
from emoji.measure import Ranks, all_ranks, ranks
from emoji.miniature import load_vision_state, text_teacher
from emoji.packages import Fetched

PENALTIES = tuple(10.0**exponent for exponent in np.arange(2, 6.01, 0.5))
FOLDS = 5
BATCH = 4  # images whose activations stay in the processor's cache


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
                gains[index] += (1.0 / ranks(targets[held], fit(rows[held]))).mean().item()
    return float(penalties[int(gains.argmax())])


@dataclass(frozen=True)
class VisionFeatures:
    """Frozen EfficientNet-lite0 features of the plain drawings, computed once and kept in the folder `cache`."""

    fetched: Fetched
    benchmark: EmojiBenchmark
    cache: Path
    image_size: int

    def __call__(self, split: str, vendor: str) -> np.ndarray:
        """Features in float16 of one vendor's drawings of a split, (N, (image_size / 32) ** 2, 1280)."""
        made = self.benchmark.info["settings"]
        file = self.cache / f"vision-{made['format']}-{made['seed']}-{self.image_size}-{split}-{vendor}.npy"
        if file.is_file():
            return np.load(file)
        tower: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
        tower.load_state_dict(load_vision_state(self.fetched.vision_state))
        tower = tower.to(memory_format=torch.channels_last)
        images, _ = self.benchmark.retrieval(split, vendor)
        rows = []
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([_pixels(path, self.image_size) for path in images[start : start + BATCH]])
            with torch.inference_mode():
                maps = tower.forward_features(pixels.to(memory_format=torch.channels_last))
            rows.append(maps.flatten(2).transpose(1, 2).half().numpy())
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(rows))
        partial.replace(file)
        return np.load(file)


def pooled(features: np.ndarray) -> torch.Tensor:
    """Pool features (N, P, C) into mean and maximum over positions, (N, 2C)."""
    maps = torch.from_numpy(np.array(features)).float()
    return torch.cat([maps.mean(1), maps.amax(1)], dim=1)


def ridge_baseline(features: VisionFeatures, split: str) -> Ranks:
    """Fit the baseline to the labels of the training concepts; its ranks on a split, as `measure.all_ranks` has them.

    It is given what stage 2 is given: the same drawings with the same labels, in the same frozen features.
    """
    teacher = text_teacher(features.fetched)

    def embeddings(texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(teacher.encode(list(texts), show_progress_bar=False)).double()

    seen = [pooled(features("train", vendor)) for vendor in TRAINED_VENDORS]
    targets = embeddings(features.benchmark.texts("train")["label"])
    fit = fit_ridge(torch.cat(seen), targets.repeat(len(seen), 1), [choose_penalty(seen, targets)])[0]
    said = features.benchmark.texts(split)
    has = {kind: [place for place, text in enumerate(own) if text] for kind, own in said.items()}
    texts = {kind: embeddings([text for text in own if text]) for kind, own in said.items()}
    return all_ranks({vendor: fit(pooled(features(split, vendor))) for vendor in VENDORS}, texts, has)


def _pixels(path: Path, image_size: int) -> torch.Tensor:
    """Preprocess as the miniature does: on white, bicubic to a square, (x - 127) / 128; (3, image_size, image_size)."""
    with Image.open(path) as image:
        square = on_white(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(square)).float().permute(2, 0, 1) - 127) / 128
