import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unime_st.losses import HardNegativeInfoNCELoss

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def heads():
    spec = importlib.util.spec_from_file_location("heads", FOLDER / "heads.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["heads"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["heads"]


@pytest.fixture
def data(heads, monkeypatch):
    """Sixteen concepts that a text and a drawing tell noisily, in the sizes of the script's steps made small."""
    monkeypatch.setattr(heads, "STEPS", 12)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 8, generator=generator)
    texts = truth @ torch.randn(8, 12, generator=generator)
    images = truth @ torch.randn(8, 20, generator=generator)
    numbers = torch.arange(16)
    pairs = heads.Pairs(-1 - numbers, numbers, numbers, numbers.roll(1))
    asked = {"drawing -> label": [(-1 - numbers, numbers)]}
    start = {size: (0.1 * torch.randn(8, size, generator=generator), torch.zeros(8)) for size in (12, 20)}
    return heads.Data(
        texts,
        images,
        start[12],
        start[20],
        {"image": pairs, "crowded": pairs},
        {kind: {"validation": asked, "test": asked} for kind in ("image", "crowded")},
    )


def test_the_page_is_that_of_the_kept_results(heads):
    results = json.loads((heads.RESULTS / "heads.json").read_text())
    assert (heads.RESULTS / "heads.md").read_text() == heads.markdown(results)
    assert list(results["sets"]) == [
        f"{kind}, batch of {batch}" for kind in heads.BATCHES for batch in heads.BATCHES[kind]
    ]
    for found in results["sets"].values():
        for name, row in found["rows"].items():
            of = heads.CHOSEN[1] if heads.VARIANTS[name]["num_hard_negatives"] else heads.CHOSEN[0]
            grid = {key: value for key, value in found["tuning"].items() if key.startswith(f"{of}, ")}
            assert len(grid) == len(heads.TEMPERATURES) * len(heads.LEARNING_RATES)
            assert max(grid, key=grid.get) == f"{of}, {row['temperature']}, {row['learning_rate']}"


def test_every_variant_is_a_loss_and_stock_is_the_ranking_loss(heads):
    torch.manual_seed(0)
    queries, targets = torch.nn.functional.normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=-1)
    for changed in heads.VARIANTS.values():
        loss, told = heads.loss_of(changed, 64, 0.1)
        assert isinstance(loss, HardNegativeInfoNCELoss)
        assert told is (changed.get("contents") is not False)
    loss, _ = heads.loss_of(heads.STOCK, 64, 0.1)
    scores = queries @ targets.T / 0.1
    ways = [torch.nn.functional.cross_entropy(way, torch.arange(6)) for way in (scores, scores.T)]
    assert torch.allclose(loss.compute_loss_from_embeddings([queries, targets]), sum(ways) / 2)


def test_training_learns_and_a_seed_repeats(heads, data):
    before = heads.score(heads.Heads(data).eval(), data, "image", "test")["drawing -> label"].mean()
    trained = [heads.train(data, "image", heads.ALL, 8, 0.1, 3e-2, 0)[0] for _ in range(2)]
    first, again = (heads.score(of, data, "image", "test")["drawing -> label"] for of in trained)
    assert first.mean() > before + 0.2
    assert np.array_equal(first, again)


def test_what_the_margin_leaves_out_is_counted(heads):
    queries = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    targets = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    concepts, contents = torch.tensor([0, 0, 1]), torch.tensor([10, 11, 12])
    # query 0: own .8, 1.0 dropped (its concept). Query 1: own .6, .96 dropped (its concept), .8 dropped (another).
    assert heads.filtered([queries, targets], concepts, contents, 0.1) == (3, 2, 2)


def test_differences_are_paired(heads):
    rng = np.random.default_rng(0)
    reference = rng.random((10, 50))
    found = heads.difference(reference + 0.1, reference)
    assert found["mean"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1)
    assert found["high"] == pytest.approx(0.1)
    ours = reference + rng.normal(0.1, 0.2, (10, 50))
    found = heads.difference(ours, reference)
    assert found["low"] < (ours - reference).mean() < found["high"]
    assert found["std"] == pytest.approx((ours - reference).mean(1).std(ddof=1))


def test_runs_are_kept_and_made_again_under_other_settings(heads, data, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "SEEDS", 2)
    monkeypatch.setattr(heads, "TUNING_SEEDS", (100,))
    monkeypatch.setattr(heads, "LEARNING_RATES", (1e-2,))
    monkeypatch.setattr(heads, "TEMPERATURES", (0.1,))
    kept = ("stock", "all, both filters", heads.CHOSEN[1], "all, B3 batches")
    monkeypatch.setattr(heads, "VARIANTS", {name: heads.VARIANTS[name] for name in kept})
    first = heads.measure(data, "crowded", 12, tmp_path)
    assert list(first["rows"]) == list(kept[:3])  # batches of the sampler are not for this set
    assert 0 <= first["rows"]["all, both filters"]["told"].get("precision", 0) <= 1
    monkeypatch.setattr(heads, "run", lambda *_: pytest.fail("made twice"))
    assert heads.measure(data, "crowded", 12, tmp_path)["rows"].keys() == first["rows"].keys()
    monkeypatch.setattr(heads, "TEMPERATURES", (0.2,))
    with pytest.raises(pytest.fail.Exception, match="made twice"):
        heads.measure(data, "crowded", 12, tmp_path)
