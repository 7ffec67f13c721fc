"""Reranking in the evaluators: against plain Python, with ties; each pair once; the cache; what is refused."""

import hashlib
import json
import math
import time

import numpy as np
import pytest
import torch
from evaluation_fakes import HashModel, TableModel, numbered_picture
from sentence_transformers import CrossEncoder
from test_mmeb_oracle import TABLE, ExactModel, cosine, random_task
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from tiny import picture, tiny_backbone
from two_processes import run_two
from unime_st.evaluation import ImageTextRetrievalEvaluator, MMEBEvaluator, Report, SugarCrepeEvaluator
from unime_st.evaluation import reranking as reranking_module
from unime_st.evaluation.report.summary import add_mmeb, add_retrieval, add_sugarcrepe
from unime_st.modules import build_reranker, export_reranker


class Reranker(nn.Module):
    """Scores pairs by what they say, with few levels, so that many are tied; counts what it is asked."""

    def __init__(self, levels=3, spoiled=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.levels, self.spoiled, self.asked = levels, spoiled, []

    def score(self, pair):
        said = json.dumps([str(half) for half in pair]).encode()
        return int.from_bytes(hashlib.sha256(said).digest()[:4], "big") % self.levels / self.levels

    def predict(self, inputs, *, batch_size, show_progress_bar):
        self.asked += [json.dumps([str(half) for half in pair]) for pair in inputs]
        scores = np.array([self.score(pair) for pair in inputs])
        if self.spoiled is not None:
            scores[self.spoiled] = np.nan
        return scores


def expected(task, metric, reranker, depth):
    """Right, rank and score of each row by plain sorting, None for one that cannot be read."""
    rows = []
    number = [int(item["text"][1:]) for item in task.items]
    for place, query in enumerate(task.queries):
        own = task.own(place).tolist()
        gain_of = dict(reversed(list(zip(own, task.gains_of(place).tolist(), strict=True))))
        if task.corpus is None:  # a right answer's copies are right; else each place has its own gain
            shown = own
            gains = [1.0 if item == own[0] else 0.0 for item in own] if task.gains is None else task.gains_of(place)
        else:
            shown = [item for item in task.corpus.tolist() if number[item] != 99]
            gains = [gain_of.get(item, 0.0) for item in shown]
        if number[query] == 99 or any(number[item] == 99 for item in own):
            rows.append(None)
            continue
        by_cosine = sorted(range(len(shown)), key=lambda at: (-cosine(number[query], number[shown[at]]), at))
        first = sorted(
            by_cosine[:depth],
            key=lambda at: -np.float32(reranker.score((task.items[query], task.items[shown[at]]))),
        )
        order = [float(gains[at]) for at in first + by_cosine[depth:]]
        ideal = sum(gain / math.log2(2 + at) for at, gain in enumerate(sorted(map(float, gains), reverse=True)[:5]))
        ndcg = sum(gain / math.log2(2 + at) for at, gain in enumerate(order[:5])) / ideal
        rank = 1 + next(at for at, gain in enumerate(order) if gain > 0)
        rows.append((rank == 1, rank, ndcg if metric == "ndcg@5" else float(rank == 1)))
    return rows


@pytest.mark.parametrize("metric", ["hit@1", "ndcg@5"])
@pytest.mark.parametrize("shared", [False, True])
def test_mmeb_against_plain_sorting(metric, shared):
    rng = np.random.default_rng(int(shared))
    changed = compared = tied = 0
    for trial in range(150):
        spec, task = random_task(rng, "task", metric, shared=shared)
        reranker, depth = Reranker(levels=int(rng.integers(1, 5))), int(rng.integers(2, 8))
        evaluator = MMEBEvaluator(None, [spec], on_error="report", reranker=reranker, rerank_depth=depth)
        wanted = expected(task, metric, reranker, depth)
        metrics = evaluator(ExactModel(TABLE))
        before, after = evaluator.results["task"], evaluator.reranked_results["task"]
        for number, row in enumerate(wanted):
            found = bool(after.right[number]), int(after.rank[number]), float(after.scores[number])
            if row is None:
                assert found == (False, 0, 0.0), trial
                continue
            assert found == (row[0], row[1], pytest.approx(row[2], abs=1e-12)), (trial, number)
            compared += 1
            changed += before.rank[number] != after.rank[number]
            if reranker.levels == 1:  # a reranker that tells nothing changes nothing
                assert (before.rank[number], before.scores[number]) == found[1:]
                assert (before.top[number] == after.top[number]).all()
                tied += int(after.tied[number])
        assert len(set(reranker.asked)) == len(reranker.asked), "a pair was scored twice"
        assert metrics["MMEB_rerank_pairs"] == len(reranker.asked)
    assert compared > 300
    assert changed > 20
    assert tied > 0


def wrong_first(queries, candidates, right, scores, depth):
    """Rank from 0 of each query's best right candidate, every tie decided against it."""
    ranks = []
    for query in range(queries):

        def key(c, query=query):
            return -candidates[query][c], c in right[query]

        order = sorted(range(len(candidates[query])), key=key)
        first = sorted(order[:depth], key=lambda c, q=query: (-scores[q][c], -candidates[q][c], c in right[q]))
        ranks.append(next(at for at, c in enumerate(first + order[depth:]) if c in right[query]))
    return ranks


def test_retrieval_against_plain_sorting():
    rng = np.random.default_rng(0)
    compared = changed = 0
    for _ in range(60):
        count, depth = int(rng.integers(3, 9)), int(rng.integers(2, 5))
        table = TABLE[rng.permutation(len(TABLE))[:32]][:, :4]
        numbers = rng.permutation(32)
        images = [numbered_picture(int(number)) for number in numbers[:count]]
        captions = [f"a #{number}" for number in numbers[count : 2 * count]]
        reranker = ByNumber(int(rng.integers(1, 4)))
        evaluator = ImageTextRetrievalEvaluator(
            images, [[caption] for caption in captions], ks=(1, 2), reranker=reranker, rerank_depth=depth
        )
        metrics = evaluator(TableModel(table))
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        cosines = np.round((unit[numbers[count : 2 * count]] @ unit[numbers[:count]].T).astype(float), 6)
        scores = [[reranker.of(int(a), int(b)) for b in numbers[:count]] for a in numbers[count : 2 * count]]
        right = [{place} for place in range(count)]
        both = {
            "text_to_image": wrong_first(count, cosines.tolist(), right, scores, depth),
            "image_to_text": wrong_first(count, cosines.T.tolist(), right, np.array(scores).T.tolist(), depth),
        }
        for direction, ranks in both.items():
            assert evaluator.reranked_rankings[direction].ranks.tolist() == ranks
            assert metrics[f"reranked_{direction}_recall@1"] == np.mean(np.array(ranks) < 1)
            compared += len(ranks)
            changed += int((evaluator.rankings[direction].ranks != ranks).sum())
            entry = evaluator.reranked_rankings[direction]
            assert (np.sort(entry.top, axis=1) == np.sort(evaluator.rankings[direction].top, axis=1)).all()
    assert compared > 300
    assert changed > 30


@pytest.mark.parametrize("depth", [12, 14, 40])
def test_depths_beyond_what_is_shown_and_beyond_the_corpus(depth):
    """The reranker puts the last first, and takes its time, which is told."""

    class Reverse(ByNumber):
        def of(self, a, b):
            return float(abs(a - b))

        def predict(self, inputs, **options):
            time.sleep(0.2)
            return super().predict(inputs, **options)

    angles = np.linspace(0, 1, 14)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    images = [numbered_picture(number) for number in range(14)]
    evaluator = ImageTextRetrievalEvaluator(
        images, [[f"a #{number}"] for number in range(14)], ks=(1,), reranker=Reverse(), rerank_depth=depth
    )
    metrics = evaluator(TableModel(table))
    assert evaluator.reranked_rankings["text_to_image"].ranks.tolist() == [min(depth, 14) - 1] * 14
    assert evaluator.reranked_rankings["text_to_image"].top[0, 0] == min(depth, 14) - 1
    assert metrics["rerank_seconds"] > 0.3


class ByNumber(Reranker):
    """Scores texts "#N" and images of number N, either way round, as a symmetric table has it."""

    def of(self, a, b):
        return float(((a + 1) * (b + 1)) % 7 % self.levels)

    def score(self, pair):
        model = TableModel(np.zeros((1, 1)))
        return self.of(*(model.number(half) for half in pair))


def test_sugarcrepe_by_the_reranker_and_its_ties_by_the_encoder():
    image = numbered_picture(0)
    table = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]] + 0.1
    rows = [(image, "a #1", "b #2"), (image, "c #3", "d #2"), (image, "e #2", "f #1"), (image, "g #2", "h #2")]
    given = {"a": 0.2, "b": 0.9, "c": 0.7, "d": 0.1, "e": 0.5, "f": 0.5, "g": 0.5, "h": 0.5}

    class Told(Reranker):
        def score(self, pair):
            return given[pair[1]["text"][0]]

    reranker = Told()
    evaluator = SugarCrepeEvaluator({"set": rows}, reranker=reranker)
    metrics = evaluator(TableModel(table))
    assert evaluator.scores["set"].right.tolist() == [True, False, False, False]
    assert evaluator.reranked_scores["set"].right.tolist() == [False, True, False, False]
    assert evaluator.reranked_scores["set"].tied.tolist() == [False, False, False, True]
    assert metrics["sugarcrepe_reranked_set_accuracy"] == metrics["sugarcrepe_set_accuracy"] == 0.25
    assert len(reranker.asked) == 8


