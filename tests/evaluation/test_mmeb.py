import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import TableModel, cosines, numbered_picture

from unime_st.embedding import distinct as encoding
from unime_st.evaluation import MMEBEvaluator
from unime_st.evaluation.mmeb import inputs as mmeb_inputs
from unime_st.evaluation.mmeb.tasks import IN_DISTRIBUTION, META_TASKS

PLACEHOLDER = "<|image_1|>"


def side(number):
    """Text and image of an input that [`TableModel`] knows as `number`: the even ones have an image."""
    return (f"{PLACEHOLDER}\nlook", f"pictures/{number}.png") if number % 2 == 0 else (f"find #{number}", "")


def write_task(root, task, rows):
    """Write rows of (query, [right, wrong ...]) in MMEB's layout."""
    table = []
    for query, candidates in rows:
        text, image = side(query)
        texts, images = zip(*map(side, candidates), strict=True)
        table.append({"qry_text": text, "qry_img_path": image, "tgt_text": list(texts), "tgt_img_path": list(images)})
        for number in (query, *candidates):
            if number % 2 == 0:
                numbered_picture(number, root / "images" / "pictures" / f"{number}.png")
    (root / task).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), root / task / "test-00000-of-00001.parquet")


def random_rows(rng, numbers=40):
    return [
        (int(rng.integers(numbers)), rng.integers(numbers, size=rng.integers(1, 9)).tolist())
        for _ in range(rng.integers(1, 12))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_precision_against_a_plain_loop(tmp_path, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(40, 4)).astype(np.float32)
    table[25:] = table[rng.integers(25, size=15)]  # ties
    cosine = cosines(table)
    tasks = {task: random_rows(rng) for task in ("VOC2007", "ImageNet-A", "ChartQA", "Mine")}
    for task, rows in tasks.items():
        write_task(tmp_path, task, rows)
    evaluator = MMEBEvaluator(tmp_path)
    assert evaluator.tasks == ["VOC2007", "ImageNet-A", "ChartQA", "Mine"]
    model = TableModel(table)
    metrics = evaluator(model)

    score = {}
    for task, rows in tasks.items():
        right = ties = 0
        for query, candidates in rows:
            scores = [cosine[query][candidate] for candidate in candidates]
            won = scores[0] >= max(scores) - 1e-7
            right += won
            ties += won and any(
                value >= scores[0] - 1e-7 and other != candidates[0]
                for value, other in zip(scores, candidates, strict=True)
            )
        score[task] = right / len(rows)
        assert metrics[f"MMEB_{task}_precision@1"] == pytest.approx(score[task])
        assert metrics[f"MMEB_{task}_ties"] == ties
    metas = [(score["VOC2007"] + score["ImageNet-A"]) / 2, score["ChartQA"]]
    assert metrics["MMEB_meta_Classification_precision@1"] == pytest.approx(metas[0])
    assert metrics["MMEB_meta_VQA_precision@1"] == pytest.approx(metas[1])
    assert metrics["MMEB_meta_mean_precision@1"] == pytest.approx(np.mean(metas))
    assert metrics["MMEB_mean_precision@1"] == pytest.approx(np.mean(list(score.values())))
    assert metrics["MMEB_in_distribution_precision@1"] == pytest.approx((score["VOC2007"] + score["ChartQA"]) / 2)
    assert metrics["MMEB_out_of_distribution_precision@1"] == pytest.approx(score["ImageNet-A"])
    assert evaluator.primary_metric == "MMEB_mean_precision@1"
    used = {number for rows in tasks.values() for query, own in rows for number in (query, *own)}
    assert len(model.encoded) == len(used)  # over all tasks, with no cache on disk


def test_defect_6_both_overalls_are_told_apart(tmp_path):
    """The published table prints the mean of the meta-tasks in the column where others have that of the tasks."""
    for task in ("VOC2007", "SUN397", "N24News"):
        write_task(tmp_path, task, [(1, [1, 3])])
    write_task(tmp_path, "ChartQA", [(1, [3, 1])])
    metrics = MMEBEvaluator(tmp_path)(TableModel(np.eye(4)))
    assert metrics["MMEB_mean_precision@1"] == 3 / 4
    assert metrics["MMEB_meta_mean_precision@1"] == 1 / 2


def test_the_published_tasks():
    assert len(META_TASKS) == 36
    assert len(IN_DISTRIBUTION) == 20
    counts = [list(META_TASKS.values()).count(meta) for meta in ("Classification", "VQA", "Retrieval", "Grounding")]
    assert counts == [10, 10, 12, 4]


def test_own_meta_tasks_files_and_cache(tmp_path):
    write_task(tmp_path / "bench", "Emoji_t2i", [(1, [1, 3]), (3, [2, 3])])
    write_task(tmp_path / "bench", "Emoji_i2t", [(2, [2, 5])])
    meta = {"Emoji_t2i": "Retrieval", "Emoji_i2t": "Retrieval"}
    table = np.eye(8)
    model = TableModel(table)
    arguments = {"meta_tasks": meta, "name": "emoji", "cache_dir": tmp_path / "cache"}
    metrics = MMEBEvaluator(tmp_path / "bench", **arguments)(model, output_path=str(tmp_path / "out"), epoch=1, steps=5)
    assert metrics["emoji_meta_Retrieval_precision@1"] == 0.75
    assert "emoji_in_distribution_precision@1" not in metrics
    assert json.loads((tmp_path / "out" / "emoji_results.json").read_text()) == metrics
    encoded = len(model.encoded)
    again = MMEBEvaluator(tmp_path / "bench", ["Emoji_i2t"], limit=1, **arguments)
    again(model)
    assert len(model.encoded) == encoded
    assert again.results["Emoji_i2t"].top[0].tolist() == [0, 1, -1, -1, -1]


def test_a_model_with_one_embedding_is_seen_by_its_ties(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [3, 5]), (5, [7, 9])])
    metrics = MMEBEvaluator(tmp_path)(TableModel(np.ones((10, 3))))
    assert metrics["MMEB_VOC2007_precision@1"] == 1  # as published: the first of equal scores wins
    assert metrics["MMEB_VOC2007_ties"] == 2


