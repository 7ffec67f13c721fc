"""The script that encodes a corpus into files."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tiny import picture
from tiny_data import COLOURS
from unime_st.data import load_corpus


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """The script sets levels for its own run; they are put back."""
    import logging

    logger = logging.getLogger("unime_st")
    level = logger.level
    yield
    logger.setLevel(level)


def test_texts_of_each_kind_of_file(script, world, encoder, tmp_path, capsys):
    main = script("encode_corpus").main
    lines = (world / "texts.txt").read_text().splitlines()
    texts = [*lines[:3], " ", *lines[3:6], "red.png"]  # a blank one, and one that is a text whatever it ends with
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "a.parquet")
    kept = [number for number, text in enumerate(texts) if text.strip()]
    expected = SentenceTransformer(str(encoder), device="cpu").encode([{"text": texts[number]} for number in kept])
    for suffix, column in (("txt", "text"), ("jsonl", "body"), ("parquet", "body")):
        output = tmp_path / suffix
        options = ["--column", column, "--output", str(output), "--window-size", "3"]
        corpus = main([str(encoder), "--texts", str(tmp_path / f"a.{suffix}"), *options])
        np.testing.assert_allclose(corpus.rows(range(7)), expected, atol=1e-5)
        assert list(corpus.ids()) == kept
        assert f"wrote {output}: " in capsys.readouterr().out
        assert sorted(path.name for path in output.glob("part*")) == [
            f"part-00000{number}.parquet" for number in range(3)
        ]
    assert pq.read_table(tmp_path / "txt")["id"].to_pylist() == kept


def test_pages_of_pdf_files(script, encoder, tmp_path):
    first, *others = [picture(colour, (144, 72)) for colour in COLOURS[:3]]
    (tmp_path / "papers").mkdir()
    first.save(tmp_path / "papers/a.pdf", save_all=True, append_images=others)
    (tmp_path / "papers/torn.pdf").write_text("no PDF")
    main = script("encode_corpus").main
    corpus = main([str(encoder), "--pdfs", str(tmp_path / "papers"), "--output", str(tmp_path / "out")])
    assert list(corpus.ids()) == [f"a.pdf#page={number}" for number in (1, 2, 3)]
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="holds no page that can be read"):
        main([str(encoder), "--pdfs", str(tmp_path / "none"), "--output", str(tmp_path / "out")])


def test_images_and_a_second_run(script, world, encoder, tmp_path, caplog):
    main = script("encode_corpus").main
    options = [str(encoder), "--images", str(world / "images"), "--output", str(tmp_path / "out"), "--window-size", "5"]
    options += ["--format", "npy", "--dtype", "float16", "--prompt", "In one word: "]
    main(options)
    corpus = load_corpus(tmp_path / "out")
    assert list(corpus.ids()) == sorted(f"{colour}.png" for colour in COLOURS)
    model = SentenceTransformer(str(encoder), device="cpu")
    items = [{"image": str(world / "images" / name)} for name in corpus.ids()]
    np.testing.assert_allclose(corpus.rows(range(8)), model.encode(items, prompt="In one word: "), atol=1e-3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    main(options)
    assert "8 rows (2 parts) were in" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_it_says_what_is_wrong(script, world, encoder, tmp_path, capsys):
    main = script("encode_corpus").main
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([str(encoder), *output])
    assert "--texts --images --pdfs is required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(encoder), "--texts", "nowhere.txt", *output])
    assert "nowhere.txt is no file of texts (.jsonl, .parquet, .txt)" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit):
        main([str(encoder), "--images", str(tmp_path / "none"), *output])
    assert "holds no image" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"has no column 'title'; it has text. Give --column"):
        main([str(encoder), "--texts", str(world / "texts.txt"), "--column", "title", *output])
