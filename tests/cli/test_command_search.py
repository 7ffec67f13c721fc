"""`unime encode`, `search`, `evaluate`, `export` and `info`, each against what the library says."""

import json
import re
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tiny import tiny_backbone
from unime_st import build_reranker, export_reranker, load_encoder
from unime_st.cli import main
from unime_st.cli.info import describe
from unime_st.data import load_corpus
from unime_st.data.corpus.encoded import read_manifest, write_manifest


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


def test_evaluate_reranks(trained, pairs, tmp_path, capsys):
    judge = build_reranker(tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No"]), device="cpu")
    reranker = str(export_reranker(judge, tmp_path / "reranker"))
    arguments = ["evaluate", str(trained / "encoder"), str(pairs), "--device", "cpu", "--json"]
    assert main([*arguments, "--reranker", reranker, "--rerank-depth", "3"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["pairs_reranked_text_to_image_recall@5"] == metrics["pairs_text_to_image_recall@5"]
    assert metrics["pairs_rerank_pairs"] == 2 * 3 * 24
    assert metrics["pairs_reranked_text_to_image_ties"] >= 0
    assert main([*arguments, "--reranker", reranker, "--rerank-depth", "3", "--listwise"]) == 0
    listwise = json.loads(capsys.readouterr().out)
    assert listwise["pairs_rerank_pairs"] == 2 * 3 * 24
    assert listwise["pairs_reranked_text_to_image_recall@5"] == metrics["pairs_text_to_image_recall@5"]
    assert main([*arguments, "--listwise"]) == 2
    assert "--listwise needs --reranker" in capsys.readouterr().err
    assert main([*arguments, "--reranker", reranker, "--rerank-depth", "1", "--listwise"]) == 1
    assert "rerank_depth=1" in capsys.readouterr().err
    texts = tmp_path / "texts.csv"
    texts.write_text("query,positive\na,b\nc,d\n")
    assert main(["evaluate", str(trained / "encoder"), str(texts), "--device", "cpu", "--reranker", reranker]) == 1
    assert "Reranking needs pairs with an image on one side" in capsys.readouterr().err


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


def test_an_index_finds_the_same(corpus, trained, pairs, tmp_path, capsys):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    assert main(["index", str(copy), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{copy}/_search/index.faiss: 24 rows, ")
    recall = float(re.search(r"recall@10 (\d\.\d{3}) on 12 rows of the corpus, against exact search", told)[1])
    assert recall > 0.5  # rows of so small a model tie within half precision
    base = ["search", str(copy), "--model", str(trained / "encoder"), "--device", "cpu", "--top-k", "6", "--json"]
    asked = ["--image", str(pairs.parent / "7.png"), "number 7 aaa"]
    found = {}
    for method in ("exact", "index"):
        assert main([*base, "--method", method, *asked]) == 0
        found[method] = json.loads(capsys.readouterr().out)
    assert found["exact"]["query"] == found["index"]["query"] == {"image": asked[1], "text": asked[2]}
    rows = {method: [row["row"] for row in one["results"]] for method, one in found.items()}
    told = {method: [row["score"] for row in one["results"]] for method, one in found.items()}
    np.testing.assert_allclose(told["exact"], told["index"], atol=2e-3)
    model = load_encoder(trained / "encoder", device="cpu")
    scores = np.asarray(load_corpus(copy)) @ model.encode([{"image": asked[1], "text": asked[2]}])[0]
    assert rows["exact"] == np.argsort(-scores, kind="stable")[:6].tolist()
    assert rows["index"][0] == rows["exact"][0]
    assert np.allclose(scores[rows["index"]], scores[rows["exact"]], atol=1e-3)  # the rows are close to each other


@pytest.mark.parametrize("method", ["exact", "index"])
def test_a_prefix_of_ids(method, corpus, trained, tmp_path, capsys):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    base = ["search", str(copy), "x", "--model", str(trained / "encoder"), "--device", "cpu", "--method", method]
    assert main([*base, "--quiet", "--id-prefix", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 10  # of the eleven: 1.png and 10.png to 19.png
    assert all(line.split()[2].startswith("1") for line in shown)
    assert main([*base, "--quiet", "--id-prefix", "photos/"]) == 0
    assert capsys.readouterr().out == "no id begins with 'photos/'\n"


def test_an_index_tuned_on_encoded_queries(corpus, trained, pairs, tmp_path, capsys):
    copy, asked = tmp_path / "corpus", tmp_path / "captions"
    shutil.copytree(corpus, copy)
    arguments = ["encode", str(pairs), str(trained / "encoder"), "--output", str(asked), "--columns", "caption"]
    assert main([*arguments, "--id-column", "image", "--device", "cpu", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["index", str(copy), "--queries", str(asked), "--precision", "int8", "--quiet"]) == 0
    assert "on 12 given queries" in capsys.readouterr().out
    assert main(["index", str(copy), "--target-recall", "2"]) == 1
    assert "`target_recall=2.0`, but recall is at most 1." in capsys.readouterr().err
    manifest = read_manifest(asked)
    write_manifest(asked, {**manifest, "model": "another"})
    assert main(["index", str(copy), "--queries", str(asked), "--quiet"]) == 1
    assert "so they do not compare. Encode the queries with the corpus's own" in capsys.readouterr().err
    assert main(["index", str(tmp_path)]) == 1
    assert "holds no encoded corpus" in capsys.readouterr().err
