"""The batcher alone: order, bounds of a batch and of the wait, prompts apart, and whom an error meets."""

import asyncio
import threading
import time

import pytest
from starlette.exceptions import HTTPException

from unime_st.serve.batching import Batcher, Refusal
from unime_st.serve.limits import Limits


def run(encode, work, **limits):
    async def whole():
        async with Batcher(encode, Limits(**limits)) as batcher:
            return await work(batcher)

    return asyncio.run(whole())


def test_batches_are_full_and_answers_are_each_ones_own():
    calls = []

    def encode(items, prompt):
        calls.append((prompt, items))
        return [f"{prompt}:{item}" for item in items]

    async def work(batcher):
        asked = [batcher.embed([3 * place, 3 * place + 1, 3 * place + 2], "ab"[place % 2]) for place in range(20)]
        return await asyncio.gather(*asked)

    answers = run(encode, work, batch_size=10, max_wait=0.05)
    assert answers == [[f"{'ab'[place % 2]}:{3 * place + n}" for n in range(3)] for place in range(20)]
    assert sum(len(items) for _, items in calls) == 60
    assert len(calls) == 12  # six batches of ten, each with two prompts
    order = {prompt: [item for own, items in calls if own == prompt for item in items] for prompt in "ab"}
    assert all(items == sorted(items) for items in order.values())  # first come, first served


def test_a_single_input_waits_no_longer_than_told():
    async def work(batcher):
        started = time.perf_counter()
        await batcher.embed(["a"])
        return time.perf_counter() - started

    assert run(lambda items, prompt: items, work, max_wait=0.2) >= 0.19
    assert run(lambda items, prompt: items, work, max_wait=0.0) < 0.15


def test_what_arrives_during_a_batch_is_the_next_one():
    calls, busy, go_on = [], threading.Event(), threading.Event()

    def encode(items, prompt):
        calls.append(list(items))
        busy.set()
        go_on.wait(5)
        return items

    async def work(batcher):
        first = asyncio.create_task(batcher.embed([0]))
        await asyncio.to_thread(busy.wait, 5)
        rest = [asyncio.create_task(batcher.embed([number])) for number in range(1, 9)]
        await asyncio.sleep(0.05)
        go_on.set()
        return await asyncio.gather(first, *rest)

    assert run(encode, work, max_wait=0.0) == [[number] for number in range(9)]
    assert calls == [[0], list(range(1, 9))]


def test_too_many_waiting_are_told_to_come_again():
    go_on = threading.Event()

    def encode(items, prompt):
        go_on.wait(5)
        return items

    async def work(batcher):
        first = asyncio.create_task(batcher.embed([1, 2, 3]))
        await asyncio.sleep(0)
        with pytest.raises(HTTPException) as refused:
            await batcher.embed([4, 5])
        go_on.set()
        await first
        return refused.value, await batcher.embed([6, 7])

    refused, later = run(encode, work, max_waiting=4)
    assert (refused.status_code, refused.headers) == (503, {"Retry-After": "1"})
    assert later == [6, 7]  # what was held is given back


def test_an_error_meets_only_the_input_that_has_it():
    calls = []

    def encode(items, prompt):
        calls.append(len(items))
        if "bad" in items:
            raise ValueError("no such input")
        return items

    async def work(batcher):
        return await asyncio.gather(batcher.embed(["a", "bad", "b"]), batcher.embed(["c"]))

    (a, bad, b), (c,) = run(encode, work, max_wait=0.05)
    assert (a, b, c) == ("a", "b", "c")
    assert isinstance(bad, Refusal)
    assert str(bad.error) == "no such input"
    assert calls == [4, 1, 1, 1, 1]


def test_who_has_gone_is_not_encoded():
    calls, busy, go_on = [], threading.Event(), threading.Event()

    def encode(items, prompt):
        calls.append(list(items))
        busy.set()
        go_on.wait(5)
        return items

    async def work(batcher):
        first = asyncio.create_task(batcher.embed(["first"]))
        await asyncio.to_thread(busy.wait, 5)
        gone, stays = (asyncio.create_task(batcher.embed([name])) for name in ("gone", "stays"))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0.02)
        assert [one.item for one in batcher._waiting] == ["stays"]  # images are large
        go_on.set()
        await asyncio.gather(first, stays)
        return batcher.room.held

    assert run(encode, work, max_wait=0.0) == 0
    assert calls == [["first"], ["stays"]]


def test_too_few_results_are_refused_and_the_thread_lives_on():
    async def work(batcher):
        (first,) = await batcher.embed(["none"])
        return first, await batcher.embed(["a", "b"])

    refused, answered = run(lambda items, prompt: [item for item in items if item != "none"], work)
    assert isinstance(refused, Refusal)
    assert answered == ["a", "b"]
