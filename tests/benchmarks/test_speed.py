"""The speed benchmarks measure what they say: their inputs, their peers, their clocks and their tables."""

import importlib
import time
from pathlib import Path

import numpy as np
import pytest

from unime_st import build_encoder, export_encoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_texts_have_five_to_three_hundred_tokens(load):
    found = load("workloads").texts(24, lambda text: len(text.split()))
    lengths = sorted(len(text.split()) for text in found)
    assert (lengths[0], lengths[-1]) == (5, 300)
    assert np.median(lengths) < 60
    assert len(set(found)) == 24


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_shares_of_duplicates_are_exact(load, share, tmp_path):
    workloads = load("workloads")
    images = workloads.images(20, tmp_path)
    items = workloads.with_duplicates(workloads.mixed([f"text {n}" for n in range(20)], images), 20, share)
    assert len(items) == 20
    assert len({str(item) for item in items}) == 20 * (1 - share)
    kinds = {(isinstance(item, str), "text" in item) for item in items}
    assert len(kinds) == 3
    sizes = {path.name.partition("-")[2] for path in tmp_path.iterdir()}
    assert len(sizes) > 5


def test_ratios_and_turns(load):
    measuring = load("measuring")
    turns = []
    contenders = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds, _ = measuring.alternating(contenders, 3, lambda _: None)
    assert turns == list("abbaab")
    assert all(len(times) == 3 for times in seconds.values())
    found = measuring.times_as_fast({"ours": [1.0, 2.0, 4.0], "peer": [3.0, 5.0, 4.0]}, "ours", "peer")
    assert found == {"times_as_fast": 2.0, "spread": [1.0, 3.0]}


def test_embeddings_that_are_all_alike_prove_nothing(load):
    measuring = load("measuring")
    rows = np.eye(3)
    assert measuring.largest_difference(rows, rows + 0.5) == 0.5
    with pytest.raises(ValueError, match="All embeddings are alike"):
        measuring.largest_difference(np.ones((3, 2)), np.ones((3, 2)))


def test_a_part_does_not_count_what_interrupts_it(load):
    clock = load("where_time_goes").Clock()

    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def outer():
        busy(0.05)
        clock.timed("inner", busy)(0.1)
        busy(0.05)

    clock.timed("outer", outer)()
    assert clock.seconds["inner"] == pytest.approx(0.1, abs=0.03)
    assert clock.seconds["outer"] == pytest.approx(0.1, abs=0.03)


@pytest.fixture
def checkpoint(backbone, tmp_path):
    export_encoder(build_encoder(backbone("llava_onevision"), device="cpu"), tmp_path / "encoder")
    return tmp_path / "encoder"


def test_peers_agree_and_counts_tell_them_apart(load, checkpoint, tmp_path):
    encode, peers, workloads = load("encode"), load("peers"), load("workloads")
    images = workloads.images(9, tmp_path / "images")
    items = workloads.with_duplicates(workloads.mixed([f"text {n}" for n in range(9)], images), 12, 0.25)
    ours = peers.Ours(checkpoint)
    stock, published = peers.Stock(checkpoint), peers.PublishedStyle(checkpoint)
    for name, peer in (("stock", stock.at(3)), ("published style", published)):
        row = encode.compare(ours, {name: peer}, items, 1)
        assert row["largest_difference"] < 1e-5
        assert (row["inputs"], row["distinct"]) == (12, 9)
        assert row["counts"]["unime_st"]["places"] < row["counts"][name]["places"]
        assert row["counts"]["unime_st"]["images_or_patches"] < row["counts"][name]["images_or_patches"]
        assert 0 < row["padding_share_of_peer"] < 1
    stock.inner.language_model.norm.weight.data.normal_()
    with pytest.raises(ValueError, match="Embeddings differ"):
        encode.compare(ours, {"stock": stock}, items, 1)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["vlm2vec_v2", "unime_v2"])
def test_mtebs_wrappers_give_our_embeddings(load, wrapper, tmp_path, monkeypatch):
    from mteb.models.model_implementations import unime_v2_models

    peers, small = load("peers"), load("small_models")
    monkeypatch.setattr(unime_v2_models, "_IMAGE_SIZE", unime_v2_models._IMAGE_SIZE)  # set back afterwards
    images = load("workloads").images(5, tmp_path / "images")
    if wrapper == "vlm2vec_v2":
        theirs, ours = peers.vlm2vec_v2(small.small_qwen2_vl(tmp_path / "model"))
    else:
        theirs, ours = peers.unime_v2(small.small_llava_onevision(tmp_path / "model"), small.SQUARE)
    expected = theirs(images)
    np.testing.assert_allclose(ours([*images, images[0]]), [*expected, expected[0]], atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_the_report_is_that_of_the_kept_results(load):
    bench = load("bench")
    text = bench.report(bench.results())
    assert (bench.RESULTS / "bench.md").read_text(encoding="utf-8") == text, "run `python benchmarks/bench.py --report`"


def test_a_comparison_that_falls_short_is_told_with_its_arithmetic(load):
    tables, bench = load("speed_tables"), load("bench")
    found = bench.results()
    row = found["encode"]["floors"]["mixed, no duplicates"]
    row |= {"times_as_fast": 0.5, "at_least": 1.25}
    text = tables.floors_table(found["encode"], found["train_step"], found["stage1_step"])
    assert "| mixed, no duplicates | stock encode at its fastest | 1.25 | 0.50 |" in text
    assert "**no**" in text
    assert "Not reached, mixed, no duplicates: the peer's language model runs over" in text
