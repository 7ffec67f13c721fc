"""A listwise reranker in the evaluators: against plain sorting, each list once, in the encoder's order; the cache."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_fakes import TableModel, numbered_picture
from test_mmeb_oracle import TABLE, ExactModel, random_task
from test_reranking import ByLook, ByNumber, Reranker, expected, small

from tiny import picture, tiny_backbone
from two_processes import run_two
from unime_st import ListwiseReranker, build_reranker
from unime_st.data.judging.scorer import ListScorer
from unime_st.evaluation import ImageTextRetrievalEvaluator, MMEBEvaluator, SugarCrepeEvaluator, read_settings
from unime_st.evaluation import reranking as reranking_module
from unime_st.evaluation.reranking import Reranking
from unime_st.rerank_prompts import LIST_PROMPTS


class Lists:
    """A listwise reranker whose scores are a pairwise one's, few levels, over their sum; counts what it is asked."""

    def __init__(self, levels=3, *, replaces="all", max_candidates=10, spoiled=False, kind=Reranker):
        self.model = kind(levels)
        self.replaces, self.max_candidates, self.spoiled, self.asked = replaces, max_candidates, spoiled, []

    def predict_lists(self, lists, *, batch_size):
        self.asked += [json.dumps([str(query), *map(str, candidates)]) for query, candidates in lists]
        found = [np.array([self.model.score((query, one)) for one in candidates]) for query, candidates in lists]
        if self.spoiled and found:
            found[-1][0] = np.nan
        return found


@pytest.mark.parametrize("replaces", ["all", "first"])
@pytest.mark.parametrize("shared", [False, True])
def test_mmeb_against_plain_sorting(replaces, shared):
    rng = np.random.default_rng(int(shared))
    compared = changed = 0
    for trial in range(100):
        spec, task = random_task(rng, "task", "ndcg@5", shared=shared)
        reranker, depth = Lists(int(rng.integers(1, 5)), replaces=replaces), int(rng.integers(2, 8))
        evaluator = MMEBEvaluator(None, [spec], on_error="report", reranker=reranker, rerank_depth=depth)
        metrics = evaluator(ExactModel(TABLE))
        assert len(set(reranker.asked)) == len(reranker.asked), "a list was asked for twice"
        before, after = evaluator.results["task"], evaluator.reranked_results["task"]
        if replaces == "all":
            wanted = expected(task, "ndcg@5", reranker.model, depth)
            for number, row in enumerate(wanted):
                if row is not None:
                    found = bool(after.right[number]), int(after.rank[number]), float(after.scores[number])
                    assert found == (row[0], row[1], pytest.approx(row[2], abs=1e-12)), (trial, number)
        for number, (top, own) in enumerate(zip(after.top, before.top, strict=True)):
            if depth <= len(own):
                assert sorted(top.tolist()) == sorted(own.tolist())
            if depth <= len(own) and replaces == "first" and before.rank[number]:
                rest = [place for place in own.tolist() if place != top[0]]
                assert top.tolist()[1:] == rest, "only the first place is replaced"
            compared += 1
            changed += top[0] != own[0]
        asked = [json.loads(one) for one in reranker.asked]
        assert metrics["MMEB_rerank_pairs"] == sum(len(one) - 1 for one in asked)
        assert all(len(one) - 1 <= depth for one in asked)
    assert compared > 150
    assert changed > 20


def test_lists_are_in_the_encoders_order_and_sugarcrepes_too():
    reranker = Lists()
    table = np.eye(4, dtype=np.float32)[[0, 0, 1, 0]] + 0.1
    rows = [(numbered_picture(0), "a #1", "b #2"), (numbered_picture(0), "c #2", "d #1"),
            (numbered_picture(0), "e #1", "f #3"), (numbered_picture(0), "g #2", "h #2")]  # fmt: skip
    SugarCrepeEvaluator({"set": rows}, reranker=reranker)(TableModel(table))
    texts = [[str(part) for part in json.loads(asked)[1:]] for asked in reranker.asked]
    # the nearer first; where both are as near, the wrong one, so that a model of a fixed answer is wrong
    assert [[next(name for name in "abcdefgh" if f"{name} #" in text) for text in own] for own in texts] == [
        ["a", "b"], ["d", "c"], ["f", "e"], ["h", "g"],
    ]  # fmt: skip


def test_sugarcrepe_by_a_listwise_reranker():
    given = {"a": 0.2, "b": 0.9, "c": 0.7, "d": 0.1}

    class Told(Lists):
        def predict_lists(self, lists, *, batch_size):
            return [np.array([given[one["text"][0]] for one in candidates]) for _, candidates in lists]

    image = numbered_picture(0)
    rows = [(image, "a #1", "b #2"), (image, "c #3", "d #2")]
    table = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]] + 0.1
    for replaces in ("first", "all"):
        evaluator = SugarCrepeEvaluator({"set": rows}, reranker=Told(replaces=replaces))
        evaluator(TableModel(table))
        assert evaluator.scores["set"].right.tolist() == [True, False]
        assert evaluator.reranked_scores["set"].right.tolist() == [False, True]


