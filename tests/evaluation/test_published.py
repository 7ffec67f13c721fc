import pytest

from unime_st.evaluation import published_results, published_task_scores
from unime_st.evaluation.mmeb.tasks import META_TASKS
from unime_st.evaluation.mmeb.v2 import V2_META_TASKS

TASKS = {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4}
ROWS = published_results("mmeb")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_the_overall_is_the_average_it_is_said_to_be(row):
    means = {
        "mean_of_tasks": sum(row[meta] * count for meta, count in TASKS.items()) / 36,
        "mean_of_meta_tasks": sum(row[meta] for meta in TASKS) / 4,
    }
    assert row["overall"] == pytest.approx(means[row["average"]], abs=0.11)  # each is rounded to one place
    other = next(value for kind, value in means.items() if kind != row["average"])
    assert abs(row["overall"] - other) > 1
    assert (20 * row["in_distribution"] + 16 * row["out_of_distribution"]) / 36 == pytest.approx(
        means["mean_of_tasks"], abs=0.12
    )


def test_rows_name_their_source():
    for benchmark in ("mmeb", "retrieval", "sugarcrepe"):
        rows = published_results(benchmark)
        assert len({row["model"] for row in rows}) == len(rows) > 5
        assert all(row["source"].startswith("arXiv") for row in rows)


def test_the_means_of_the_groups_are_the_papers():
    means = {row["model"]: (row["Replace"] + row["Swap"] + row["Add"]) / 3 for row in published_results("sugarcrepe")}
    assert means["UniME Phi3.5-V"] == pytest.approx(84.8, abs=0.05)  # "1 + 2" in the ablation of the stages


def test_scores_by_task_average_to_the_published_scores():
    by_model = published_task_scores()
    images = {model: [scores[task] for task in scores if task in META_TASKS] for model, scores in by_model.items()}
    assert {len(own) for own in images.values()} == {36}
    assert {len(scores) for scores in by_model.values()} == {79}
    for model, printed in {"VLM2Vec-V2.0-Qwen2VL-2B": 64.9, "gme-Qwen2-VL-2B-Instruct": 51.9}.items():
        assert 100 * sum(images[model]) / 36 == pytest.approx(printed, abs=0.06)
    whole = {row["model"]: row for row in published_results("mmeb_v2")}
    pairs = (("VLM2Vec-V2.0-Qwen2VL-2B", "VLM2Vec-V2 2B"), ("gme-Qwen2-VL-2B-Instruct", "GME 2B"))
    for model, name in pairs:  # printed from the same data: pages mended, MomentSeeker of 1,602 rows
        tasks = list(V2_META_TASKS)
        for part, own in {"image": tasks[:36], "video": tasks[36:54], "visdoc": tasks[54:], "overall": tasks}.items():
            mean = 100 * sum(by_model[model][task] for task in own) / len(own)
            assert whole[name][part] == pytest.approx(mean, abs=0.65), (name, part)
    with pytest.raises(KeyError, match="No scores by task"):
        published_task_scores("mine")


def test_rows_of_mmeb_v2_average_to_what_they_say():
    """Means of modalities from those of groups, and the overall one from all, to a rounded place."""
    sizes = {group: list(V2_META_TASKS.values()).count(group) for group in V2_META_TASKS.values()}
    parts = dict(zip(("image", "video", "visdoc"), (list(sizes)[:4], list(sizes)[4:8], list(sizes)[8:]), strict=True))
    rows = published_results("mmeb_v2")
    checked = 0
    for row in rows:
        whole = (36 * row["image"] + 18 * row["video"] + 24 * row["visdoc"]) / 78
        assert row["overall"] == pytest.approx(whole, abs=0.26), row["model"]
        for part, groups in parts.items():
            if all(group in row for group in groups):
                mean = sum(sizes[group] * row[group] for group in groups) / sum(sizes[group] for group in groups)
                assert row[part] == pytest.approx(mean, abs=0.36), (row["model"], part)
                checked += 1
    assert checked == 15
    assert len({row["model"] for row in rows}) == len(rows) == 15
