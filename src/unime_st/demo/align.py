"""The first step of the demo: teaching the projector to speak the language model's inner language, in closed form.

A layer half-way up the language model holds, at the position of a word, what the model has made of that word in its
sentence. The projector is fitted (ridge regression) so that the visual tokens of a drawing are, on the mean, that
state of its caption. Such vectors are long, so the layers below hardly change them on their way up through the
residual connections, and the layers above read them as if they had read the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st.demo.ridge import fit_ridge


def caption_states(model: SentenceTransformer, captions: Sequence[str], layer: int, batch_size: int = 64) -> Tensor:
    """Mean hidden state of each caption's own tokens after some layers of the language model.

    Args:
        model: the encoder.
        captions: N texts.
        layer: how many decoder layers have been passed.
        batch_size: texts at a time.

    Returns:
        (N, D)
    """
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


def align_projector(
    model: SentenceTransformer, features: Sequence[np.ndarray], captions: Sequence[str], layer: int, penalty: float
) -> None:
    """Fit the projector of a FastVLM to captions, in place.

    Args:
        model: the encoder; its projector has two linear layers and no activation.
        features: of the frozen vision tower, one array a vendor, row i showing caption i. (N, P, C)
        captions: N texts.
        layer: see :func:`caption_states`.
        penalty: of the ridge regression on standardised features.
    """
    targets = caption_states(model, captions, layer).double()
    pooled = torch.cat([torch.from_numpy(np.array(maps)).float().mean(dim=1) for maps in features])
    fit = fit_ridge(pooled, targets.repeat(len(features), 1), [penalty])[0]
    weight = fit.weight / fit.deviation[:, None]  # (C, D)
    encoder: Any = model[0]
    projector = encoder.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.weight.copy_(weight.T)
        projector.linear_1.bias.copy_(fit.bias - fit.mean @ weight)
        projector.linear_2.weight.copy_(torch.eye(len(projector.linear_2.weight)))
        projector.linear_2.bias.zero_()


def _frame(encoder: Any) -> tuple[int, int]:
    """Number of tokens before and after a text in its prompt."""
    rows = [encoder.preprocess([text])["input_ids"][0].tolist() for text in ("a", "1 2 3")]

    def shared(left: list[int], right: list[int]) -> int:
        return next(place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)

    return shared(rows[0], rows[1]), shared(rows[0][::-1], rows[1][::-1])