def test_scores_are_kept_and_a_killed_run_goes_on_whatever_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(reranking_module, "_BATCHES_A_CHUNK", 1)

    class Dies(Lists):
        def predict_lists(self, lists, **options):
            if len(self.asked) >= 5:
                raise KeyboardInterrupt
            return super().predict_lists(lists, **options)

    model, plain = small(reranker=Lists(kind=ByNumber), rerank_depth=4, batch_size=4)
    expected_metrics = plain(model)
    _, evaluator = small(reranker=Dies(kind=ByNumber), rerank_depth=4, batch_size=4, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluator(model)
    again = Lists(kind=ByNumber)
    _, evaluator = small(reranker=again, rerank_depth=4, batch_size=4, cache_dir=tmp_path)
    found = evaluator(model)
    assert len(again.asked) == len(plain.reranker.asked) - 5
    assert {**found, "small_rerank_seconds": 0} == {**expected_metrics, "small_rerank_seconds": 0}
    first = Lists(replaces="first", kind=ByNumber)
    small(reranker=first, rerank_depth=4, batch_size=4, cache_dir=tmp_path)[1](model)
    assert not first.asked, "the same scores, put to another use"
    other = Lists(kind=ByNumber)
    small(reranker=other, rerank_depth=3, batch_size=4, cache_dir=tmp_path)[1](model)
    assert other.asked, "shorter lists are other questions"


def share(rank):
    reranking_module._BATCHES_A_CHUNK = 1
    reranker = Lists(kind=ByNumber)
    model, evaluator = small(reranker=reranker, rerank_depth=4, batch_size=4)
    metrics = evaluator(model)
    metrics.pop("small_rerank_seconds")
    told = torch.tensor(list(metrics.values()), dtype=torch.float64)
    return {"metrics": told, "asked": torch.tensor([len(reranker.asked)])}


def test_two_processes_share_the_lists(tmp_path):
    first, second = run_two(share, tmp_path)
    model, evaluator = small(reranker=Lists(kind=ByNumber), rerank_depth=4, batch_size=4)
    alone = evaluator(model)
    alone.pop("small_rerank_seconds")
    assert first["metrics"].tolist() == second["metrics"].tolist() == list(alone.values())
    assert min(int(first["asked"]), int(second["asked"])) > 0
    assert int(first["asked"]) + int(second["asked"]) == len(evaluator.reranker.asked)


def test_what_is_refused_is_named():
    with pytest.raises(ValueError, match=r"rerank_depth=10.*`max_candidates=5`"):
        small(reranker=Lists(max_candidates=5))
    model, evaluator = small(reranker=Lists(spoiled=True), rerank_depth=4)
    with pytest.raises(ValueError, match=r"against .*: Lists gave the scores \[nan, .*one finite number each"):
        evaluator(model)


def test_a_real_one_is_named_in_settings_and_ranks_by_its_scores(tmp_path):
    model = build_reranker(tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No"]), device="cpu")
    images = [picture(colour) for colour in ("red", "green", "white", "black")]
    captions = [["a red bus"], ["a boat"], ["snow", "a #1"], ["night"]]
    tops = {}
    for replaces in ("first", "all"):
        listwise = ListwiseReranker(model, replaces=replaces, max_candidates=3)
        assert isinstance(listwise, ListScorer)
        evaluator = ImageTextRetrievalEvaluator(
            images, captions, ks=(1,), reranker=listwise, rerank_depth=3, cache_dir=tmp_path / "cache"
        )
        (tmp_path / replaces).mkdir()
        evaluator(ByLook(), output_path=str(tmp_path / replaces))
        tops[replaces] = evaluator.reranked_rankings["text_to_image"].top
        own = evaluator.rankings["text_to_image"].top
        for number, caption in enumerate(text for own_texts in captions for text in own_texts):
            scores = listwise.predict_lists([({"text": caption}, [images[place] for place in own[number, :3]])])[0]
            order = own[number, :3][np.argsort(-scores, kind="stable")]
            assert tops[replaces][number, 0] == order[0]
            if replaces == "all":
                assert tops[replaces][number, :3].tolist() == order.tolist()
        (rows,) = (tmp_path / replaces).glob("*reranked*rows.parquet")
        settings = read_settings(rows)
        told = "first place alone" if replaces == "first" else "all places"
        assert settings["reranker"].endswith(f"(listwise, {told})")
        assert len(settings["reranker_weights"]) == 64
    assert (tops["first"][:, 0] == tops["all"][:, 0]).all()
    assert (tops["first"] != tops["all"]).any()


def test_the_same_candidates_in_another_order_are_another_question():
    class ByPlace(Lists):
        def predict_lists(self, lists, *, batch_size):
            super().predict_lists(lists, batch_size=batch_size)
            return [np.array([len(one) for one in candidates]) / (1 + np.arange(len(candidates)))
                    for _, candidates in lists]  # fmt: skip

    reranker = ByPlace()
    reranking = Reranking(reranker)
    found = reranking.scores(["q", "a", "boats"], np.zeros(3, int), np.array([[1, 2], [2, 1], [1, 2]]), lambda *_: "")
    assert found.tolist() == [[1, 2.5], [5, 0.5], [1, 2.5]]
    assert len(reranker.asked) == 2


def test_scores_of_other_words_are_not_taken_from_the_cache(tmp_path):
    """Those around the answer stand in no template."""
    model = build_reranker(tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No"]), device="cpu")
    words = LIST_PROMPTS["unime_v2"]
    for prompt in (words, replace(words, answer="Best: [{n}]"), replace(words, number="{n}. "), words):
        listwise = ListwiseReranker(model, prompt=prompt, replaces="all")
        reranking = Reranking(listwise, cache=tmp_path / "cache")
        found = reranking.scores(["q", "a bus", "a boat"], np.array([0]), np.array([[1, 2]]), lambda *_: "")
        np.testing.assert_allclose(found, listwise.predict_lists([("q", ["a bus", "a boat"])]), rtol=1e-4)
