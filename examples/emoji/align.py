"""The closed-form start of the demo: the projector is fitted to the language model's own states of captions.

The last layer holds, at the position of a word, what the model has made of that word, and an embedding is the mean over
positions. Ridge regression makes a drawing's visual tokens, on the mean, that state of its caption, so that drawings
begin where their captions are. Stage 2 trains the projector from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from emoji.ridge import fit_ridge

LENGTH = 20.0  # times a state's: the layers change long vectors little, and the final norm brings them back


def calibrate_norm(model: SentenceTransformer, texts: Sequence[str], batch_size: int = 64) -> None:
    """Fit the final norm to the layers that are left; in place.

    Its weights are those of a layer far above. Where all texts have much the same number, all embeddings do, and their
    cosines are 1: each dimension is scaled by std / (std^2 + mean^2) over the texts, so that what differs counts.
    """
    encoder: Any = model[0]
    norm = encoder.model.language_model.norm
    with torch.inference_mode():
        norm.weight.fill_(1.0)
        states = torch.cat(
            [
                model[1](encoder(encoder.preprocess(list(texts[start : start + batch_size]))))["sentence_embedding"]
                for start in range(0, len(texts), batch_size)
            ]
        )
        variance, mean = torch.var_mean(states, dim=0)
        norm.weight.copy_(variance.sqrt() / (variance + mean.square()))


def fit_projector(
    model: SentenceTransformer, features: Sequence[np.ndarray], captions: Sequence[str], penalty: float
) -> None:
    """Make each drawing's mean visual token `LENGTH` times its caption's state, as far as a linear map can; in place.

    Args:
        model: an encoder of a FastVLM whose projector is two linear layers without an activation between.
        features: of the frozen vision tower, one array a vendor, row i showing caption i. (N, P, C)
        captions: of the drawings.
        penalty: of the ridge regression on standardised features.
    """
    pooled = torch.cat([torch.from_numpy(np.array(maps)).float().mean(dim=1) for maps in features])
    fit = fit_ridge(pooled, caption_states(model, captions).repeat(len(features), 1), [penalty])[0]
    weight = fit.weight / fit.deviation[:, None]  # (C, D)
    encoder: Any = model[0]
    projector = encoder.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.weight.copy_(weight.T)
        projector.linear_1.bias.copy_(fit.bias - fit.mean @ weight)
        projector.linear_2.weight.copy_(LENGTH * torch.eye(len(projector.linear_2.weight)))
        projector.linear_2.bias.zero_()


def caption_states(model: SentenceTransformer, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """Mean state of each caption's own tokens after the last layer, before the final norm, (N, D)."""
    encoder: Any = model[0]
    language = encoder.model.language_model
    norm, language.norm = language.norm, nn.Identity()
    states = []
    try:
        for start in range(0, len(captions), batch_size):
            features = encoder.preprocess(list(captions[start : start + batch_size]))
            own = features["attention_mask"].clone()
            own[own.cumsum(dim=1) == 1] = 0  # the prompt's one token
            with torch.inference_mode():
                hidden = encoder(features)["token_embeddings"]
            states.append((hidden * own[:, :, None]).sum(dim=1) / own.sum(dim=1, keepdim=True))
    finally:
        language.norm = norm
    return torch.cat(states)
