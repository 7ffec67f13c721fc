"""What the guide tells of rows, against loops; through the index, in files, and on two processes."""

import builtins
import json

import numpy as np
import pytest
import torch

from two_processes import run_two
from unime_st.samplers.guide import neighbors
from unime_st.samplers.guide.embeddings import GuideEmbeddings
from unime_st.samplers.guide.neighbors import find_neighbors
from unime_st.samplers.guide.store import NeighborStore


def guides(queries, targets):
    return [GuideEmbeddings(f"guide_{name}", side, len(side)) for name, side in (("q", queries), ("t", targets))]


def cosines(queries, targets):
    return (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (targets / np.linalg.norm(targets, axis=1)[:, None]).T


def clustered(rows=1500, seed=0, dim=32):
    """Topics of 25 rows; a tenth of the targets are far off, so that the rest of the topic is nearer."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(rows // 25, dim))[rng.integers(0, rows // 25, rows)] + rng.normal(size=(rows, dim)) * 0.4
    far = np.where(rng.random(rows) < 0.1, 1.6, 0.2)[:, None]
    queries, targets = points + rng.normal(size=(rows, dim)) * 0.2, points + rng.normal(size=(rows, dim)) * far
    return queries.astype(np.float32), targets.astype(np.float32)


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.1, 0.5])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_against_a_loop(margin, chunk, monkeypatch):
    monkeypatch.setattr(neighbors, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    queries, targets = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)) * 3
    targets[7], targets[21] = targets[3], targets[3]  # one target of three rows
    cosine = cosines(queries, targets)
    false = {(i, j) for i in range(40) for j in range(40) if i != j and cosine[i, j] > cosine[i, i] + margin + 1e-6}
    assert len(false) > 20
    found = find_neighbors(*guides(queries, targets), margin=margin, num_hardest=60)
    assert set(map(tuple, found.pairs.tolist())) == false
    assert found.twins[[7, 21]].tolist() == [3, 3]
    for row in range(40):
        allowed = [
            other
            for other in range(40)
            if other not in (7, 21) and found.twins[other] != found.twins[row] and (row, other) not in false
        ]
        expected = sorted(allowed, key=lambda other: -cosine[row, other])
        assert found.hardest[row].tolist() == expected + [-1] * (60 - len(expected))
    assert found.recall == {}


def test_groups_are_not_compared_with_each_other():
    queries, targets = clustered(300)
    groups = np.arange(300) % 3
    found = find_neighbors(*guides(queries, targets), margin=0.05, num_hardest=2, groups=groups)
    everything = find_neighbors(*guides(queries, targets), margin=0.05, num_hardest=2)
    within = {(i, j) for i, j in everything.pairs.tolist() if groups[i] == groups[j]}
    assert len(within) > 50
    assert set(map(tuple, found.pairs.tolist())) == within < set(map(tuple, everything.pairs.tolist()))
    assert (groups[found.hardest] == groups[:, None]).all()


def test_the_index_finds_nearly_all_and_says_how_much():
    sides = guides(*clustered())
    exact = find_neighbors(*sides, margin=0.1, num_hardest=4, exact=True)
    found = find_neighbors(*sides, margin=0.1, num_hardest=4, exact=False)
    again = find_neighbors(*sides, margin=0.1, num_hardest=4, exact=False)
    assert np.array_equal(found.pairs, again.pairs)
    assert np.array_equal(found.hardest, again.hardest)
    right, got = set(map(tuple, exact.pairs.tolist())), set(map(tuple, found.pairs.tolist()))
    assert len(right) > 1000
    assert got <= right  # scores are exact: nothing is called false that is not
    assert len(got) / len(right) > 0.95
    hits = sum(len({*a} & {*b}) for a, b in zip(exact.hardest.tolist(), found.hardest.tolist(), strict=True))
    assert hits / exact.hardest.size > 0.9
    assert found.recall["conflicts"] == pytest.approx(len(got) / len(right), abs=0.05)
    assert found.recall["hardest"] == pytest.approx(hits / exact.hardest.size, abs=0.05)


def test_rows_of_more_false_negatives_than_candidates_are_searched_again(monkeypatch):
    monkeypatch.setattr(neighbors, "_CANDIDATES", 12)
    sides = guides(*clustered(500))
    exact = find_neighbors(*sides, margin=0.1, exact=True)
    assert np.bincount(exact.pairs[:, 0]).max() > 20
    found = find_neighbors(*sides, margin=0.1, exact=False)
    assert len(found.pairs) > 0.9 * len(exact.pairs)


def test_without_faiss_the_advice_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def fail(name, *arguments, **options):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    sides = guides(*clustered(100))
    assert len(find_neighbors(*sides, margin=0.1).pairs)  # few rows need none
    with pytest.raises(ImportError, match=r'pip install "unime_st\[ann\]".*`exact_neighbors=True`'):
        find_neighbors(*sides, margin=0.1, exact=False)


def test_a_guide_that_is_no_use_is_refused(monkeypatch):
    monkeypatch.setattr(neighbors, "_MAX_MEAN_NEIGHBOURS", 5)
    with pytest.raises(ValueError, match="Raise the margin"):
        find_neighbors(*guides(np.eye(20), np.eye(20)), margin=-2.0)
    queries = np.eye(3)
    queries[1, 2] = np.nan
    with pytest.raises(ValueError, match="`guide_q` holds a number that is not finite, first in row 1"):
        find_neighbors(*guides(queries, np.eye(3)), margin=0.1)
    with pytest.raises(ValueError, match="3 dimensions and `guide_t` 2: they must come from one guide"):
        find_neighbors(*guides(np.eye(3), np.eye(3)[:, :2]), margin=0.1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_tensors_and_twins(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(dtype)
    rows[[9, 30]] = rows[4]
    np.save(tmp_path / "rows.npy", rows)
    array, file = GuideEmbeddings("a", rows, 50), GuideEmbeddings("a", tmp_path / "rows.npy", 50)
    assert torch.equal(array.unit_rows(), file.unit_rows())
    assert array.digest() == file.digest()
    expected = np.arange(50)
    expected[[9, 30]] = 4
    assert file.twins().tolist() == expected.tolist()
    assert GuideEmbeddings("a", torch.from_numpy(rows).bfloat16(), 50).unit_rows().shape == (50, 3)


def test_what_was_found_is_kept_and_nothing_half(tmp_path, monkeypatch):
    sides, store = guides(*clustered(200)), NeighborStore(tmp_path / "plan")
    options = {"margin": 0.1, "num_hardest": 2, "groups": np.arange(200) % 2, "exact": None}
    calls = []
    real = find_neighbors
    monkeypatch.setattr(
        "unime_st.samplers.guide.store.find_neighbors", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    first = store.load_or_find(*sides, **options)
    again = store.load_or_find(*sides, **options)
    assert len(calls) == 1
    for name in ("pairs", "hardest", "twins"):
        assert len(getattr(first, name))
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for change in ({"margin": 0.2}, {"num_hardest": 1}, {"groups": None}, {"exact": True}):
        store.load_or_find(*sides, **options | change)
    other = clustered(200)[0]
    other[77, 3] += 1e-3
    store.load_or_find(*guides(other, clustered(200)[1]), **options)
    assert len(calls) == 6
    # Killed between the arrays and the record: as if nothing were there.
    records = sorted((tmp_path / "plan").glob("*.json"))
    assert len(records) == 6
    for record in records:
        record.unlink()
    store.load_or_find(*sides, **options)
    assert len(calls) == 7
    assert not list((tmp_path / "plan").glob(".*"))


def test_no_flipped_or_missing_byte_of_what_was_kept_is_served(tmp_path, caplog):
    sides, store = guides(*clustered(60)), NeighborStore(tmp_path / "plan")
    options = {"margin": 0.1, "num_hardest": 2}
    first = store.load_or_find(*sides, **options)
    files = sorted((tmp_path / "plan").iterdir())
    whole = [path.read_bytes() for path in files]
    for path, good in zip(files, whole, strict=True):
        places = range(0, len(good), 1 + len(good) // 40)
        harmed = [good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in places]
        for content in [*harmed, good[:-1], good[: len(good) // 2], b"", None, b"[]"]:
            path.unlink() if content is None else path.write_bytes(content)
            caplog.clear()
            again = store.load_or_find(*sides, **options)
            assert "are found again" in caplog.text or (content is None and path.suffix == ".json")
            for name in ("pairs", "hardest", "twins"):
                assert np.array_equal(getattr(first, name), getattr(again, name)), path
            assert again.recall == first.recall
            assert [one.read_bytes() for one in files] == whole
    caplog.clear()
    store.load_or_find(*sides, **options)
    assert not caplog.text


def test_what_was_kept_before_there_were_checksums_is_found_again(tmp_path, caplog):
    sides, store = guides(*clustered(60)), NeighborStore(tmp_path)
    store.load_or_find(*sides, margin=0.1, num_hardest=2)
    (record,) = tmp_path.glob("*.json")
    told = json.loads(record.read_text())
    record.write_text(json.dumps({name: value for name, value in told.items() if name not in ("arrays", "checksum")}))
    store.load_or_find(*sides, margin=0.1, num_hardest=2)
    assert f"{record} is not used (it is of an earlier version, without checksums)" in caplog.text
    assert json.loads(record.read_text()) == told


def plan_on_two(rank, folder):
    """Each process sees other embeddings, as if its arithmetic differed: what rank 0 found must count on both."""
    from datasets import Dataset

    from unime_st.samplers import FalseNegativeAwareBatchSampler

    queries, targets = clustered(400, seed=rank)
    rows = Dataset.from_dict({"q": [f"q{i}" for i in range(400)], "t": [f"t{i}" for i in range(400)]})
    options = {"guide_queries": queries, "guide_targets": targets, "hard_negatives_together": 2, "plan_dir": folder}
    sampler = FalseNegativeAwareBatchSampler(rows, 8, True, exact_neighbors=False, **options)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(torch.tensor(list(sampler)))
    failure = ""
    try:
        bad = queries[: 400 if rank else 10]
        FalseNegativeAwareBatchSampler(rows, 8, True, guide_queries=bad, guide_targets=targets)
    except (ValueError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    pairs = torch.from_numpy(sampler.conflicts.neighbours)
    return {"epochs": torch.stack(epochs), "pairs": pairs, "failure": failure}


def test_two_processes_plan_alike(tmp_path):
    first, second = run_two(plan_on_two, tmp_path, str(tmp_path / "plan"))
    assert torch.equal(first["epochs"], second["epochs"])
    assert torch.equal(first["pairs"], second["pairs"])
    assert len(first["pairs"]) > 100
    assert first["epochs"].shape[0] == 2
    assert not torch.equal(first["epochs"][0], first["epochs"][1])
    assert first["failure"].startswith("ValueError: `guide_queries` has shape (10, 32)")
    assert second["failure"].startswith("RuntimeError: Rank 0 failed, so this process stops too: ValueError")
    assert len(list((tmp_path / "plan").glob("*.json"))) == 1


@pytest.mark.parametrize("row", [0, 2])
def test_a_row_of_zeros_is_named(row):
    queries = np.eye(4)
    queries[row] = 0
    with pytest.raises(ValueError, match=f"`guide_q` holds nothing but zeros in row {row}"):
        find_neighbors(*guides(queries, np.eye(4)), margin=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": float("nan")}, "margin=nan"),
        ({"margin": float("inf")}, "margin=inf"),
        ({"margin": None}, "margin=None"),
        ({"margin": 0.1, "num_hardest": -1}, "num_hardest=-1"),
        ({"margin": 0.1, "num_hardest": 1.5}, "num_hardest=1.5"),
    ],
)
def test_numbers_that_are_none(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        find_neighbors(*guides(np.eye(4), np.eye(4)), **options)


def test_what_is_no_array_of_numbers_is_named(tmp_path):
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "several.npz", np.eye(2))
    (tmp_path / "damaged.npy").write_bytes(b"no array")
    with pytest.raises(TypeError, match="`guide_q` must be an array of numbers"):
        GuideEmbeddings("guide_q", tmp_path / "words.npy", 2)
    with pytest.raises(TypeError, match="`guide_q` must be an array of numbers"):
        GuideEmbeddings("guide_q", tmp_path / "several.npz", 2)
    with pytest.raises(ValueError, match=r"`guide_q='.*damaged\.npy'` cannot be read"):
        GuideEmbeddings("guide_q", tmp_path / "damaged.npy", 2)
    with pytest.raises(FileNotFoundError, match=r"`guide_q='.*nowhere\.npy'`, but there is no such file"):
        GuideEmbeddings("guide_q", str(tmp_path / "nowhere.npy"), 2)