def test_copies_of_the_right_answer_are_no_tie(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [1, 1, 3])])
    metrics = MMEBEvaluator(tmp_path)(TableModel(np.eye(4)))
    assert (metrics["MMEB_VOC2007_precision@1"], metrics["MMEB_VOC2007_ties"]) == (1, 0)


def drawn(count, seed):
    return np.random.default_rng(seed).choice(count, 1, replace=False).tolist()


def test_a_sample_is_the_same_each_time_and_not_the_first_rows(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [1, 3])] * 50)
    evaluators = [MMEBEvaluator(tmp_path, limit=10, seed=seed) for seed in (0, 0, 1)]
    for evaluator in evaluators:
        assert evaluator(TableModel(np.eye(4)))["MMEB_VOC2007_precision@1"] == 1
    first, again, other = [evaluator.results["VOC2007"].rows.tolist() for evaluator in evaluators]
    assert first == again != other
    assert len(set(first)) == 10
    assert first != list(range(10))


def test_gallery_entries(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [3, 5, 1, 3]), (1, [1, 2])])
    evaluator = MMEBEvaluator(tmp_path)
    with pytest.raises(ValueError, match="Evaluate a model first"):
        evaluator.top("VOC2007")
    evaluator(TableModel(np.eye(6) + 0.01 * np.eye(6)[::-1]))
    first, second = evaluator.top("VOC2007", 2)
    assert first["query"] == {"text": "find #1"}
    assert first["rank"] == 2
    assert first["results"] == [{"text": "find #1", "right": False}, {"text": "find #3", "right": True}]
    assert second["rank"] == 1
    assert second["results"][1]["image"].endswith("2.png")
    assert evaluator.top("VOC2007", places=[1]) == [evaluator.top("VOC2007")[1]]


def test_unreadable_images_raise_or_count_as_wrong(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [1, 2]), (1, [1, 3]), (1, [1, 4])])
    write_task(tmp_path, "SUN397", [(1, [1, 3])])
    (tmp_path / "images" / "pictures" / "2.png").unlink()
    (tmp_path / "images" / "pictures" / "4.png").write_bytes(b"torn")
    model = TableModel(np.eye(5))
    with pytest.raises(ValueError, match=r"VOC2007, row 0: .*2\.png"):
        MMEBEvaluator(tmp_path, ["VOC2007"])(model)
    torn = MMEBEvaluator(tmp_path, ["VOC2007"], limit=1, seed=next(s for s in range(99) if drawn(3, s) == [2]))
    with pytest.raises(ValueError, match=r"VOC2007, row 2: .*4\.png"):
        torn(model)
    evaluator = MMEBEvaluator(tmp_path, ["VOC2007", "SUN397", "CIRR"], on_error="report")
    metrics = evaluator(model)
    assert metrics["MMEB_VOC2007_precision@1"] == pytest.approx(1 / 3)
    assert metrics["MMEB_unreadable_rows"] == 2
    assert metrics["MMEB_mean_precision@1"] == pytest.approx((1 / 3 + 1) / 2)  # CIRR is missing, and said to be
    assert sorted(evaluator.errors) == ["CIRR", "VOC2007"]
    assert any("2.png" in message for message in evaluator.errors["VOC2007"])
    assert "CIRR" in evaluator.errors["CIRR"][0]
    with pytest.raises(FileNotFoundError, match="CIRR"):
        MMEBEvaluator(tmp_path, ["CIRR"])(model)
    with pytest.raises(ValueError, match="None of the tasks"):
        MMEBEvaluator(tmp_path, ["CIRR"], on_error="report")(model)


