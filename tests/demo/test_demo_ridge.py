import json

import numpy as np
import pytest
import torch

from emoji import ridge
from emoji.ridge import choose_penalty, fit_ridge, pooled, recalls, ridge_baseline


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])  # more rows than features, and fewer
def test_fit_equals_the_normal_equations(shape):
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randn(shape[0], 3)
    mean, deviation = x.double().mean(0), x.double().std(0) + 1e-6
    z, centred = (x.double() - mean) / deviation, y.double() - y.double().mean(0)
    penalties = [0.1, 5.0]
    for penalty, fit in zip(penalties, fit_ridge(x, y, penalties), strict=True):
        weight = torch.linalg.solve(z.T @ z + penalty * torch.eye(shape[1], dtype=torch.double), z.T @ centred)
        torch.testing.assert_close(fit.weight, weight, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(fit(x), z @ weight + y.double().mean(0), atol=1e-9, rtol=1e-9)


def test_recalls_against_a_loop():
    torch.manual_seed(1)
    images, texts = torch.randn(30, 4), torch.randn(30, 4)
    result = recalls(images, texts)
    for way, queries, candidates in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        for k in (1, 5, 10):
            hits = 0
            for row in range(30):
                scores = [torch.cosine_similarity(queries[row], other, dim=0).item() for other in candidates]
                hits += sorted(range(30), key=lambda index: -scores[index]).index(row) < k
            assert result[way][f"R@{k}"] == pytest.approx(100 * hits / 30)


def test_ties_count_against():
    assert recalls(torch.ones(4, 2), torch.ones(4, 2))["text_to_image"]["R@1"] == 0


def test_the_penalty_fits_the_noise():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(200, 5, generator=generator)
    targets = signal @ torch.randn(5, 4, generator=generator)
    blurred = targets + torch.randn(200, 4, generator=generator)
    clean = choose_penalty([signal], targets, penalties=[1e-3, 1e5])
    noisy = choose_penalty(
        [torch.cat([signal, torch.randn(200, 150, generator=generator)], dim=1)], blurred, penalties=[1e-3, 1e2]
    )
    assert (clean, noisy) == (1e-3, 1e2)


def test_pooled():
    maps = np.array([[[1.0, 5.0], [3.0, 1.0]]], np.float16)  # one image, two positions, two channels
    assert pooled(maps).tolist() == [[2.0, 3.0, 3.0, 5.0]]


def test_baseline_on_made_up_features(fake, benchmark_folder, tmp_path, monkeypatch):
    """Features that hold the label's embedding are found again; and the second run reads what the first kept."""

    class Teacher:
        def encode(self, texts, show_progress_bar):
            return np.stack([_embedding(text) for text in texts])

    def features(fetched, images, cache, *, image_size, report):
        vendor, split = images[0].parent.name, cache.stem.split("-")[-2]
        _, captions = benchmark_folder.retrieval(split, vendor)
        return np.stack([_embedding(texts[0])[None].repeat(2, 0) for texts in captions])

    monkeypatch.setattr(ridge, "text_teacher", lambda fetched: Teacher())
    monkeypatch.setattr(ridge, "vision_features", features)
    monkeypatch.setattr(ridge, "PENALTIES", (1e-4,))
    result = ridge_baseline(fake, benchmark_folder, tmp_path, report=lambda line: None)
    assert result["test"]["fluent"]["text_to_image"]["R@1"] > 90
    monkeypatch.setattr(ridge, "text_teacher", lambda fetched: pytest.fail("kept results should be read"))
    assert ridge_baseline(fake, benchmark_folder, tmp_path, report=lambda line: None) == json.loads(json.dumps(result))


def _embedding(text):
    return np.random.default_rng(list(text.encode())).normal(size=6).astype(np.float32)