def small(**arguments):
    table = TABLE[:12]
    images = [numbered_picture(number) for number in range(6)]
    return TableModel(table), ImageTextRetrievalEvaluator(
        images, [[f"a #{6 + number}", f"b #{number}"] for number in range(6)], ks=(1,), name="small", **arguments
    )


def test_scores_are_kept_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(reranking_module, "_BATCHES_A_CHUNK", 1)

    class Dies(ByNumber):
        def predict(self, inputs, **options):
            if len(self.asked) >= 20:
                raise KeyboardInterrupt
            return super().predict(inputs, **options)

    model, plain = small(reranker=ByNumber(3), rerank_depth=4, batch_size=4)
    expected = plain(model)
    _, evaluator = small(reranker=Dies(3), rerank_depth=4, batch_size=4, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluator(model)
    again = ByNumber(3)
    _, evaluator = small(reranker=again, rerank_depth=4, batch_size=4, cache_dir=tmp_path)
    found = evaluator(model)
    assert len(again.asked) == len(plain.reranker.asked) - 20
    assert {**found, "small_rerank_seconds": 0} == {**expected, "small_rerank_seconds": 0}
    other = ByNumber(3)
    other.weight.data += 1  # another model's scores are not taken for its own
    _, evaluator = small(reranker=other, rerank_depth=4, batch_size=4, cache_dir=tmp_path)
    evaluator(model)
    assert len(other.asked) == len(plain.reranker.asked)


def share(rank, fail):
    reranking_module._BATCHES_A_CHUNK = 1
    reranker = ByNumber(3, spoiled=0 if fail and rank == 1 else None)
    model, evaluator = small(reranker=reranker, rerank_depth=4, batch_size=4)
    if fail:
        with pytest.raises(ValueError, match=r"Caption \d+, of image \d+, against Image \d+: the reranker's score is"):
            evaluator(model)
        return {"asked": torch.zeros(1)}
    metrics = evaluator(model)
    metrics.pop("small_rerank_seconds")
    return {
        "metrics": torch.tensor(list(metrics.values()), dtype=torch.float64),
        "asked": torch.tensor([len(reranker.asked)]),
    }


@pytest.mark.parametrize("fail", [False, True])
def test_two_processes_share_the_pairs(tmp_path, fail):
    first, second = run_two(share, tmp_path, fail)
    if fail:
        return
    model, evaluator = small(reranker=ByNumber(3), rerank_depth=4, batch_size=4)
    alone = evaluator(model)
    alone.pop("small_rerank_seconds")
    assert first["metrics"].tolist() == second["metrics"].tolist() == list(alone.values())
    assert min(int(first["asked"]), int(second["asked"])) > 0
    assert int(first["asked"]) + int(second["asked"]) == len(evaluator.reranker.asked)


def test_what_is_refused_is_named(tmp_path):
    model, evaluator = small(reranker=ByNumber(3, spoiled=2), rerank_depth=4)
    with pytest.raises(ValueError, match=r"Caption 0, of image 0, against Image \d: the reranker's score is nan"):
        evaluator(model)

    class TwoLabels(ByNumber):
        def predict(self, inputs, **options):
            return np.zeros((len(inputs), 2))

    with pytest.raises(ValueError, match=r"scores of shape \(\d+, 2\) for \d+ pairs"):
        small(reranker=TwoLabels())[1](model)
    with pytest.raises(TypeError, match=r"`reranker` is a str, but it needs a method `predict`"):
        small(reranker="folder")
    with pytest.raises(ValueError, match="rerank_depth=1"):
        small(reranker=ByNumber(3), rerank_depth=1)
    with pytest.raises(ValueError, match=r"Caption 0, of image 0, against Image \d: the reranker takes texts alone"):
        small(reranker=text_reranker(tmp_path))[1](model)


def text_reranker(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "#", *map(str, range(10))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=1, **size)).save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu")


