"""A loss that is not finite stops training, and says which rows it comes from."""

import pytest
import torch
from helpers import ANCHORS, POSITIVES, features

from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss

OPTIONS = [{}, {"mini_batch_size": 2}]


def spoil(model, word):
    """Make the embedding of every text with a word NaN."""
    embeddings = model[0].model.embeddings.word_embeddings
    with torch.no_grad():
        embeddings.weight[model.tokenizer.convert_tokens_to_ids(word)] = torch.nan


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_rows_are_named_and_no_weight_is_touched(text_model, options):
    spoil(text_model, "bird")
    loss = HardNegativeInfoNCELoss(text_model, num_hard_negatives=3, **options).train()
    with pytest.raises(FloatingPointError, match="remove them") as caught:
        loss(features(text_model, ANCHORS, POSITIVES))
    told = str(caught.value)
    assert "row 1 of column 0 ('the small bird is near the tree'" in told
    assert "row 1 of column 1 ('bird near a tree'" in told
    assert "embeddings of 2 inputs" in told
    assert all(parameter.grad is None for parameter in text_model.parameters())


def test_spoilt_weights_are_told_apart_from_spoilt_rows(text_model):
    with torch.no_grad():
        next(iter(text_model[0].model.encoder.parameters())).fill_(torch.nan)
    loss = DistillKLLoss(text_model, temperature=0.5).train()
    with pytest.raises(FloatingPointError, match="Go back to the last checkpoint"):
        loss(features(text_model, ANCHORS), torch.eye(len(ANCHORS)))


def test_evaluation_goes_on(text_model):
    spoil(text_model, "bird")
    loss = HardNegativeInfoNCELoss(text_model.eval(), num_hard_negatives=3).eval()
    with torch.no_grad():
        assert not torch.isfinite(loss(features(text_model, ANCHORS, POSITIVES)))
