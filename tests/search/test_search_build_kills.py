"""A build that is killed goes on where it was, and ends with the index of a build never killed."""

import time

import numpy as np
import pytest
from planted_rows import planted, write

from killing import note, notes, run_with_kills
from unime_st.data import load_corpus
from unime_st.search import build as building
from unime_st.search import build_index, exact_search, open_index
from unime_st.search.index import INDEX

ROWS = 19 * 1024 + 5  # twenty pieces


def build(folder):
    """Notes each piece of work that a build does; `write_corpus` has been called before."""
    building._PIECE_BYTES = 1
    for name in ("_train", "_write_piece", "write"):
        setattr(building._Build, name, noting(folder, name, getattr(building._Build, name)))
    build_index(load_corpus(folder / "corpus"), show_progress_bar=False)


def noting(folder, name, work):
    if hasattr(work, "noted"):
        return work

    def noted(self, *given):
        note(folder, [f"{name} {given[1].start}" if name == "_write_piece" else name])
        time.sleep(0.2)  # so that a kill falls into this piece of work, and not behind the last one
        return work(self, *given)

    noted.noted = True
    return noted


def written(folder):
    """Whether an index is there; if one is, it can be opened."""
    corpus = load_corpus(f"{folder}/corpus")
    if not (corpus.folder / "_search" / "index.json").exists():
        return False
    open_index(corpus, verify=True)
    return True


@pytest.mark.parametrize("seed", range(2))
def test_kills_cost_a_piece_each_and_change_nothing(seed, tmp_path):
    for name in ("killed", "alone"):
        write(tmp_path / name / "corpus", planted(ROWS), window_size=512)
    seen = run_with_kills(build, written, tmp_path / "killed", kills=3, seed=seed, most=2)
    assert not any(there for _, there in seen)
    assert run_with_kills(build, written, tmp_path / "alone", kills=0, seed=0, most=1) == []
    alone, killed = notes(tmp_path / "alone"), notes(tmp_path / "killed")
    assert alone == ["_train", *(f"_write_piece {start}" for start in range(0, ROWS, 1024)), "write"]
    assert set(killed) == set(alone)
    assert len(killed) <= len(alone) + 3
    one, other = (load_corpus(tmp_path / name / "corpus") for name in ("killed", "alone"))
    assert (one.folder / "_search" / INDEX).read_bytes() == (other.folder / "_search" / INDEX).read_bytes()
    assert not list((one.folder / "_search").glob(".*partial"))
    assert not (one.folder / "_search" / "building").exists()
    queries = planted(50, seed=0)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    found, truth = open_index(one).search(unit, 10).rows, exact_search(one, queries, 10).rows
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]) > 9


def test_pieces_of_another_corpus_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_PIECE_BYTES", 1)
    corpus = write(tmp_path / "c", planted(3000))
    monkeypatch.setattr(building._Build, "write", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, show_progress_bar=False)
    monkeypatch.undo()
    monkeypatch.setattr(building, "_PIECE_BYTES", 1)
    assert len(list((corpus.folder / "_search" / "building").glob("piece-*"))) == 3
    rows = planted(3400)
    write(corpus.folder, rows)
    grown = load_corpus(corpus.folder)
    build_index(grown, show_progress_bar=False)
    query = rows[3300:3301] / np.linalg.norm(rows[3300])
    assert open_index(grown).search(query, 1).rows.tolist() == [[3300]]
    assert len(open_index(grown)) == 3400


def test_a_kill_between_the_files_leaves_no_index_that_lies(tmp_path, monkeypatch):
    """Of a rebuild that ends after the new index is there and before what is known of it."""
    rows = planted(2000)
    corpus = write(tmp_path / "c", rows[:1500])
    build_index(corpus, show_progress_bar=False)
    write(corpus.folder, rows)
    grown = load_corpus(corpus.folder)
    monkeypatch.setattr(building, "write_atomically", stop_at_about(building.write_atomically))
    with pytest.raises(KeyboardInterrupt):
        build_index(grown, show_progress_bar=False)
    with pytest.raises(ValueError, match="built of other rows: it has grown from 1500 to 2000 rows"):
        open_index(grown)
    monkeypatch.undo()
    assert len(build_index(grown, show_progress_bar=False)) == 2000


def stop_at_about(write_atomically):
    def stopping(path, content):
        if path.name == "index.json":
            raise KeyboardInterrupt
        write_atomically(path, content)

    return stopping
