import numpy as np
import pytest

from unime_st.evaluation.scoring import rank_pool, score_candidates, unit_rows


def cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / (sum(float(x) ** 2 for x in a) ** 0.5 * sum(float(y) ** 2 for y in b) ** 0.5)


def same(a, b):
    return all(x == y for x, y in zip(a, b, strict=True))


def vectors(rng, count, dim=5, copies=True):
    """Random vectors, a third of them exact copies of another under a different number."""
    made = rng.normal(size=(count, dim)).astype(np.float32)
    for place in rng.choice(count, count // 3, replace=False) if copies else []:
        made[place] = made[rng.integers(count)]
    return made


@pytest.mark.parametrize("seed", range(150))
def test_candidates_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    embeddings = vectors(rng, 12)
    queries = rng.integers(12, size=rng.integers(1, 9))
    candidates = [rng.integers(12, size=rng.integers(1, 10)) for _ in queries]
    result = score_candidates(embeddings, queries, candidates, k=3, chunk_size=int(rng.integers(1, 5)))
    for row, (query, own) in enumerate(zip(queries, candidates, strict=True)):
        first = embeddings[own[0]]
        # equal vectors have equal scores, whatever the rounding
        scores = [
            cosine(embeddings[query], first) if same(embeddings[c], first) else cosine(embeddings[query], embeddings[c])
            for c in own
        ]
        best = max(scores)
        assert result.right[row] == (scores[0] == best)
        assert result.tied[row] == (
            scores[0] == best and any(s == best and c != own[0] for s, c in zip(scores, own, strict=True))
        )
        order = sorted(range(len(own)), key=lambda place: (-round(scores[place], 5), place))[:3]
        assert result.top[row].tolist() == order + [-1] * (3 - len(order))
        np.testing.assert_allclose(result.scores[row, : len(order)], [scores[place] for place in order], atol=1e-6)


@pytest.mark.parametrize("seed", range(100))
def test_pool_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    pool = vectors(rng, int(rng.integers(2, 20)))
    queries = vectors(rng, int(rng.integers(1, 9)))
    right = [rng.choice(len(pool), rng.integers(1, min(4, len(pool) + 1)), replace=False).tolist() for _ in queries]
    ranking = rank_pool(queries, pool, right, k=4, chunk_size=int(rng.integers(1, 5)))
    for row, (query, own) in enumerate(zip(queries, right, strict=True)):
        scores = [round(cosine(query, candidate), 5) for candidate in pool]
        best = max(scores[place] for place in own)
        wrong = [place for place in range(len(pool)) if place not in own]
        assert ranking.ranks[row] == sum(scores[place] >= best for place in wrong)
        assert ranking.tied[row] == any(scores[place] == best for place in wrong)
        assert ranking.top[row, 0] in [place for place, score in enumerate(scores) if score == max(scores)]
    for k in (1, 2, 3):
        assert ranking.recall(k) == pytest.approx(np.mean([rank < k for rank in ranking.ranks]))


def test_a_model_that_gives_one_vector_for_all_scores_nothing_in_a_pool():
    one = np.tile(np.random.default_rng(0).normal(size=7), (50, 1))
    ranking = rank_pool(one, one, [[place] for place in range(50)])
    assert (ranking.ranks == 49).all()
    assert ranking.tied.all()
    assert ranking.top[0].tolist() == list(range(10))


def test_refusals():
    with pytest.raises(ValueError, match="Query 1 has no candidates"):
        score_candidates(np.eye(2), [0, 1], [np.array([1]), np.array([], dtype=int)])
    with pytest.raises(ValueError, match="Query 0 has no right candidate"):
        rank_pool(np.eye(2), np.eye(2), [[], [1]])


def test_a_zero_row_stays_zero():
    rows, _ = unit_rows(np.zeros((1, 3)))
    assert rows.tolist() == [[0.0, 0.0, 0.0]]