def test_a_stock_text_reranker_and_captions_that_look_like_files(tmp_path):
    model = text_reranker(tmp_path)
    rng = np.random.default_rng(3)
    spec, task = random_task(rng, "task", "hit@1", shared=False)
    while any("image" in item for item in task.items):
        spec, task = random_task(rng, "task", "hit@1", shared=False)
    evaluator = MMEBEvaluator(None, [spec], reranker=model, rerank_depth=3)
    evaluator(TableModel(TABLE))

    class Same(Reranker):
        def score(self, pair):
            return float(model.predict([tuple(half["text"] for half in pair)])[0])

    rows = expected(task, "hit@1", Same(), 3)
    assert evaluator.reranked_results["task"].rank.tolist() == [row[1] for row in rows]


def test_ours_and_stock_give_the_same(tmp_path):
    backbone = tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No"])
    ours = build_reranker(backbone, device="cpu")
    stock = CrossEncoder(str(export_reranker(ours, tmp_path / "stock")), device="cpu")
    images = [picture(colour) for colour in ("red", "green", "white", "black")]
    captions = [["a red bus"], ["a boat.jpg"], ["snow", "a #1"], ["night"]]
    found = []
    for reranker in (ours, stock):
        evaluator = ImageTextRetrievalEvaluator(images, captions, ks=(1,), reranker=reranker, rerank_depth=3)
        evaluator(ByLook())
        found.append(evaluator.reranked_rankings)
        assert evaluator.get_config_dict()["rerank_depth"] == 3
    for direction in ("text_to_image", "image_to_text"):
        assert (found[0][direction].ranks == found[1][direction].ranks).all()
        assert (found[0][direction].top == found[1][direction].top).all()
        assert any((found[0][direction].top != evaluator.rankings[direction].top).ravel())


