"""Reports of evaluations: what stands beside what, and the mistakes shown."""

import numpy as np
import pytest
from evaluation_fakes import HashModel, TableModel
from test_mmeb import write_task

from unime_st.evaluation import EmbeddingCache, ImageTextRetrievalEvaluator, MMEBEvaluator, Report, published_results
from unime_st.evaluation.mmeb.tasks import META_TASKS
from unime_st.evaluation.report.summary import add_mmeb, add_retrieval, worst_mistakes


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


def test_mistakes_are_shown_of_every_meta_task(tmp_path):
    names = [f"task{number:02d}" for number in range(20)]
    for name in names:
        write_task(tmp_path, name, [(1, [3, 1])])
    table = np.eye(8) + 0.01 * np.arange(8)[None]

    def shown(metas):
        evaluator = MMEBEvaluator(tmp_path, names, meta_tasks=dict(zip(names, metas, strict=True)))
        evaluator(TableModel(table))
        asked = []
        plain = evaluator.top
        evaluator.top = lambda task, *given, **options: asked.append(task) or plain(task, *given, **options)
        assert len(worst_mistakes(evaluator)) == len(asked)
        return [names.index(task) for task in asked]

    assert shown("a" * 10 + "b" * 10) == [0, 10, 1, 11, 2, 12, 3, 13]
    assert shown("a" * 9 + "bcdefghijkl") == [0, *range(9, 20)]  # twelve


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


def test_right_answers_that_were_not_found_come_after_the_found_ones_with_their_rank(tmp_path):
    order = [3, 5, 7, 9, 11, 1]  # by nearness to 1, the right one last
    table = np.zeros((12, 3))
    table[1] = (1, 0, 0)
    for place, number in enumerate([*order[:5], 0]):
        table[number] = (1, 0.1 * place, 0)
    table[1] = (1, -0.9, 0)
    write_task(tmp_path, "VOC2007", [(3, [1, *order[:5]]), (3, [3, 5, 7, 9, 11, 1]), (3, [7, 3, 5, 9, 11, 1])])
    evaluator = MMEBEvaluator(tmp_path)
    evaluator(TableModel(table))
    far, first, near = evaluator.top("VOC2007", 4, with_right=True)
    assert (far["rank"], first["rank"], near["rank"]) == (6, 1, 3)
    assert far["results"][4:] == [{"text": "find #1", "right": True, "rank": 6}]
    assert [len(entry["results"]) for entry in (first, near)] == [4, 4]
    assert not any("rank" in result for entry in (first, near) for result in entry["results"])
    assert all(len(entry["results"]) == 4 for entry in evaluator.top("VOC2007", 4))


@pytest.mark.parametrize("seed", range(5))
def test_of_several_right_captions_the_best_is_shown_with_its_rank(seed):
    rng = np.random.default_rng(seed)
    vectors = {f"caption {number}": rng.normal(size=6) for number in range(60)}

    class Model(HashModel):
        def vector(self, item, prompt=""):
            return (
                vectors[item["text"]]
                if isinstance(item, dict)
                else np.random.default_rng(int(item.flat[0])).normal(size=6)
            )

    images = [np.full((2, 2, 3), number, dtype=np.uint8) for number in range(20)]
    captions = [[f"caption {3 * number + c}" for c in range(3)] for number in range(20)]
    evaluator = ImageTextRetrievalEvaluator(images, captions)
    model = Model()
    evaluator(model)
    far = 0
    for number, entry in enumerate(evaluator.top(5, "image_to_text", with_right=True)):
        query = model.encode([images[number]])[0]
        unit = {text: (row := model.encode([{"text": text}])[0]) / np.linalg.norm(row) for text in vectors}
        order = sorted(vectors, key=lambda text: -float(unit[text] @ query))
        best = min(captions[number], key=order.index)
        if order.index(best) >= 5:
            far += 1
            assert entry["results"][5:] == [{"text": best, "right": True, "rank": order.index(best) + 1}]
        else:
            assert len(entry["results"]) == 5
    assert far
    report = Report("x")
    add_retrieval(report, evaluator, evaluator(model))
    entries = report.sections[-1].data["entries"]
    assert all(any(result["right"] for result in entry["results"]) for entry in entries)
    assert any("rank" in result for entry in entries for result in entry["results"])
