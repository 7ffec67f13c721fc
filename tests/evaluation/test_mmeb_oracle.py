"""The whole evaluator against plain Python, exactly, on a thousand random benchmarks; and tasks of other kinds."""

import math
from itertools import product

import numpy as np
import pytest
from evaluation_fakes import TableModel

from unime_st.data.mmeb.eval_rows import EvalTask
from unime_st.evaluation import MMEBEvaluator
from unime_st.evaluation.mmeb.tasks import PARSERS, MMEBTask, tasks_from_yaml

# Axes and diagonals in four dimensions, times powers of two: normalised components are 0, 0.5 or 1 and every cosine is
# a multiple of a quarter, all exact in floating point.
_AXES = [[sign * float(at == axis) for at in range(4)] for axis in range(4) for sign in (1, -1)]
_DIAGONALS = [list(map(float, signs)) for signs in product((1, -1), repeat=4)]
TABLE = np.array([[s * x for x in row] for s in (1, 2) for row in _AXES + _DIAGONALS], np.float32)


def cosine(a, b):
    """Of two rows of the table, exact."""
    x, y = TABLE[a].tolist(), TABLE[b].tolist()
    lengths = math.sqrt(sum(value * value for value in x)) * math.sqrt(sum(value * value for value in y))
    return sum(one * other for one, other in zip(x, y, strict=True)) / lengths


def random_task(rng, name, metric, *, shared):
    """A task of texts "#N"; number 99 stands for an image that is not there."""
    numbers = rng.permutation(len(TABLE))[: rng.integers(3, 12)].tolist()
    missing = rng.random() < 0.3
    items = [{"text": f"#{number}"} for number in numbers]
    if missing:
        items.append({"image": "no-such-image.png", "text": "#99"})
    count = int(rng.integers(1, 6))
    queries = rng.integers(len(items), size=count)
    if shared:
        corpus = rng.permutation(len(items))[: rng.integers(2, len(items) + 1)]
        own = [rng.permutation(corpus)[: rng.integers(1, min(4, len(corpus)) + 1)] for _ in range(count)]
    else:
        corpus = None
        own = [rng.integers(len(items), size=rng.integers(1, 8)) for _ in range(count)]
    gains = [np.where(np.arange(len(each)) == 0, 1, rng.integers(0, 4, size=len(each))) for each in own]
    graded = shared or metric == "ndcg@5"
    task = EvalTask(
        items,
        np.arange(count),
        queries,
        np.concatenate(own),
        np.cumsum([0, *map(len, own)]),
        gains=np.concatenate(gains).astype(float) if graded else None,
        corpus=corpus,
    )
    return MMEBTask(name, lambda on_error: task, metric=metric), task


def expected(task, metric):
    """Right, tied, rank and score of each row, None for one that cannot be read.

    As published: candidates are sorted by score, equal ones in their order; a row is tied when another order would
    change its score.
    """

    def number(item):
        text = task.items[item]["text"]
        return None if "image" in task.items[item] else int(text[1:])

    outcome = []
    for place in range(len(task.queries)):
        own = task.candidates[task.offsets[place] : task.offsets[place + 1]].tolist()
        if number(task.queries[place]) is None or any(number(item) is None for item in own):
            outcome.append(None)
            continue
        if task.gains is None:
            pairs = [(item, 1 if number(item) == number(own[0]) else 0) for item in own]
        elif task.corpus is None:
            pairs = list(zip(own, task.gains[task.offsets[place] : task.offsets[place + 1]], strict=True))
        else:
            relevance = dict(zip(own, task.gains[task.offsets[place] : task.offsets[place + 1]], strict=True))
            pairs = [(item, relevance.get(item, 0)) for item in task.corpus.tolist() if number(item) is not None]
        query = number(task.queries[place])
        scored = [(cosine(query, number(item)), gain) for item, gain in pairs]
        found = sorted(scored, key=lambda one: -one[0])  # stable: equal ones stay in their order
        rank = 1 + next(place for place, (_, gain) in enumerate(found) if gain > 0)
        lucky = sorted(scored, key=lambda one: (-one[0], -one[1]))
        unlucky = sorted(scored, key=lambda one: (-one[0], one[1]))
        value = hit if metric == "hit@1" else ndcg
        tied = not math.isclose(value(lucky), value(unlucky), abs_tol=1e-12)
        outcome.append((rank == 1, tied, rank, value(found)))
    return outcome


def hit(found):
    """Whether the first of (score, gain) is right."""
    return float(found[0][1] > 0)


def ndcg(found):
    """nDCG@5 of (score, gain) in this order."""
    dcg = sum(gain / math.log2(position + 2) for position, (_, gain) in enumerate(found[:5]))
    ideal = sorted((gain for _, gain in found), reverse=True)[:5]
    return dcg / sum(gain / math.log2(position + 2) for position, gain in enumerate(ideal))


class ExactModel(TableModel):
    def number(self, item):
        return int(item["text"][1:])


