"""Who embeds what: each distinct input once, on a process that has it, in mini-batches within their bounds."""

import numpy as np
import pytest

from unime_st.losses.mini_batches import plan_mini_batches


def random_batch(seed, processes, columns, batch, contents):
    """Keys and tokens; an input's length follows from what it is."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, contents, (processes, columns * batch)) * 1_000_003
    return keys, (keys // 1_000_003) % 37 + 3


def plans(keys, tokens, batch, **options):
    return [plan_mini_batches(keys, tokens, batch, rank=rank, **options) for rank in range(len(keys))]


def table(keys, made, batch):
    """What stands in the table of embeddings: the key of each entry, None where nothing does."""
    entries = []
    for rank, plan in enumerate(made):
        own = [keys[rank, column * batch + row] for column, rows in plan.mini_batches for row in rows]
        entries += own + [None] * (plan.share - len(own))
    return entries


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("options", [{}, {"size": 3}, {"num_tokens": 60}], ids=str)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_input_finds_its_embedding_and_each_is_made_once(seed, options, processes):
    columns, batch = 1 + seed % 3, 4 + seed % 5
    keys, tokens = random_batch(seed, processes, columns, batch, contents=1 + 3 * seed)
    made = plans(keys, tokens, batch, **options)
    entries = table(keys, made, batch)
    for rank, plan in enumerate(made):
        for column in range(columns):
            for row in range(batch):
                assert entries[plan.place[column, row]] == keys[rank, column * batch + row]
    used = {int(place) for plan in made for place in plan.place.ravel()}
    assert len(used) == len(np.unique(keys)) == made[0].distinct
    assert len({len(plan.mini_batches) for plan in made}) == 1
    assert len({plan.share for plan in made}) == 1


@pytest.mark.parametrize("seed", range(10))
def test_mini_batches_stay_within_their_bounds_padding_included(seed):
    keys, tokens = random_batch(seed, 2, 2, 12, contents=40)
    for rank, plan in enumerate(plans(keys, tokens, 12, size=5)):
        assert all(len(rows) <= 5 for _, rows in plan.mini_batches)
        assert sum(len(rows) for _, rows in plan.mini_batches) > 5
        sizes = [len(rows) * tokens[rank, column * 12 + rows].max() for column, rows in plan.mini_batches]
        assert sizes[-1] == max(sizes)
    for rank, plan in enumerate(plans(keys, tokens, 12, num_tokens=50)):
        for column, rows in plan.mini_batches:
            lengths = tokens[rank, column * 12 + rows]
            assert len(rows) == 1 or len(rows) * lengths.max() <= 50


def test_inputs_of_like_length_share_a_mini_batch():
    tokens = np.array([[5, 50, 6, 51, 7, 52, 8, 53]])
    plan = plan_mini_batches(np.arange(8)[None], tokens, 8, size=4)
    padded = sum(len(rows) * tokens[0, rows].max() for _, rows in plan.mini_batches)
    assert padded == 4 * 53 + 4 * 8


def test_shared_inputs_go_to_the_process_with_fewer_tokens():
    keys = np.array([[1, 2, 3, 4], [3, 4, 5, 6]])
    tokens = np.array([[90, 90, 10, 10], [10, 10, 5, 5]])
    first, second = plans(keys, tokens, 4, size=8)
    assert [rows.tolist() for _, rows in first.mini_batches] == [[0, 1]]
    assert [rows.tolist() for _, rows in second.mini_batches] == [[0, 1, 2, 3]]


def test_a_process_whose_inputs_all_went_to_others_still_embeds_one():
    keys = np.array([[1, 2], [1, 2], [7, 7]])
    made = plans(keys, np.ones_like(keys), 2, size=2)
    assert all(plan.mini_batches for plan in made)
    three = np.array([[1], [1], [1]])
    assert all(sum(len(rows) for _, rows in plan.mini_batches) == 1 for plan in plans(three, three, 1, size=2))


def test_processes_have_as_many_mini_batches_even_when_one_has_few_inputs():
    keys = np.array([[1, 2, 3, 4], [9, 9, 9, 9]])
    made = plans(keys, np.full_like(keys, 5), 4, size=1)
    assert [len(plan.mini_batches) for plan in made] == [4, 4]
    assert [len(plan.mini_batches) for plan in plans(keys, np.full_like(keys, 5), 4, size=2, least=3)] == [3, 3]
