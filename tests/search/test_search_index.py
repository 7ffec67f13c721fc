"""The index beside exact search and plain faiss, and every way in which it can be out of date or damaged."""

import json
import logging

import faiss
import numpy as np
import pyarrow.dataset
import pytest
from planted_rows import DIM, brute_force, planted, write

from unime_st.data import load_corpus
from unime_st.search import (
    CorpusSearch,
    DamagedIndexError,
    StaleIndexError,
    build_index,
    corpus_search,
    exact_search,
    open_index,
)


@pytest.fixture
def indexed(corpus):
    build_index(corpus, show_progress_bar=False)
    return corpus


def recall(found, truth):
    return np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, truth, strict=True)])


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.93), ("int8", 0.86)])  # 16 dimensions are few
def test_it_finds_what_is_planted(precision, least, corpus, rows, queries):
    index = build_index(corpus, precision=precision, show_progress_bar=False)
    numbers, _ = brute_force(rows, queries, 10)
    found = CorpusSearch(corpus, method="index").search(queries, 10)
    assert open_index(corpus).about["precision"] == precision
    assert recall(found.rows, numbers) > least
    assert (found.rows % 40 == np.arange(30)[:, None]).mean() > 0.99  # of the query's own group
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    asked = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    assert np.allclose(found.scores, np.einsum("qd,qkd->qk", asked, unit[found.rows]), atol=0.01)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    about = index.about
    assert about["nprobe"] < about["cells"] == 38
    assert about["recall@10"] == {"recall": about["recall@10"]["recall"], "target": 0.97, "queries": 128,
                                  "of": "rows of the corpus"}  # fmt: skip
    assert about["recall@10"]["recall"] > least


def test_the_recall_told_is_that_of_the_index(corpus, rows):
    """Of the odd ones of the sample, rows of the corpus that are no answers to themselves; from the file by faiss."""
    index = build_index(corpus, target_recall=0.5, show_progress_bar=False)
    assert index.about["recall@10"]["recall"] < 0.99
    chosen = np.sort(np.random.default_rng(1).choice(1500, 256, replace=False))[1::2]
    numbers, _ = brute_force(rows, rows[chosen], 11)
    unit = rows[chosen] / np.linalg.norm(rows[chosen], axis=1, keepdims=True)
    _, found = faiss.read_index(str(index.path)).search(unit, 11)
    others = [[n for n in one if n != own][:10] for one, own in zip(found.tolist(), chosen, strict=True)]
    truth = [[n for n in one if n != own][:10] for one, own in zip(numbers.tolist(), chosen, strict=True)]
    assert recall(others, truth) == pytest.approx(index.about["recall@10"]["recall"], abs=1e-4)


def test_plain_faiss_reads_it(indexed, queries):
    index = faiss.read_index(str(indexed.folder / "_search" / "index.faiss"))
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores, rows = index.search(unit, 10)
    ours = CorpusSearch(indexed, method="index").search(queries, 10)
    assert np.array_equal(np.sort(rows, axis=1), np.sort(ours.rows, axis=1))
    assert np.allclose(scores, ours.scores, atol=1e-6)
    assert recall(rows, exact_search(indexed, queries, 10).rows) > 0.93


def test_pieces_make_the_whole(corpus, queries, monkeypatch, tmp_path):
    """Built in pieces of 1,024 rows, the index has each row at its number."""
    monkeypatch.setattr("unime_st.search.build._PIECE_BYTES", 1)
    index = build_index(corpus, show_progress_bar=False)
    assert index.about["piece_rows"] == 1024 < len(corpus)
    unit = np.asarray(corpus) / np.linalg.norm(np.asarray(corpus), axis=1, keepdims=True)
    whole = faiss.read_index(str(index.path))
    copies = faiss.downcast_index(whole.refine_index)  # owned by the whole
    assert np.allclose(copies.reconstruct_n(0, 1500), unit, atol=1e-3)
    every = index.search(unit[[3, 1400]], 1500).rows
    assert [sorted(row) for row in every.tolist()] == [list(range(1500))] * 2
    assert every[:, 0].tolist() == [3, 1400]
    assert not (corpus.folder / "_search" / "building").exists()


def test_never_fewer_than_asked_for(indexed, queries):
    assert open_index(indexed).about["nprobe"] <= 8
    found = CorpusSearch(indexed, method="index").search(queries, 1200)
    assert found.rows.shape == (30, 1200)
    assert found.rows.min() >= 0
    assert all(len(set(row)) == 1200 for row in found.rows.tolist())
    assert CorpusSearch(indexed, method="index").search(queries, 9999).rows.shape == (30, 1500)