@pytest.mark.parametrize("block", range(20))
def test_the_evaluator_against_plain_python(block):
    seen = {"ties": 0, "wrong": 0, "unreadable": 0, "partial": 0}
    for seed in range(50 * block, 50 * block + 50):
        rng = np.random.default_rng(seed)
        kinds = [("hit@1", False), ("hit@1", True), ("ndcg@5", False), ("ndcg@5", True)]
        made = [random_task(rng, f"task {n}", metric, shared=shared) for n, (metric, shared) in enumerate(kinds)]
        evaluator = MMEBEvaluator(None, [task for task, _ in made], meta_tasks={}, on_error="report", name="")
        outcomes = [expected(task, spec.metric) for spec, task in made]
        if all(row is None for rows in outcomes for row in rows):
            continue
        metrics = evaluator(ExactModel(TABLE))
        scores = []
        for (spec, _), rows in zip(made, outcomes, strict=True):
            result = evaluator.results[spec.name]
            assert sorted(result.errors) == [number for number, row in enumerate(rows) if row is None]
            for number, row in enumerate(rows):
                right, tied, rank, score = row or (False, False, 0, 0.0)
                found = bool(result.right[number]), bool(result.tied[number]), int(result.rank[number])
                assert found == (right, tied, rank), (seed, spec.name, number)
                if spec.metric == "hit@1":
                    assert result.scores[number] == score
                else:
                    assert result.scores[number] == pytest.approx(score, abs=1e-12)
                seen["ties"] += tied
                seen["wrong"] += rank > 1
                seen["unreadable"] += row is None
                seen["partial"] += 0 < score < 1
            own = [0.0 if row is None else row[3] for row in rows]
            name = "precision@1" if spec.metric == "hit@1" else "ndcg@5"
            assert metrics[f"{spec.name}_{name}"] == pytest.approx(sum(own) / len(own), abs=1e-12)
            assert metrics[f"{spec.name}_ties"] == sum(row is not None and row[1] for row in rows)
            scores.append(sum(own) / len(own))
        assert metrics["mean_precision@1"] == pytest.approx((scores[0] + scores[1]) / 2, abs=1e-12)
        assert metrics["mean_ndcg@5"] == pytest.approx((scores[2] + scores[3]) / 2, abs=1e-12)
        assert metrics["overall_mean"] == pytest.approx(sum(scores) / 4, abs=1e-12)
    assert min(seen.values()) > 0, seen  # else the comparison says nothing


YAML = """
VOC2007:
  dataset_parser: image_cls
  dataset_name: VOC2007
  dataset_split: test
  image_root: image-tasks/MMEB/
  eval_type: local
"""


def documents(name, entry, root):
    """What a user adds for visual documents: one corpus, graded relevance."""
    texts = (root / entry["corpus"]).read_text().split()
    task = EvalTask(
        [{"text": text} for text in texts],
        np.arange(1),
        np.array([0]),
        np.array([1, 2]),
        np.array([0, 2]),
        gains=np.array([2.0, 1.0]),
        corpus=np.array([1, 2, 3]),
    )
    return MMEBTask(name, lambda on_error: task, metric="ndcg@5", modality="visdoc")


def test_task_lists_and_parsers_of_ones_own(tmp_path):
    from test_mmeb import write_task

    write_task(tmp_path, "VOC2007", [(1, [1, 3]), (3, [5, 3])])
    (tmp_path / "corpus.txt").write_text("#0 #1 #2 #3")
    (tmp_path / "tasks.yaml").write_text(
        YAML + "Pages: {dataset_parser: pages, corpus: corpus.txt, eval_type: global}\n"
    )
    with pytest.raises(ValueError, match=r"'Pages': there is no parser 'pages'; there are image_cls.*`parsers`"):
        tasks_from_yaml(tmp_path / "tasks.yaml", tmp_path)
    table = np.array([[1, 0], [0.6, 0.8], [1, 0], [0.8, 0.6], [0, 1], [1, 0]], np.float32)
    evaluator = MMEBEvaluator.from_yaml(
        tmp_path / "tasks.yaml", tmp_path, parsers={**PARSERS, "pages": documents}, meta_tasks={}, name=""
    )
    metrics = evaluator(TableModel(table))
    # the query #0 finds #2 (gain 1), #3 (0), #1 (2); ideal is 2, 1
    assert metrics["Pages_ndcg@5"] == pytest.approx((1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3)))
    assert metrics["VOC2007_precision@1"] == metrics["image_mean"] == 0.5
    assert metrics["overall_mean"] == pytest.approx((0.5 + metrics["Pages_ndcg@5"]) / 2)
    (entry,) = evaluator.top("Pages")
    assert [found["text"] for found in entry["results"]] == ["#2", "#3", "#1"]
    assert [found["right"] for found in entry["results"]] == [True, False, True]


def test_broken_task_lists(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("- a list")
    with pytest.raises(ValueError, match="holds no tasks"):
        tasks_from_yaml(path, tmp_path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="no YAML"):
        tasks_from_yaml(path, tmp_path)
    path.write_text(YAML.replace("local", "global"))
    with pytest.raises(ValueError, match=r"'VOC2007'.*'local'"):
        tasks_from_yaml(path, tmp_path)
    with pytest.raises(ValueError, match="root=None"):
        MMEBEvaluator(None)
