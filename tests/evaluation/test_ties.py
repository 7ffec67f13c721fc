"""Equal scores: what becomes of them is what the published evaluations do, and they are told of."""

import io
import logging
import math
from itertools import pairwise, permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import HashModel, TableModel
from test_mmeb import write_task

from unime_st.data.mmeb.eval_rows import EvalTask
from unime_st.evaluation import ImageTextRetrievalEvaluator, MMEBEvaluator, Report, SugarCrepeEvaluator, compare
from unime_st.evaluation.mmeb.tasks import MMEBTask
from unime_st.evaluation.outcomes import NOT_TOLD, TaskOutcomes, read_outcomes, told_of_ties, write_outcomes
from unime_st.evaluation.report.summary import add_mmeb, add_retrieval, add_sugarcrepe
from unime_st.evaluation.scoring import CandidateScores, rank_pool, score_candidates, unit_rows

PICTURE = np.zeros((2, 2, 3), dtype=np.uint8)


class Constant(HashModel):
    """A model that has collapsed: one embedding for all."""

    def vector(self, item, prompt=""):
        return np.ones(self.dim)


def axes(rng, count, dim=3):
    """Rows of few directions, whose cosines are 0 or 1 exactly: ties abound."""
    return np.eye(dim, dtype=np.float32)[rng.integers(dim, size=count)] * rng.integers(1, 3, size=(count, 1))


def pool_task(queries, corpus, metric="hit@1", gains=None):
    """A task whose queries, the first words, share a pool of other words; query i is to find the i-th of them."""
    items = [{"text": f"#{number}"} for number in (*queries, *corpus)]
    count = len(queries)
    task = EvalTask(
        items,
        np.arange(count),
        np.arange(count),
        np.arange(count, 2 * count),
        np.arange(count + 1),
        gains=gains,
        corpus=np.arange(count, count + len(corpus)),
    )
    return MMEBTask("pool", lambda on_error: task, metric=metric)


@pytest.mark.parametrize("seed", range(60))
def test_a_shared_pool_is_ranked_by_score_and_then_by_its_order(seed):
    """MMEB V2 sorts the negated scores and takes the first: here in plain Python, with a sort that keeps the order."""
    rng = np.random.default_rng(seed)
    vectors = axes(rng, 20)
    pool = rng.permutation(20)[: rng.integers(2, 15)]
    queries = rng.integers(20, size=6)
    relevant = [rng.permutation(pool)[: rng.integers(1, min(4, len(pool)) + 1)] for _ in queries]
    found = score_candidates(vectors, queries, relevant, pool=pool, k=5, chunk_size=4)
    for row, (query, own) in enumerate(zip(queries, relevant, strict=True)):
        cosine = [float((vectors[query] @ vectors[one]) > 0) for one in pool]
        order = sorted(range(len(pool)), key=lambda place: -cosine[place])
        is_right = [pool[place] in own for place in order]
        assert found.right[row] == is_right[0]
        assert found.rank[row] == 1 + is_right.index(True)
        assert found.best[row] == order[is_right.index(True)]
        level = {pool[place] in own for place in order if cosine[place] == cosine[order[0]]}
        assert found.tied[row] == (level == {True, False})
        dcg = sum(right / math.log2(place + 2) for place, right in enumerate(is_right[:5]))
        assert found.ndcg[row] == pytest.approx(dcg / sum(1 / math.log2(n + 2) for n in range(min(5, len(own)))))


@pytest.mark.parametrize("seed", range(60))
def test_own_candidates_are_ranked_as_argmax_does(seed):
    """MMEB V1: ``numpy.argmax`` over a row's candidates, right when it is 0."""
    rng = np.random.default_rng(seed)
    vectors = axes(rng, 20, dim=4)
    queries = rng.integers(20, size=6)
    own = [rng.permutation(20)[: rng.integers(1, 9)] for _ in queries]
    found = score_candidates(vectors, queries, own)
    for row, (query, candidates) in enumerate(zip(queries, own, strict=True)):
        cosine = [float((vectors[query] @ vectors[one]) > 0) for one in candidates]
        assert found.right[row] == (int(np.argmax(cosine)) == 0)
        assert found.tied[row] == (cosine[0] == max(cosine) and cosine.count(cosine[0]) > 1)


