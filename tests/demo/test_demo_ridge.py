import numpy as np
import pytest
import torch

from emoji import ridge
from emoji.ridge import VisionFeatures, choose_penalty, fit_ridge, pooled, ridge_baseline


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
    """Features that hold the label's embedding are found again."""

    class Teacher:
        def encode(self, texts, show_progress_bar):
            return np.stack([_embedding(text) for text in texts])

    def features(split, vendor):
        return np.stack([_embedding(text)[None].repeat(2, 0) for text in benchmark_folder.texts(split)["label"]])

    monkeypatch.setattr(ridge, "text_teacher", lambda fetched: Teacher())
    monkeypatch.setattr(ridge, "PENALTIES", (1e-4,))
    monkeypatch.setattr(VisionFeatures, "__call__", lambda self, split, vendor: features(split, vendor))
    result = ridge_baseline(VisionFeatures(fake, benchmark_folder, tmp_path, 64), "test")
    found = np.array(result["fluent label"]["text_to_image"])
    assert len(found) == len(benchmark_folder.texts("test")["label"])
    assert (found == 1).mean() > 0.9
    assert len(result["google definition"]["text_to_image"]) < len(found)


def _embedding(text):
    return np.random.default_rng(list(text.encode())).normal(size=6).astype(np.float32)
