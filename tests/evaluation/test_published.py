import pytest

from unime_st.evaluation import published_results, published_task_scores
from unime_st.evaluation.mmeb.tasks import META_TASKS

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
    with pytest.raises(KeyError, match="No scores by task"):
        published_task_scores("mine")