@pytest.mark.parametrize("metric", ["hit@1", "ndcg@5"])
def test_a_collapsed_model_has_the_score_of_the_pools_order(metric, caplog):
    queries, corpus = range(8), range(10, 30)
    evaluator = MMEBEvaluator(None, [pool_task(queries, corpus, metric)], meta_tasks={}, name="")
    metrics = evaluator(TableModel(np.ones((30, 3))))
    by_order = {"hit@1": 1 / 8, "ndcg@5": sum(1 / math.log2(place + 2) for place in range(5)) / 8}[metric]
    name = {"hit@1": "precision@1", "ndcg@5": "ndcg@5"}[metric]
    assert metrics[f"pool_{name}"] == pytest.approx(by_order)
    assert metrics["pool_ties"] == metrics["ties"] == 8
    assert evaluator.results["pool"].rank.tolist() == list(range(1, 9))
    (warned,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "pool (8 of 8; score" in warned
    assert "may have collapsed" in warned


def test_a_copy_of_the_right_answer_is_right_wherever_it_stands():
    vectors = np.eye(3, dtype=np.float32)
    found = score_candidates(vectors, [0], [np.array([0])], pool=np.array([1, 0, 2, 0]))
    assert (found.right.tolist(), found.tied.tolist(), found.top[0][:2].tolist()) == ([True], [False], [1, 3])


def test_among_own_candidates_a_tie_is_right_as_published_and_told(tmp_path, caplog):
    write_task(tmp_path, "VOC2007", [(1, [3, 5]), (5, [7, 9]), (7, [7, 9])])
    metrics = MMEBEvaluator(tmp_path)(TableModel(np.ones((10, 3))))
    assert metrics["MMEB_VOC2007_precision@1"] == 1.0
    assert "VOC2007 (3 of 3; score 100.0 %, 0.0 % without them)" in caplog.text


def test_captions_that_are_equally_near_are_wrong_and_told(caplog):
    sets = {"own": [(PICTURE, "a", "b"), (PICTURE, "c", "d")]}
    metrics = SugarCrepeEvaluator(sets)(Constant())
    assert (metrics["sugarcrepe_own_accuracy"], metrics["sugarcrepe_ties"]) == (0.0, 2)
    assert "own (2 of 2; score 0.0 %, 100.0 % were they right)" in caplog.text
    caplog.clear()
    assert SugarCrepeEvaluator(sets)(HashModel())["sugarcrepe_ties"] == 0
    assert not caplog.records


@pytest.mark.parametrize("seed", range(40))
def test_retrieval_counts_the_queries_that_another_order_would_make_right(seed):
    rng = np.random.default_rng(seed)
    pool, queries = axes(rng, int(rng.integers(2, 14))), axes(rng, 5)
    right = [rng.permutation(len(pool))[: rng.integers(1, 3)].tolist() for _ in queries]
    ranking = rank_pool(queries, pool, right)
    for row, own in enumerate(right):
        cosine = [float((queries[row] @ one) > 0) for one in pool]
        places = range(len(pool))
        lucky = sorted(places, key=lambda place: (-cosine[place], place not in own))
        unlucky = sorted(places, key=lambda place: (-cosine[place], place in own))
        for k in (1, 2, 5):
            at_best, at_worst = (bool(set(order[:k]) & set(own)) for order in (lucky, unlucky))
            assert (ranking.ranks[row] < k) == at_worst
            assert ranking.tied_at(k)[row] == (at_best and not at_worst)
        assert cosine[ranking.best[row]] == max(cosine[place] for place in own)
        assert ranking.best[row] in own


def test_a_collapsed_model_finds_no_image_and_is_told(caplog):
    images = [np.full((2, 2, 3), number, dtype=np.uint8) for number in range(8)]
    evaluator = ImageTextRetrievalEvaluator(images, [[f"t{number}"] for number in range(8)], ks=(1, 8), name="set")
    metrics = evaluator(Constant())
    assert metrics["set_text_to_image_recall@1"] == 0.0
    assert metrics["set_text_to_image_ties"] == 8
    assert "text_to_image (8 of 8" in caplog.text


def outcomes(ties, rows=100):
    return {"VQA": TaskOutcomes(np.arange(rows), np.ones(rows), np.arange(rows) < ties)}


def test_one_percent_is_not_told_of():
    assert told_of_ties(outcomes(0)) == told_of_ties(outcomes(1)) == ""
    assert "VQA (2 of 100; score 100.0 %, 98.0 % without them)" in told_of_ties(outcomes(2))
    many = {f"task {number}": own for number in range(8) for own in outcomes(5).values()}
    assert "and 3 more" in told_of_ties(many)


def test_reports_tell_of_ties(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [3, 5]), (5, [7, 9])])
    images = [np.full((2, 2, 3), number, dtype=np.uint8) for number in range(4)]
    retrieval = ImageTextRetrievalEvaluator(images, [[f"t{number}"] for number in range(4)], name="set")
    sugar = SugarCrepeEvaluator({"own": [(PICTURE, "a", "b")]})
    for model, collapsed in ((Constant(), True), (HashModel(), False)):
        report = Report("x")
        mmeb = MMEBEvaluator(tmp_path)
        add_mmeb(report, mmeb, mmeb(TableModel(np.ones((10, 3)) if collapsed else np.arange(30).reshape(10, 3) ** 2)))
        add_retrieval(report, retrieval, retrieval(model))
        add_sugarcrepe(report, sugar, sugar(model))
        told = [section.title for section in report.sections if "may have collapsed" in section.data.get("text", "")]
        assert told == (["MMEB: ties", "Retrieval: set: ties", "SugarCrepe: ties"] if collapsed else [])
        notes = " ".join(section.data.get("note", "") for section in report.sections)
        assert f"equally near: {int(collapsed)}." in notes
        assert f"equal score: {4 * collapsed} (text to image) and {4 * collapsed} (image to text)." in notes


