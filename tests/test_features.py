"""Some rows of a batch are what preprocessing gives for those rows alone."""

import numpy as np
import pytest
import torch

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder
from unime_st.features import num_rows, select_rows, token_counts

ROWS = [
    "a",
    {"image": picture("red", (60, 30)), "text": "what is it?"},
    picture("green", (30, 60)),
    "some longer text here, to pad the others",
    {"image": [picture("black"), picture("white", (80, 30))], "text": "two"},
]


@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
@pytest.mark.parametrize("chosen", [[4, 0], [3, 0], [2], [1, 4, 2]], ids=str)
def test_selected_rows_are_embedded_as_if_alone(family, backbone, chosen):
    model = build_encoder(backbone(family), device="cpu").double().eval()
    features = model.preprocess(ROWS)
    assert num_rows(features) == len(ROWS)
    counts = token_counts(features).tolist()
    selected = select_rows(features, chosen, trim_leading=True)
    alone = model.preprocess([ROWS[row] for row in chosen])
    assert selected["input_ids"].shape == alone["input_ids"].shape
    assert selected["input_ids"].shape[1] == max(counts[row] for row in chosen)
    assert selected["content_id"].tolist() == alone["content_id"].tolist()
    with torch.no_grad():
        found, expected = (model(dict(each))["sentence_embedding"] for each in (selected, alone))
        others = model(dict(features))["sentence_embedding"]
    assert (others[0] - others[3]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, others[chosen], rtol=0, atol=1e-6)


def test_absolute_positions_keep_the_padding_before_them():
    features = {
        "input_ids": torch.tensor([[0, 0, 7, 0], [1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 0], [1] * 4]),
    }
    assert select_rows(features, [0])["input_ids"].tolist() == [[0, 0, 7]]
    assert select_rows(features, [0], trim_leading=True)["input_ids"].tolist() == [[7]]
    assert select_rows(features, [1, 0])["input_ids"].tolist() == [[1, 2, 3, 4], [0, 0, 7, 0]]


def test_packed_features_are_refused_with_advice():
    packed = {"input_ids": torch.ones(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    assert num_rows(packed) == 2
    with pytest.raises(ValueError, match="unpad_inputs=False"):
        select_rows(packed, [0])


def test_rows_with_videos_are_taken_where_it_is_told_which_row_shows_which(backbone):
    video = np.stack([np.asarray(picture("red", (56, 56))), np.asarray(picture("green", (56, 56)))] * 2)
    rows = ["a", {"video": video, "text": "what is it?"}, {"image": picture("green"), "text": "b"}]
    model = build_encoder(backbone("qwen2_vl"), device="cpu").double().eval()
    with torch.no_grad():
        some = model(select_rows(model.preprocess(rows), [1], trim_leading=True))["sentence_embedding"]
        alone = model(model.preprocess(rows[1:2]))["sentence_embedding"]
    torch.testing.assert_close(some, alone, rtol=0, atol=1e-6)
    model = build_encoder(backbone("llava_onevision"), device="cpu").double().eval()
    features = model.preprocess(rows)
    with torch.no_grad():
        some = model(select_rows(features, [2, 1], trim_leading=True))["sentence_embedding"]
        alone = torch.cat([model(model.preprocess([rows[row]]))["sentence_embedding"] for row in (2, 1)])
    torch.testing.assert_close(some, alone, rtol=0, atol=1e-6)
    untold = {key: value for key, value in features.items() if key != "num_videos_per_sample"}  # a stock module's
    with pytest.raises(ValueError, match=r"3 rows shows 1 videos.*leave out `mini_batch_size`"):
        select_rows(untold, [0, 2])
