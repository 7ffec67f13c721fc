"""MMEB in two processes: one queue, each input encoded once, the same numbers; and beside the Trainer's own sharing."""

import numpy as np
import pytest
import torch
from evaluation_fakes import HashModel
from test_mmeb import write_task

from two_processes import run_two
from unime_st.embedding import distinct as encoding
from unime_st.evaluation import MMEBEvaluator

TASKS = {"VOC2007": [(1, [1, 3]), (5, [5, 7]), (2, [4, 6])], "CIRR": [(9, [9, 11]), (2, [6, 4]), (13, [15, 17, 19])]}


class ByText(HashModel):
    """Embeds by what is written and shown, not by the object."""

    def vector(self, item, prompt=""):
        return super().vector(sorted((key, str(value)[-8:]) for key, value in item.items()), prompt)


def evaluate(rank, root, cache, fail):
    encoding._BATCHES_A_CHUNK = 1
    model = ByText()
    evaluator = MMEBEvaluator(root, batch_size=2, cache_dir=cache, on_error="raise" if fail else "report")
    if fail:
        with pytest.raises(ValueError, match=r"VOC2007, row 2: .*4\.png"):
            evaluator(model)
        return {"failed": torch.ones(1)}
    metrics = evaluator(model)
    return {
        "metrics": torch.tensor(list(metrics.values()), dtype=torch.float64),
        "encoded": torch.tensor([hash(str(sorted(item.items()))) % 2**31 for item in model.encoded]),
    }


def test_two_processes_share_one_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # of the processes started
    for task, rows in TASKS.items():
        write_task(tmp_path / "bench", task, rows)
    (tmp_path / "out").mkdir()
    first, second = run_two(evaluate, tmp_path / "out", str(tmp_path / "bench"), str(tmp_path / "cache"), False)
    monkeypatch.setattr(encoding, "_BATCHES_A_CHUNK", 1)
    model = ByText()
    alone = MMEBEvaluator(tmp_path / "bench", batch_size=2, on_error="report")(model)
    for found in (first, second):
        assert found["metrics"].tolist() == list(alone.values())
    own = [set(found["encoded"].tolist()) for found in (first, second)]
    assert not own[0] & own[1]
    assert len(own[0]) + len(own[1]) == len(model.encoded)
    assert min(map(len, own)) >= 4
    again = ByText()
    MMEBEvaluator(tmp_path / "bench", batch_size=2, cache_dir=tmp_path / "cache")(again)
    assert not again.encoded  # both wrote what they had encoded


def test_an_unreadable_image_stops_all_processes(tmp_path):
    for task, rows in TASKS.items():
        write_task(tmp_path / "bench", task, rows)
    (tmp_path / "bench" / "images" / "pictures" / "4.png").write_bytes(b"torn")
    (tmp_path / "out").mkdir()
    found = run_two(evaluate_torn, tmp_path / "out", str(tmp_path / "bench"), None, True)
    assert all(part["failed"] for part in found)


class Opening(ByText):
    """Opens images, as real models do."""

    def encode(self, items, **kwargs):
        from PIL import Image

        for item in items:
            if "image" in item:
                with Image.open(item["image"]) as opened:
                    opened.load()
        return super().encode(items, **kwargs)


def evaluate_torn(rank, root, cache, fail):
    encoding._BATCHES_A_CHUNK = 1
    with pytest.raises(ValueError, match=r"row \d: .*4\.png"):
        MMEBEvaluator(root, batch_size=2)(Opening())
    return {"failed": torch.ones(1)}


def test_the_trainers_own_sharing_is_left_alone(tmp_path, monkeypatch):
    """Rank 0 evaluates alone then, and `encode` reaches the others: no collective of ours may wait for them."""
    write_task(tmp_path, "VOC2007", TASKS["VOC2007"])
    monkeypatch.setattr(encoding, "world_size", lambda: 2)
    monkeypatch.setattr(encoding, "rank", lambda: 0)

    def never(_):
        raise AssertionError("a collective")

    monkeypatch.setattr(encoding, "gather_objects", never)
    model = ByText()
    model._distributed_inference = object()
    metrics = MMEBEvaluator(tmp_path)(model)
    assert len(model.encoded) == 7
    assert metrics["MMEB_tasks"] == 1
    del model._distributed_inference
    with pytest.raises(AssertionError, match="a collective"):
        MMEBEvaluator(tmp_path)(model)


def test_a_thousand_rows_of_a_thousand_candidates_stay_small(tmp_path):
    """Held as indices: a tenth of a gigabyte of Python objects would be a few bytes a candidate too many."""
    import tracemalloc

    import pyarrow as pa
    import pyarrow.parquet as pq

    from unime_st.data.mmeb.eval_rows import read_eval_task

    texts = [f"label number {number}" for number in range(1000)]
    rng = np.random.default_rng(0)
    rows = [[texts[place] for place in rng.permutation(1000)] for _ in range(300)]
    table = {"qry_text": [f"query {n}" for n in range(300)], "qry_img_path": [""] * 300, "tgt_text": rows}
    (tmp_path / "Labels").mkdir()
    pq.write_table(pa.table(table), tmp_path / "Labels" / "test-0.parquet")
    tracemalloc.start()
    task = read_eval_task(tmp_path, "Labels")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task.items) == 1300
    assert len(task.candidates) == 300_000
    assert kept < 16 * len(task.candidates)
    assert [task.items[item]["text"] for item in task.own(7)] == rows[7]