def written_before(path, own):
    """Results by row as they were written without the rule for ties."""
    columns = {"task": ["VQA"] * len(own.rows), "row": own.rows, "score": own.scores, "tied": own.tied}
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    path.parent.mkdir()
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize(("ties", "told"), [(3, "may differ for that alone"), (0, "changes nothing")])
def test_comparing_with_results_of_another_rule_says_so(tmp_path, caplog, ties, told):
    before, after = tmp_path / "a" / "MMEB_results_rows.parquet", tmp_path / "b" / "MMEB_results_rows.parquet"
    written_before(before, outcomes(ties)["VQA"])
    write_outcomes(after, outcomes(0))
    assert read_outcomes(before)["VQA"].rule == NOT_TOLD
    assert read_outcomes(before)["VQA"].tied.sum() == ties
    found = compare(before.parent, after.parent, resamples=10)
    assert list(found.other_rules) == ["MMEB: VQA"]
    assert told in found.other_rules["MMEB: VQA"]
    assert f"{ties} and 0 rows are tied" in caplog.text
    report = Report("x")
    found.add_to(report)
    assert report.sections[0].title == "Ties were treated differently"
    assert compare(after.parent, after.parent, resamples=10).other_rules == {}


def test_the_rule_comes_back(tmp_path):
    for number, rule in enumerate(("the first of equal scores wins", "a tie is wrong")):
        path = tmp_path / f"{number}.parquet"
        write_outcomes(path, {"a": TaskOutcomes(np.arange(2), np.ones(2), np.zeros(2, bool), rule=rule)})
        assert read_outcomes(path)["a"].rule == rule


