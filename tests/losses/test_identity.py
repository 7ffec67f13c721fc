import torch
from helpers import ANCHORS, features

from unime_st.identity.features import batch_identities, content_ids, hash_tokens


def test_hash_ignores_padding_and_tells_order_length_and_tokens_apart():
    rows = [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3, 0], [0, 1, 2, 3], [2, 2, 2], [1, 2, 4]]

    def hashed(row, before=0, after=0):
        ids = torch.tensor([[9] * before + row + [9] * after])
        mask = torch.tensor([[0] * before + [1] * len(row) + [0] * after])
        return hash_tokens(ids, mask).item()

    hashes = [hashed(row) for row in rows]
    assert len(set(hashes)) == len(rows)
    assert all(value >= 0 for value in hashes)
    for row, value in zip(rows, hashes, strict=True):
        assert hashed(row, before=3) == hashed(row, after=2) == value


def test_many_texts_do_not_collide():
    ids = torch.randint(0, 50, (20_000, 4), generator=torch.Generator().manual_seed(0))
    hashes = hash_tokens(ids, torch.ones_like(ids))
    assert hashes.unique().numel() == torch.unique(ids, dim=0).shape[0]


def test_texts_of_a_model_are_known_by_their_tokens(text_model):
    (column,) = features(text_model, [*ANCHORS[:2], ANCHORS[0]])
    ids = content_ids(column)
    assert ids[0] == ids[2] != ids[1]


def test_unknown_columns_equal_nothing():
    known = {"content_id": torch.tensor([3, 3])}
    image = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 4).long(), "pixel_values": known}
    ids, unknown = batch_identities([image, known, image])
    assert unknown == [0, 2]
    assert ids[:, 1].tolist() == [3, 3]
    assert len(set(ids[:, [0, 2]].flatten().tolist())) == 4
    assert ids[:, [0, 2]].max() < 0
    assert batch_identities([image, image]) == (None, [0, 1])