def test_a_query_of_zeros_is_as_near_to_all(indexed, tmp_path):
    """To codes it is no query: they find nothing, and scores of nothing are no cosines."""
    for corpus in (indexed, write(tmp_path / "zeros", np.zeros((200, DIM), np.float32))):
        found = CorpusSearch(corpus, method="index").search(np.zeros(DIM), 20)
        assert found.scores.tolist() == [[0.0] * 20]
        assert found.rows.tolist() == [list(range(20))]
        assert CorpusSearch(corpus, method="index").hits(np.zeros(DIM), 1)[0]["row"] == 0


@pytest.mark.parametrize("prefix", ["a/", "b/1", "b/1499", ""])
def test_a_prefix_misses_nothing(prefix, indexed, rows, queries):
    among = [row for row in range(1500) if f"{'ab'[row % 2]}/{row}".startswith(prefix)]
    found = CorpusSearch(indexed, method="index").search(queries, 20, id_prefix=prefix)
    numbers, cosines = brute_force(rows, queries, 20, among)
    assert found.rows.shape == numbers.shape
    assert set(found.rows.ravel().tolist()) <= set(among)
    assert recall(found.rows, numbers) > 0.99  # half precision changes the order of rows that are as near
    assert np.allclose(found.scores, cosines, atol=1e-3)


def test_a_prefix_of_nothing(indexed, queries):
    assert CorpusSearch(indexed, method="index").search(queries, 3, id_prefix="nothing").rows.shape == (30, 0)


def test_given_queries_tune_it_anew(indexed, caplog):
    far = np.random.default_rng(3).standard_normal((64, 16)).astype(np.float32)  # unlike any row
    before = open_index(indexed).about
    with caplog.at_level(logging.INFO, "unime_st"):
        index = build_index(indexed, queries=far, target_recall=0.999, show_progress_bar=False)
    assert "Training" not in caplog.text
    assert index.about["recall@10"]["of"] == "given queries"
    assert index.about["nprobe"] > before["nprobe"]
    assert recall(index.search(far / np.linalg.norm(far, axis=1, keepdims=True), 10).rows,
                  exact_search(indexed, far, 10).rows) > 0.98  # fmt: skip


def test_equal_rows_do_not_lower_recall(tmp_path):
    corpus = write(tmp_path / "c", np.repeat(planted(60), 25, axis=0))
    index = build_index(corpus, show_progress_bar=False)
    assert index.about["recall@10"]["recall"] == 1
    assert index.about["nprobe"] <= 4


def test_what_is_there_is_not_built_again(indexed, caplog):
    before = (indexed.folder / "_search" / "index.faiss").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "unime_st"):
        build_index(load_corpus(indexed.folder), show_progress_bar=False)
        CorpusSearch(indexed, method="index")
    assert (indexed.folder / "_search" / "index.faiss").stat().st_mtime_ns == before
    build_index(indexed, precision="int8", show_progress_bar=False)
    assert CorpusSearch(indexed, method="index").index.about["precision"] == "int8"
    assert build_index(indexed, show_progress_bar=False).about["precision"] == "int8"
    assert build_index(indexed, rebuild=True, show_progress_bar=False).about["precision"] == "float16"


def test_a_large_corpus_gets_one_at_its_first_search(corpus, queries, monkeypatch, caplog):
    monkeypatch.setattr(corpus_search, "EXACT_ROWS", 1500)
    with pytest.raises(FileNotFoundError, match=r"has no index\. Build it: `unime index "):
        open_index(corpus)
    with caplog.at_level(logging.INFO, "unime_st"):
        search = CorpusSearch(corpus, show_progress_bar=False)
    assert "is searched through an index, which is built now, once" in caplog.text
    assert search.index is not None
    assert CorpusSearch(corpus, method="exact").index is None


def test_a_grown_corpus_is_noticed(indexed, queries, caplog):
    write(indexed.folder, planted(1720))
    grown = load_corpus(indexed.folder)
    with pytest.raises(StaleIndexError, match="built of other rows: it has grown from 1500 to 1720 rows"):
        open_index(grown)
    search = CorpusSearch(grown, method="index", show_progress_bar=False)
    assert "it has grown from 1500 to 1720 rows. It is built anew now." in caplog.text
    assert len(search.index) == 1720
    assert search.hits(planted(1720)[1719], 1)[0]["id"] == "b/1719"