def test_what_cannot_be_compared_is_refused_by_name():
    vectors = np.eye(3, dtype=np.float32)
    for value in (np.nan, np.inf):
        broken = vectors.copy()
        broken[1, 2] = value
        with pytest.raises(ValueError, match="Embedding 1 holds NaN or infinity"):
            unit_rows(broken)
        with pytest.raises(ValueError, match="Embedding 1 holds"):
            rank_pool(vectors, broken, [[0]] * 3)
    one = [np.array([0])]
    for arguments, message in (
        ({"k": 0}, "`k=0`"),
        ({"chunk_size": 0}, "`chunk_size=0`"),
        ({"gains": [np.array([1.0, 0.0])]}, "1 queries need as many lists"),
    ):
        with pytest.raises(ValueError, match=message):
            score_candidates(vectors, [0], one, **arguments)
    with pytest.raises(ValueError, match="2 queries need as many"):
        score_candidates(vectors, [0, 1], one)
    with pytest.raises(ValueError, match="`queries=0`"):
        score_candidates(vectors, [], [])
    for right, message in (([[3]], "there are 3, from 0"), ([[-1]], "Query 0 has right"), ([[0], [0]], "of 2")):
        with pytest.raises(ValueError, match=message):
            rank_pool(vectors[:1], vectors, right)


def test_arguments_of_evaluators_are_refused_by_name(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [1, 3])])
    task = pool_task(range(2), range(10, 14))
    for arguments, kind, message in (
        ({"limit": 1.5}, TypeError, "`limit=1.5`"),
        ({"seed": -1}, ValueError, "`seed=-1`"),
        ({"batch_size": True}, TypeError, "`batch_size=True`"),
        ({"tasks": "VOC2007"}, TypeError, "is one name"),
        ({"tasks": ["VOC2007", "VOC2007"]}, ValueError, "Two tasks are called 'VOC2007'"),
        ({"tasks": [task, task]}, ValueError, "Two tasks are called 'pool'"),
        ({"tasks": [MMEBTask("mine", task.load, metric="recall@1")]}, ValueError, "'mine' has the metric 'recall@1'"),
    ):
        with pytest.raises(kind, match=message):
            MMEBEvaluator(tmp_path, **arguments)
    evaluator = MMEBEvaluator(tmp_path)
    evaluator(TableModel(np.eye(4)))
    retrieval = ImageTextRetrievalEvaluator([PICTURE], [["a"]])
    retrieval(HashModel())
    for k, kept in ((0, "at least 1"), (11, "are kept")):
        with pytest.raises(ValueError, match=f"`k={k}`.*{kept}"):
            evaluator.top("VOC2007", k)
        with pytest.raises(ValueError, match=f"`k={k}`.*{kept}"):
            retrieval.top(k)
    with pytest.raises(TypeError, match="are lists"):
        ImageTextRetrievalEvaluator("images", [["a"]])


def test_ties_after_reranking_against_all_orders_of_equal_candidates():
    """Those reranked tie by score and cosine, those behind by cosine alone, and never with one another."""
    rng, k, n = np.random.default_rng(0), 6, 3
    seen = set()
    for _ in range(200):
        cosines = -np.sort(-rng.integers(3, size=(1, k)) / 2.0)
        gains = rng.integers(2, size=(1, k)).astype(float)
        gains[0, rng.integers(k)] = 1.0
        new = rng.integers(3, size=(1, n)).astype(float)
        ideal = _discounted(-np.sort(-gains[0]))
        before = CandidateScores(
            np.array([gains[0, 0] > 0]), np.zeros(1, bool), np.zeros(1, int), 1 + gains.argmax(axis=1),
            np.array([_discounted(gains[0]) / ideal]), np.zeros(1, bool), np.arange(k)[None], cosines, gains,
            np.array([ideal]),
        )  # fmt: skip
        keys = [(at < n, new[0, at] if at < n else 0.0, cosines[0, at]) for at in range(k)]
        orders = [
            order for order in permutations(range(k))
            if all(keys[one] >= keys[other] for one, other in pairwise(order))
        ]  # fmt: skip
        found = before.reranked(new)
        sequences = [gains[0, list(order)] for order in orders]
        first = {bool(sequence[0] > 0) for sequence in sequences}
        ndcg_tied = any(len({sequence[at] for sequence in sequences}) > 1 for at in range(5))
        assert bool(found.tied[0]) == (len(first) > 1)
        assert bool(found.ndcg_tied[0]) == ndcg_tied
        assert any(abs(found.ndcg[0] - _discounted(sequence) / ideal) < 1e-12 for sequence in sequences)
        seen.add((bool(found.tied[0]), ndcg_tied))
    assert seen == {(False, False), (False, True), (True, True)}


def _discounted(gains):
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:5]))
