import numpy as np
import pytest
import torch

from emoji.measure import all_ranks, hits, interval, ranks


def test_ranks_against_a_loop():
    torch.manual_seed(1)
    queries, candidates = torch.randn(30, 4), torch.randn(30, 4)
    for row, rank in enumerate(ranks(queries, candidates).tolist()):
        scores = [torch.cosine_similarity(queries[row], other, dim=0).item() for other in candidates]
        assert rank == 1 + sorted(range(30), key=lambda index: -scores[index]).index(row)


def test_ties_count_against():
    assert ranks(torch.ones(4, 2), torch.ones(4, 2)).tolist() == [4] * 4


def test_kinds_of_text_are_compared_with_the_drawings_of_their_own_concepts():
    labels = torch.eye(5)
    found = all_ranks({"a": labels, "b": labels.flip(0)}, {"label": labels, "keywords": labels[[1, 3]]},
                      {"label": range(5), "keywords": [1, 3]})  # fmt: skip
    assert set(found) == {"a label", "b label", "a keywords", "b keywords", "text keywords"}
    assert found["a label"]["text_to_image"] == [1] * 5
    assert found["a keywords"]["image_to_text"] == found["text keywords"]["text_to_text"] == [1, 1]
    assert hits(found, ["a", "b"], "label", "text_to_image").tolist() == [0.5, 0.5, 1.0, 0.5, 0.5]
    assert hits(found, ["b"], "keywords", "text_to_image").tolist() == [0.0, 0.0]
    assert hits(found, ["b"], "keywords", "text_to_image", k=2).tolist() == [1.0, 1.0]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    within = 0
    for _ in range(200):
        found = interval((rng.random(100) < 0.3).astype(float))
        within += found["low"] <= 0.3 <= found["high"]
    assert 0.89 <= within / 200 <= 0.99
    assert found["error"] == pytest.approx(0.0458, abs=0.01)
