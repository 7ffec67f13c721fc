"""The first step of the demo: the projector is fitted, in closed form, to the language model's own states of captions.

A layer half-way up the language model holds, at the position of a word, what the model has made of that word. Ridge
regression makes a drawing's visual tokens, on the mean, that state of its caption. Such vectors are long, so the layers
below hardly change them, and the layers above read them as if they had read the caption.

The fit is far better on the drawings it was made of than on others, so stage 2 is cross-fitted: a batch of one fold of
concepts passes through a projector fitted without that fold. The projector of the finished model is fitted to all.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from emoji.concepts import Concept
from emoji.ridge import fit_ridge
from unime_st.files import write_atomically


@dataclass(frozen=True)
class Projection:
    """A linear projector."""

    weight: Tensor  # (D, C)
    bias: Tensor  # (D,)

    def write(self, model: SentenceTransformer) -> None:
        """Put it into a FastVLM's projector: two linear layers without an activation between; in place."""
        encoder: Any = model[0]
        projector = encoder.model.multi_modal_projector
        with torch.no_grad():
            projector.linear_1.weight.copy_(self.weight)
            projector.linear_1.bias.copy_(self.bias)
            projector.linear_2.weight.copy_(torch.eye(len(projector.linear_2.weight)))
            projector.linear_2.bias.zero_()


class FoldLoss(nn.Module):
    """A loss over batches of one fold: puts the projector fitted without that fold in place before it is computed."""

    def __init__(self, loss: nn.Module, projection: Projection) -> None:
        super().__init__()
        self.loss = loss
        self.projection = projection

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch; arguments as sentence-transformers' losses have them."""
        self.projection.write(self.loss.model)  # type: ignore[arg-type]
        return self.loss(sentence_features, labels)


def fit_projections(
    features: Sequence[np.ndarray], targets: Tensor, folds: Sequence[int], penalty: float
) -> list[Projection]:
    """Fit the projector to all drawings, then without fold 0, without fold 1, and so on.

    Args:
        features: of the frozen vision tower, one array a vendor, row i showing concept i. (N, P, C)
        targets: what the mean visual token should be. (N, D)
        folds: number of each concept's fold, from 0. (N,)
        penalty: of the ridge regression on standardised features.
    """
    pooled = [torch.from_numpy(np.array(maps)).float().mean(dim=1) for maps in features]
    number = torch.tensor(folds)
    fits = []
    for fold in (-1, *range(int(number.max()) + 1)):
        kept = number != fold
        fit = fit_ridge(torch.cat([rows[kept] for rows in pooled]), targets[kept].repeat(len(pooled), 1), [penalty])[0]
        weight = fit.weight / fit.deviation[:, None]  # (C, D)
        fits.append(Projection(weight.T.float().contiguous(), (fit.bias - fit.mean @ weight).float()))
    return fits


def save_projections(projections: Sequence[Projection], path: Path) -> None:
    """Write projections as safetensors; the file appears only when complete."""
    tensors = {f"{index}.{name}": value for index, fit in enumerate(projections) for name, value in vars(fit).items()}
    write_atomically(path, save(tensors))


def load_projections(path: Path) -> list[Projection]:
    """Read what `save_projections` wrote."""
    tensors = load_file(path)
    return [Projection(tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(len(tensors) // 2)]


def fold_of_images(concepts: Sequence[Concept], vendors: Iterable[str], count: int, seed: int) -> dict[str, int]:
    """Part concepts by role: path of each drawing below the image folder, skin tones included -> its fold."""
    roles = sorted({concept.role for concept in concepts})
    random.Random(seed).shuffle(roles)
    fold = {role: place % count for place, role in enumerate(roles)}
    return {
        concept.image(vendor, tone): fold[concept.role]
        for concept in concepts
        for vendor in vendors
        for tone in range(len(concept.sources[vendor]))
    }


def caption_states(model: SentenceTransformer, captions: Sequence[str], layer: int, batch_size: int = 64) -> Tensor:
    """Mean state of each caption's own tokens, (N, D), after `layer` decoder layers of the language model."""
    encoder: Any = model[0]
    before, after = _frame(encoder)
    states = []
    for start in range(0, len(captions), batch_size):
        features = encoder.preprocess(list(captions[start : start + batch_size]))
        inputs = {key: features[key].to(model.device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            hidden = encoder.model(**inputs, output_hidden_states=True).hidden_states[layer]
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        width = hidden.shape[1]
        states += [
            hidden[row, width - length + before : width - after].mean(dim=0) for row, length in enumerate(lengths)
        ]
    return torch.stack(states).float().cpu()


def _frame(encoder: Any) -> tuple[int, int]:
    """Number of tokens before and after a text in its prompt."""
    rows = [encoder.preprocess([text])["input_ids"][0].tolist() for text in ("a", "1 2 3")]

    def shared(left: list[int], right: list[int]) -> int:
        return next(place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)

    return shared(rows[0], rows[1]), shared(rows[0][::-1], rows[1][::-1])
