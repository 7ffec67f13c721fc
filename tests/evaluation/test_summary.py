"""Reports of evaluations: what stands beside what, and the mistakes shown."""

import numpy as np
import pytest
from evaluation_fakes import TableModel
from test_mmeb import write_task

from unime_st.evaluation import EmbeddingCache, MMEBEvaluator, Report, published_results
from unime_st.evaluation.mmeb_tasks import META_TASKS
from unime_st.evaluation.summary import add_mmeb, worst_mistakes


def sections(report):
    return {section.title: section.data for section in report.sections}


def test_all_tasks_bring_the_published_rows(tmp_path):
    for task in META_TASKS:
        write_task(tmp_path, task, [(1, [1, 3]), (1, [3, 1])])
    evaluator = MMEBEvaluator(tmp_path)
    report = Report("x")
    add_mmeb(report, evaluator, evaluator(TableModel(np.eye(6))), model="mine", published="gme-Qwen2-VL-2B-Instruct")
    parts = sections(report)
    averages = parts["MMEB: averages"]
    assert averages["rows"][0] == ["mine", *[50.0] * 8]
    rows = {row[0]: dict(zip(averages["columns"], row, strict=True)) for row in averages["rows"]}
    assert set(rows) == {"mine", *(row["model"] for row in published_results("mmeb"))}
    assert (rows["UniME LLaVA-1.6"]["mean of meta-tasks"], rows["UniME LLaVA-1.6"]["mean of tasks"]) == (66.6, None)
    assert (rows["UniME LLaVA-OV-7B"]["mean of meta-tasks"], rows["UniME LLaVA-OV-7B"]["mean of tasks"]) == (None, 70.7)
    drawn = parts["MMEB: by task, drawn"]["series"]
    assert set(drawn) == {"mine", "gme-Qwen2-VL-2B-Instruct"}
    assert len(drawn["mine"]) == 36
    heat = parts["MMEB: averages, drawn"]
    assert heat["values"][0] == [50.0] * 8
    assert report.write(tmp_path / "out").is_file()
    mistakes = parts["MMEB: the worst mistakes"]["entries"]
    assert len(mistakes) == 8
    assert all(entry["rank"] == 2 for entry in mistakes)


def test_the_worst_come_first_and_from_each_task(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [1, 3]), (1, [5, 3, 1, 7]), (1, [3, 1])])
    write_task(tmp_path, "CIRR", [(1, [3, 1])])
    evaluator = MMEBEvaluator(tmp_path)
    table = np.eye(8) + 0.01 * np.arange(8)[None]
    evaluator(TableModel(table))
    ranks = [entry["rank"] for entry in worst_mistakes(evaluator, most=3)]
    assert len(ranks) == 3
    assert ranks[0] == max(evaluator.results["VOC2007"].rank) > 1
    with pytest.raises(KeyError, match="No scores by task"):
        add_mmeb(Report("x"), evaluator, {}, published="nobody")


def test_the_resolution_decides_the_pixels_and_the_cache(tmp_path):
    class Sizes(TableModel):
        seen = ()

        def encode(self, items, **kwargs):
            self.seen += tuple(item["image"].size for item in items if not isinstance(item.get("image", ""), str))
            return super().encode(items, **kwargs)

    write_task(tmp_path / "bench", "VOC2007", [(2, [1, 3]), (4, [2, 3])])
    cache = EmbeddingCache(tmp_path / "cache")
    for policy, sizes in (({"image_size": 3}, {(3, 3)}), ({"max_pixels": 16}, {(4, 4)}), ({}, set())):
        model = Sizes(np.eye(6))
        evaluator = MMEBEvaluator(tmp_path / "bench", cache_dir=cache, **policy)
        evaluator(model)
        assert set(model.seen) == sizes
        assert len(model.encoded) == 4  # another resolution's embeddings are not taken
        assert {key: evaluator.get_config_dict()[key] for key in policy} == policy
        again = Sizes(np.eye(6))
        evaluator(again)
        assert not again.encoded
    assert [info.settings for info in cache.info()].count({"image_size": 3}) == 1
    with pytest.raises(ValueError, match="not both"):
        MMEBEvaluator(tmp_path / "bench", image_size=3, max_pixels=9)
    (tmp_path / "bench" / "images" / "pictures" / "4.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"VOC2007, row 1: .*4\.png"):
        MMEBEvaluator(tmp_path / "bench", image_size=3)(Sizes(np.eye(6)))