def test_broken_rows_name_task_and_row_and_are_never_right(tmp_path):
    good = {"qry_text": "find #1", "qry_img_path": "", "tgt_text": ["find #1", "find #3"], "tgt_img_path": ["", ""]}
    outside = {**good, "tgt_img_path": ["", "../secret.png"]}
    empty = {**good, "tgt_text": [], "tgt_img_path": []}
    for task, bad in (("VOC2007", outside), ("CIRR", empty)):
        (tmp_path / task).mkdir()
        pq.write_table(pa.Table.from_pylist([good, good, bad]), tmp_path / task / "test-0.parquet")
        with pytest.raises(ValueError, match=f"{task}, row 2"):
            MMEBEvaluator(tmp_path, [task])(TableModel(np.eye(4)))
    (tmp_path / "NIGHTS").mkdir()
    (tmp_path / "NIGHTS" / "test-0.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="NIGHTS"):
        MMEBEvaluator(tmp_path, ["NIGHTS"])(TableModel(np.eye(4)))
    evaluator = MMEBEvaluator(tmp_path, on_error="report")
    metrics = evaluator(TableModel(np.eye(4)))
    assert metrics["MMEB_VOC2007_precision@1"] == pytest.approx(2 / 3)
    assert metrics["MMEB_CIRR_precision@1"] == pytest.approx(2 / 3)
    assert (metrics["MMEB_unreadable_rows"], metrics["MMEB_tasks"]) == (2, 2)
    assert sorted(evaluator.errors) == ["CIRR", "NIGHTS", "VOC2007"]
    assert "row 2" in evaluator.errors["CIRR"][0]


def test_a_task_with_nothing_readable_scores_zero(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [2, 3]), (1, [2, 5])])
    (tmp_path / "images" / "pictures" / "2.png").unlink()
    metrics = MMEBEvaluator(tmp_path, on_error="report")(TableModel(np.eye(6)))
    assert metrics["MMEB_mean_precision@1"] == 0
    assert metrics["MMEB_unreadable_rows"] == 2


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCHES_A_CHUNK", 1)
    write_task(tmp_path / "bench", "VOC2007", [(1, [1, 3]), (5, [5, 7])])
    write_task(tmp_path / "bench", "CIRR", [(9, [9, 11])])
    arguments = {"cache_dir": tmp_path / "cache", "batch_size": 2}

    class Killed(TableModel):
        def encode(self, items, **kwargs):
            if len(self.encoded) >= 4:
                raise KeyboardInterrupt
            return super().encode(items, **kwargs)

    killed = Killed(np.eye(12))
    with pytest.raises(KeyboardInterrupt):
        MMEBEvaluator(tmp_path / "bench", **arguments)(killed)
    model = TableModel(np.eye(12))
    MMEBEvaluator(tmp_path / "bench", **arguments)(model)
    before, after = ([model.number(item) for item in kind.encoded] for kind in (killed, model))
    assert len(before) == 4
    assert sorted(before + after) == [1, 3, 5, 7, 9, 11]


def test_from_the_hub(tmp_path, monkeypatch):
    write_task(tmp_path / "fetched", "VOC2007", [(1, [1, 2])])
    (tmp_path / "fetched" / "images").rename(tmp_path / "unpacked")
    asked = []

    def fetch(name, **options):
        asked.append((name, options["repo_type"], options["allow_patterns"]))
        return str(tmp_path / "fetched")

    monkeypatch.setattr(mmeb_inputs, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="give the folder as `image_root`"):
        MMEBEvaluator("TIGER-Lab/MMEB-eval")
    evaluator = MMEBEvaluator("TIGER-Lab/MMEB-eval", image_root=tmp_path / "unpacked")
    assert asked == [("TIGER-Lab/MMEB-eval", "dataset", "*/test-*.parquet")]
    assert evaluator(TableModel(np.eye(4)))["MMEB_tasks"] == 1


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        MMEBEvaluator(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="No task"):
        MMEBEvaluator(tmp_path)
    write_task(tmp_path, "VOC2007", [(1, [1])])
    with pytest.raises(ValueError, match="'raise' or 'report'"):
        MMEBEvaluator(tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match="limit=0"):
        MMEBEvaluator(tmp_path, limit=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        MMEBEvaluator(tmp_path, batch_size=0)
