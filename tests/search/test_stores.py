"""Qdrant and LanceDB hold what the corpus holds: its neighbours, twice the same, on after a stop."""

import lancedb
import numpy as np
import pytest
from planted_rows import DIM, planted, write
from qdrant_client import QdrantClient, models

from unime_st.data import load_corpus
from unime_st.search import exact_search, write_lancedb, write_qdrant

ROWS = 700


class Qdrant:
    def __init__(self, folder):
        self.client = QdrantClient(path=str(folder))

    def write(self, corpus, name="rows", **options):
        return write_qdrant(corpus, self.client, name, show_progress_bar=False, **options)

    def nearest(self, query, k, name="rows"):
        found = self.client.query_points(name, query=query.tolist(), limit=k).points
        assert [point.id for point in found] == [point.payload["row"] for point in found]
        return [(point.payload, point.score) for point in found]

    def all(self, name="rows"):
        found = self.client.scroll(name, limit=10_000, with_vectors=True)[0]
        return {point.id: (point.payload, np.array(point.vector)) for point in found}

    def stop_after(self, batches, monkeypatch):
        stop_after(self.client, "upsert", batches, monkeypatch)

    def go_on(self):
        pass


class Lance:
    def __init__(self, folder):
        self.folder = folder
        self.go_on()

    def go_on(self):
        self.connection = lancedb.connect(self.folder)

    def write(self, corpus, name="rows", **options):
        return write_lancedb(corpus, self.connection, name, show_progress_bar=False, **options)

    def nearest(self, query, k, name="rows"):
        found = self.connection.open_table(name).search(query).distance_type("cosine").limit(k).to_list()
        return [(payload(row), 1 - row["_distance"]) for row in found]

    def all(self, name="rows"):
        found = self.connection.open_table(name).to_arrow().to_pylist()
        assert len({row["row"] for row in found}) == len(found)
        return {row["row"]: (payload(row), np.array(row["vector"])) for row in found}

    def stop_after(self, batches, monkeypatch):
        stop_after(type(self.connection.open_table("rows")), "add", batches, monkeypatch)


def payload(row):
    return {name: value for name, value in row.items() if name not in ("vector", "_distance")}


def stop_after(owner, method, calls, monkeypatch):
    """Let a method be called so often, then stop the run before anything is written."""
    work, count = getattr(owner, method), [0]

    def stopping(*given, **options):
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return work(*given, **options)

    monkeypatch.setattr(owner, method, stopping)


@pytest.fixture(params=[Qdrant, Lance])
def store(request, tmp_path):
    return request.param(tmp_path / "store")


@pytest.fixture
def few(tmp_path):
    return write(tmp_path / "few", planted(ROWS))


@pytest.fixture
def asked():
    return planted(20, seed=0) + 0.1 * np.random.default_rng(4).standard_normal((20, DIM)).astype(np.float32)


def test_neighbours_are_those_of_exact_search(store, few, asked):
    titles = [{"title": f"number {row}", "even": row % 2 == 0} for row in range(ROWS)]
    assert store.write(few, payload=iter(titles), batch_size=64) == ROWS
    scores, rows = exact_search(few, asked, 10)
    ids = list(few.ids())
    for query, exact, their_scores in zip(asked, rows.tolist(), scores, strict=True):
        found = store.nearest(query, 10)
        assert [told for told, _ in found] == [{"row": row, "id": ids[row], **titles[row]} for row in exact]
        assert np.allclose([score for _, score in found], their_scores, atol=1e-5)


def test_the_same_twice_changes_nothing(store, few):
    assert store.write(few, batch_size=100) == ROWS
    before = store.all()
    assert store.write(load_corpus(few.folder), batch_size=333) == 0
    after = store.all()
    assert before.keys() == after.keys() == set(range(ROWS))
    assert all(before[row][0] == after[row][0] and np.array_equal(before[row][1], after[row][1]) for row in before)
    rows = planted(ROWS)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose([after[row][1] for row in range(ROWS)], unit, atol=1e-6)


def test_it_goes_on_after_a_stop(store, few, monkeypatch):
    store.write(write(few.folder.parent / "begun", planted(ROWS)[:100]), batch_size=100)  # the first batch
    with monkeypatch.context() as patched:
        store.stop_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            store.write(few, batch_size=100)
    store.go_on()
    assert len(store.all()) == 400
    assert store.write(few, batch_size=100) == ROWS - 400
    assert len(store.all()) == ROWS


def test_a_grown_corpus_adds_and_changed_payloads_are_written(store, few, asked):
    store.write(few, batch_size=100, payload=[{"title": "old"}] * ROWS)
    rows = planted(ROWS + 60)
    write(few.folder, rows)
    grown = load_corpus(few.folder)
    titles = [{"title": "new" if row in (3, 640) else "old"} for row in range(len(rows))]
    assert store.write(grown, batch_size=100, payload=titles) == 100 + 100 + 60
    found = store.all()
    assert {row for row, (told, _) in found.items() if told["title"] == "new"} == {3, 640}
    assert store.nearest(rows[755], 1)[0][0]["row"] == 755


def test_a_store_of_more_rows_or_other_dimensions_is_refused(store, few, tmp_path):
    store.write(few)
    with pytest.raises(ValueError, match="holds 200 rows from number 500 on, which the corpus does not have"):
        store.write(write(tmp_path / "less", planted(500)))
    with pytest.raises(ValueError, match=r"8 dimensions.* Give another name"):
        store.write(write(tmp_path / "narrow", planted(ROWS)[:, :8]))
    assert store.write(write(tmp_path / "narrow2", planted(ROWS)[:, :8]), name="other") == ROWS


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ([{}] * (ROWS - 1), ValueError, f"`payload` ends after {ROWS - 1} rows, but the corpus has {ROWS}"),
        ([{}] * (ROWS + 1), ValueError, f"`payload` goes on after {ROWS} rows"),
        ([{}] * 5 + ["title"] * ROWS, TypeError, "The payload of row 5 is a str"),
        ([{"id": 3}] * ROWS, ValueError, "The payload of row 0 has 'id', which is the store's own"),
    ],
)
def test_payloads_that_do_not_fit(given, error, told, store, few):
    with pytest.raises(error, match=told):
        store.write(few, payload=given)


def test_without_ids(store, tmp_path):
    store.write(write(tmp_path / "c", planted(20), ids=None))
    assert store.all()[7][0] == {"row": 7}


def test_a_collection_of_another_distance_is_refused(few, tmp_path):
    client = QdrantClient(":memory:")
    client.create_collection("dot", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.DOT))
    with pytest.raises(ValueError, match="the distance Cosine is needed"):
        write_qdrant(few, client, "dot")


def test_payloads_of_mixed_kinds_are_refused_by_lancedb(few, tmp_path):
    mixed = [{"title": "a"}] * 100 + [{"title": [1]}] * (ROWS - 100)
    with pytest.raises(ValueError, match="Rows from 100 on do not fit the columns of the table 'rows'"):
        write_lancedb(few, lancedb.connect(tmp_path / "l"), "rows", payload=mixed, batch_size=100)
