"""`unime encode`, `search`, `evaluate`, `export` and `info`, each against what the library says."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from unime_st import load_encoder
from unime_st.cli import main
from unime_st.cli.info import describe
from unime_st.cli.search import nearest
from unime_st.data import encode_corpus, load_corpus


@pytest.fixture(scope="module")
def corpus(trained, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("corpora") / "corpus"
    arguments = ["encode", str(pairs), str(trained / "encoder"), "--output", str(output), "--device", "cpu"]
    assert main([*arguments, "--window-size", "5"]) == 0
    return output


def test_a_corpus_is_the_models_embeddings(corpus, trained, pairs):
    found = load_corpus(corpus)
    assert list(found.ids()) == [f"{number}.png" for number in range(24)]
    model = load_encoder(trained / "encoder", device="cpu")
    expected = model.encode([{"image": str(pairs.parent / name)} for name in found.ids()])
    assert np.allclose(np.asarray(found), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1:]).max(axis=1).min() > 1e-4


def test_search_finds_what_is_nearest(corpus, trained, pairs, capsys):
    base = ["search", str(corpus), "--model", str(trained / "encoder"), "--device", "cpu", "--top-k", "3", "--json"]
    assert main([*base, "--image", str(pairs.parent / "7.png")]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results[0] == {"row": 7, "id": "7.png", "score": pytest.approx(1.0, abs=1e-4)}
    assert main([*base, "number 5 fff"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    model = load_encoder(trained / "encoder", device="cpu")
    scores = np.asarray(load_corpus(corpus)) @ model.encode([{"text": "number 5 fff"}])[0]
    best = np.argsort(-scores, kind="stable")[:3]
    assert [result["row"] for result in results] == best.tolist()
    assert [result["score"] for result in results] == pytest.approx(scores[best].tolist(), abs=1e-4)
    assert main([argument for argument in [*base, "number 5 fff"] if argument != "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["1", f"{scores[best[0]]:.3f}", f"{best[0]}.png"]


@pytest.mark.parametrize("seed", range(3))
def test_search_is_exact_over_parts(seed, tmp_path):
    rows = np.random.default_rng(seed).integers(-2, 3, (40, 6)).astype(np.float32)  # with equal scores
    rows[rows.any(axis=1) == 0] = 1

    class Model:
        def encode(self, items, **options):
            return rows[[int(item) for item in items]]

    found = encode_corpus(Model(), [str(row) for row in range(40)], tmp_path / "c", model_name="m", window_size=7)
    query = np.arange(6, dtype=np.float32)
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    expected = sorted(range(40), key=lambda row: (-cosines[row], row))[:9]
    assert [result["score"] for result in nearest(found, query, 9)] == pytest.approx(
        cosines[expected].tolist(), abs=1e-5
    )
    assert len(nearest(found, query, 100)) == 40


def test_a_corpus_of_another_model_is_refused(corpus, backbone, tmp_path, capsys):
    assert main(["export", str(backbone("qwen2_vl")), "--output", str(tmp_path / "other")]) == 0
    assert main(["search", str(corpus), "x", "--model", str(tmp_path / "other"), "--device", "cpu"]) == 1
    assert "was encoded with another model" in capsys.readouterr().err


def test_export_writes_a_stock_checkpoint(backbone, tmp_path, capsys):
    assert main(["export", str(backbone("qwen2_vl")), "--output", str(tmp_path / "encoder")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'encoder'}\n"
    model = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert model.encode(["a", "b"]).shape == (2, 32)
    again = ["export", str(tmp_path / "encoder"), "--output", str(tmp_path / "again"), "--max-pixels", "100"]
    assert main(again) == 1
    assert "is a saved encoder, which keeps its max_pixels" in capsys.readouterr().err


def test_an_encoder_is_not_exported_over_itself(trained, capsys):
    encoder = str(trained / "encoder")
    assert main(["export", encoder, "--output", encoder]) == 1
    assert "is the model itself" in capsys.readouterr().err
    assert (trained / "encoder" / "training.json").is_file()


def test_evaluate_gives_the_evaluators_numbers(trained, pairs, tmp_path, capsys):
    arguments = ["evaluate", str(trained / "encoder"), str(pairs), "--device", "cpu", "--json"]
    assert main([*arguments, "--output", str(tmp_path / "results")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    model = load_encoder(trained / "encoder", device="cpu")
    images = model.encode([{"image": str(pairs.parent / f"{number}.png")} for number in range(24)])
    captions = [line.partition(",")[0] for line in pairs.read_text().splitlines()[1:]]
    scores = model.encode([{"text": caption} for caption in captions]) @ images.T
    ranks = (scores > scores.diagonal()[:, None] + 1e-6).sum(axis=1)
    for k in (1, 5, 10):
        assert metrics[f"pairs_text_to_image_recall@{k}"] == pytest.approx((ranks < k).mean(), abs=0.05)
    assert json.loads((tmp_path / "results" / "pairs_results.json").read_text()) == metrics
    assert (tmp_path / "results" / "report.html").is_file()


def test_info_reads_no_weights(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (trained / "encoder").iterdir():
        if path.suffix in (".json", ".jinja"):
            (copy / path.name).write_bytes(path.read_bytes())
    told = describe(str(copy))
    assert (told["kind"], told["family"], told["dimensions"]) == ("encoder", "qwen2_vl", 32)
    assert told["modules"] == ["Transformer", "Pooling", "Normalize"]
    assert told["instructions"]["image"] == "Summary above image in one word:"
    assert told["trained_from"].endswith("backbone")
    assert told["trained_on"] == {"data": "pairs.csv", "rows": {"train": 17, "held_out": 7}}
    assert "held_out_mean_recall@1" in told["held_out"]
    assert main(["info", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert main(["info", str(copy)]) == 0
    assert "qwen2_vl" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert main(["info", str(tmp_path / "none")]) == 1
    assert "has no config.json, so it is no model" in capsys.readouterr().err