def test_a_changed_row_is_noticed(indexed, rows):
    changed = rows.copy()
    changed[420] = -changed[420]
    (indexed.folder / "part-000004.parquet").unlink()
    write(indexed.folder, changed)
    with pytest.raises(StaleIndexError, match=r"part-000004.parquet has changed"):
        open_index(load_corpus(indexed.folder))
    assert CorpusSearch(load_corpus(indexed.folder), method="index").hits(changed[420], 1)[0]["row"] == 420


def test_other_dimensions_are_noticed(indexed, rows):
    about = indexed.folder / "_search"
    kept = {path.name: path.read_bytes() for path in about.iterdir()}
    for path in indexed.folder.glob("part-*"):
        path.unlink()
    (indexed.folder / ".manifest.json").unlink()
    write(indexed.folder, rows[:, :8])
    assert {path.name: path.read_bytes() for path in about.iterdir()} == kept
    with pytest.raises(StaleIndexError, match="it had 16 dimensions and has 8 now"):
        open_index(load_corpus(indexed.folder))


@pytest.mark.parametrize("name", ["index.faiss", "ids.arrow", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "empty"])
def test_a_damaged_file_is_named_and_built_anew(name, damage, indexed, rows, caplog):
    path = indexed.folder / "_search" / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 4
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = b""
    path.unlink() if damage == "missing" else path.write_bytes(bytes(content))
    if (name, damage) == ("index.json", "missing"):
        with pytest.raises(FileNotFoundError, match="has no index"):
            open_index(indexed)
    else:
        with pytest.raises(DamagedIndexError, match=rf"{name} is damaged \(.*\)\. Build the index anew: `unime index"):
            open_index(indexed)
    search = CorpusSearch(indexed, method="index", show_progress_bar=False)
    assert search.hits(rows[77], 1)[0]["id"] == "b/77"
    assert open_index(indexed, verify=True).about["rows"] == 1500


def test_a_flipped_byte_of_the_copies_is_found_by_unime_index(indexed, caplog):
    path = indexed.folder / "_search" / "index.faiss"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(bytes(content))
    open_index(indexed)  # does not read them
    with pytest.raises(DamagedIndexError, match="its bytes are not those that were written"):
        open_index(indexed, verify=True)
    build_index(indexed, show_progress_bar=False)
    assert "is damaged (its bytes are not those that were written). It is built anew now." in caplog.text
    open_index(indexed, verify=True)


def test_other_readers_of_the_corpus_pass_over_it(indexed):
    assert pyarrow.dataset.dataset(indexed.folder).count_rows() == 1500
    write(indexed.folder, planted(1500))  # `encode_corpus` goes on beside it
    assert open_index(indexed).about["rows"] == 1500


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"precision": "int4"}, ValueError, "`precision='int4'`, but it must be one of float16, int8"),
        ({"target_recall": 1.5}, ValueError, r"`target_recall=1\.5`, but recall is at most 1"),
        ({"target_recall": 0}, ValueError, "`target_recall=0`, but it must be a number above 0"),
        ({"queries": np.ones((2, 3))}, ValueError, "the corpus has 16 dimensions"),
        ({"queries": np.ones((0, 16))}, ValueError, "`queries` is empty"),
    ],
)
def test_refused(options, error, told, corpus):
    with pytest.raises(error, match=told):
        build_index(corpus, **options)
    assert not (corpus.folder / "_search").exists()


def test_too_few_rows(tmp_path):
    with pytest.raises(ValueError, match=r"has 15 rows, and an index needs 16\. Search it exactly"):
        build_index(write(tmp_path / "c", planted(15)))
    index = build_index(write(tmp_path / "d", planted(16), ids=None), show_progress_bar=False)
    assert index.search(planted(16)[:1], 5).rows.shape == (1, 5)


def test_without_faiss_it_says_what_to_do(corpus, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "unime_st\[ann\]"`. Without it, search with `method="exact"`'):
        CorpusSearch(corpus, method="index")
    assert CorpusSearch(corpus).hits(np.ones(16), 1)


def test_what_is_kept_beside_it(indexed):
    about = json.loads((indexed.folder / "_search" / "index.json").read_text())
    assert about["factory"] == "IVF38,PQ8x4fs,Refine(SQfp16)"
    assert about["parts"] == indexed.part_checksums()
    assert {"nprobe", "k_factor", "recall@10", "seconds", "faiss", "files"} <= set(about)
