"""Exact search is a plain loop over all rows, in every format, through parts, filters and ties."""

import numpy as np
import pytest
import torch
from planted_rows import brute_force, planted, write

from unime_st.data import load_corpus
from unime_st.search import CorpusSearch, exact, exact_search


@pytest.mark.parametrize("options", [{}, {"output_format": "npy"}, {"output_format": "npy", "dtype": "float16"}])
@pytest.mark.parametrize("block", [7, 16384])
def test_it_is_brute_force(options, block, rows, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK", block)
    corpus = write(tmp_path / "c", rows[:333], window_size=50, **options)
    found = exact_search(corpus, queries, 12)
    numbers, cosines = brute_force(np.asarray(corpus), queries, 12)
    assert np.array_equal(found.rows, numbers)
    assert np.allclose(found.scores, cosines, atol=1e-5)
    assert (found.scores.dtype, found.rows.dtype) == (np.float32, np.int64)


def test_of_equal_rows_the_first_is_nearer(tmp_path):
    rows = np.tile(planted(5), (9, 1))
    found = exact_search(write(tmp_path / "c", rows, window_size=4), rows[3], 4)
    assert found.rows.tolist() == [[3, 8, 13, 18]]


def test_queries_may_be_tensors_of_half_precision(corpus, rows):
    query = torch.tensor(rows[:3], dtype=torch.bfloat16, requires_grad=True)
    found = exact_search(corpus, query, 2)
    expected = exact_search(corpus, query.detach().float().numpy(), 2)
    assert np.array_equal(found.rows, expected.rows)
    assert found.rows[:, 0].tolist() == [0, 1, 2]


def test_a_corpus_that_grows_is_searched_as_it_was_opened(tmp_path):
    """Its last part, which was not full, is written again with more rows."""
    rows = planted(190)
    corpus = write(tmp_path / "c", rows[:150])
    begun = CorpusSearch(corpus)
    assert begun.hits(rows[3], 1)[0]["row"] == 3
    write(tmp_path / "c", rows)
    for search in (begun, CorpusSearch(corpus)):  # ids read before, and after
        for prefix in (None, "a/"):
            among = range(0, 150, 1 if prefix is None else 2)
            numbers, _ = brute_force(rows, rows[180:181], 5, among)
            assert [hit["row"] for hit in search.hits(rows[180], 5, id_prefix=prefix)] == numbers[0].tolist()


def test_fewer_rows_than_asked_for_are_all_there(corpus, queries):
    assert exact_search(corpus, queries, 5000).rows.shape == (30, 1500)
    assert sorted(exact_search(corpus, queries[0], 5000).rows[0].tolist()) == list(range(1500))


def test_a_row_of_zeros_is_near_to_nothing(tmp_path):
    rows = np.vstack([np.zeros((1, 16)), planted(20)]).astype(np.float32)
    found = exact_search(write(tmp_path / "c", rows), rows[4], 21)
    assert np.isfinite(found.scores).all()
    assert found.scores[0, found.rows[0] == 0] == 0


@pytest.mark.parametrize("prefix", ["a/", "b/1", "b/1499", ""])
def test_a_prefix_chooses_rows(prefix, rows, corpus, queries):
    among = [row for row in range(1500) if f"{'ab'[row % 2]}/{row}".startswith(prefix)]
    assert among
    found = CorpusSearch(corpus).search(queries, 7, id_prefix=prefix)
    numbers, cosines = brute_force(rows, queries, 7, among)
    assert np.array_equal(found.rows, numbers)
    assert np.allclose(found.scores, cosines, atol=1e-5)


def test_a_prefix_of_nothing_finds_nothing(corpus, queries):
    assert CorpusSearch(corpus).search(queries, 7, id_prefix="a\ud800").rows.shape == (30, 0)
    assert CorpusSearch(corpus).search(queries, 7, id_prefix="c").rows.shape == (30, 0)
    assert CorpusSearch(corpus).hits(queries[0], id_prefix="c") == []


def test_parts_without_the_prefix_are_not_read(tmp_path, rows):
    corpus = write(tmp_path / "c", rows[:300], ids=lambda row: f"{row // 100}/{row}")
    search = CorpusSearch(corpus)
    assert search.hits(rows[5], 1, id_prefix="0/")[0]["row"] == 5  # the ids are read
    corpus.files[1].write_bytes(b"")
    assert search.hits(rows[205], 1, id_prefix="2/")[0]["row"] == 205
    with pytest.raises(ValueError, match=r"part-000001.parquet is damaged"):
        search.hits(rows[5], 1)


def test_hits_tell_row_id_and_score(corpus, rows):
    told = CorpusSearch(corpus).hits(rows[8], 2)
    assert told[0] == {"row": 8, "id": "a/8", "score": pytest.approx(1, abs=1e-5)}
    assert list(told[1]) == ["row", "id", "score"]


def test_without_ids_rows_have_numbers(tmp_path, rows):
    search = CorpusSearch(write(tmp_path / "c", rows[:50], ids=None))
    assert search.hits(rows[3], 1) == [{"row": 3, "score": pytest.approx(1, abs=1e-5)}]
    with pytest.raises(ValueError, match=r"has no ids, so `id_prefix='a'` chooses nothing"):
        search.hits(rows[3], id_prefix="a")


def test_integer_ids_have_no_prefixes(tmp_path, rows):
    search = CorpusSearch(write(tmp_path / "c", rows[:50], ids=lambda row: 1000 + row))
    assert search.hits(rows[3], 1)[0]["id"] == 1003
    with pytest.raises(ValueError, match=r"are integers, so `id_prefix='1'` chooses nothing"):
        search.hits(rows[3], id_prefix="1")


@pytest.mark.parametrize(
    ("queries", "top_k", "error", "told"),
    [
        (np.zeros((2, 5)), 3, ValueError, r"has the shape \(2, 5\), but the corpus has 16 dimensions"),
        (np.full((2, 16), np.nan), 3, ValueError, "not finite in row 0"),
        (np.ones((1, 16)), 0, ValueError, "`top_k=0`"),
        (np.ones((1, 16)), 2.0, TypeError, r"`top_k=2\.0`"),
    ],
)
def test_what_cannot_be_searched_is_refused(queries, top_k, error, told, corpus):
    with pytest.raises(error, match=told):
        exact_search(corpus, queries, top_k)
    with pytest.raises(error, match=told):
        CorpusSearch(corpus).search(queries, top_k)


def test_small_corpora_are_searched_exactly(corpus):
    search = CorpusSearch(load_corpus(corpus.folder))
    assert search.index is None
    assert not (corpus.folder / "_search").exists()
    with pytest.raises(ValueError, match=r"`method='fast'`, but it must be one of auto, exact, index"):
        CorpusSearch(corpus, method="fast")
    with pytest.raises(ValueError, match=r"`query` holds 2 queries"):
        search.hits(np.ones((2, 16)))
