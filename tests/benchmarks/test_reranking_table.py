"""The table of `benchmarks/reranking.py`: means over seeds, and what reranking changes, seed by seed."""

import pytest


@pytest.fixture
def module():
    import reranking

    return reranking


def scores(before, after):
    return {"labels_precision@1": before, "reranked_labels_precision@1": after, "rerank_seconds": 2.0,
            "rerank_pairs": 30.0, "within_depth": 0.5}  # fmt: skip


def test_changes_are_taken_seed_by_seed(module):
    cases = ["encoder", *module.CASES]
    assert cases == list(module.NAMES)
    runs = {
        seed: {"scores": {name: scores(0.1 * (1 + seed), 0.1 + 0.2 * seed) for name in cases},
               "judged": {"kept": 1}, "cpu_seconds": {"encoder": 60.0 * (1 + seed)}}
        for seed in (0, 1)
    }  # fmt: skip
    summary = module.summarise(runs, "test", module.SETTINGS)
    row = summary["table"]["encoder"]
    assert row["labels_precision@1"]["mean"] == pytest.approx(0.15)
    assert row["gain"]["values"] == pytest.approx([0.0, 0.1])
    assert summary["cpu_minutes_a_seed"] == 1.5
    shown = module.markdown(summary)
    assert "| encoder | 15.0 ± 7.1 | 50.0 ± 0.0 | 20.0 ± 14.1 | 5.0 ± 7.1 |" in shown
    assert "over 2 seed(s)" in shown


def test_every_drawing_has_its_label_among_all(module, tmp_path):
    class Benchmark:
        def texts(self, split):
            return {"label": ["cat", "dog", "cat"]}

        def retrieval(self, split, vendor):
            return [tmp_path / f"{vendor}-{n}.png" for n in range(2)], [["dog"], ["cat"]]

    task = module.label_task(Benchmark(), "test").load(on_error="raise")
    assert [item.get("text") for item in task.items[:2]] == ["cat", "dog"]
    assert [task.items[task.own(place)[0]]["text"] for place in range(4)] == ["dog", "cat", "dog", "cat"]
    assert len(task.corpus) == 2
    assert all("image" in task.items[query] for query in task.queries)