class ByLook(HashModel):
    def vector(self, item, prompt=""):
        shown = item.tobytes() if hasattr(item, "tobytes") else item["text"]
        return super().vector(shown)


def test_files_and_report_show_both(tmp_path):
    model, evaluator = small(reranker=ByNumber(3), rerank_depth=4)
    metrics = evaluator(model, output_path=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "small_reranked_results_rows.parquet", "small_results.csv", "small_results.json", "small_results_rows.parquet",
    ]  # fmt: skip
    report = Report("both")
    add_retrieval(report, evaluator, metrics)
    rng = np.random.default_rng(3)
    spec, _ = random_task(rng, "VOC2007", "hit@1", shared=False)
    mmeb = MMEBEvaluator(None, [spec], on_error="report", reranker=Reranker(), rerank_depth=3)
    add_mmeb(report, mmeb, mmeb(TableModel(TABLE)))
    image = numbered_picture(0)
    swaps = SugarCrepeEvaluator({"swap_att": [(image, "a #1", "b #2")]}, reranker=ByNumber(2))
    add_sugarcrepe(report, swaps, swaps(TableModel(TABLE)))
    tables = {section.title: section.data for section in report.sections if "reranked" in section.title}
    assert list(tables) == ["Retrieval: small, reranked", "MMEB, reranked", "SugarCrepe, reranked"]
    shown = {row[0]: row[1:] for row in tables["MMEB, reranked"]["rows"]}
    assert {"VOC2007 precision@1", "meta Classification precision@1"} <= set(shown)
    for name, metric in (("text to image recall@1", "text_to_image_recall@1"),):
        row = next(row for row in tables["Retrieval: small, reranked"]["rows"] if row[0] == name)
        before, after = metrics[f"small_{metric}"], metrics[f"small_reranked_{metric}"]
        assert row[1:] == [before, after, after - before]
    assert "the first 4" in tables["Retrieval: small, reranked"]["note"]
    assert "seconds" in tables["Retrieval: small, reranked"]["note"]
