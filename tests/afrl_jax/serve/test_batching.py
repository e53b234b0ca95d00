"""The queue: who is scored together, in what order, and what becomes of those who leave or fail."""

import asyncio
import concurrent.futures
import time

import numpy as np
import pytest

from afrl_jax.serve.batching import Batcher, QueueFull


class Counting:
    """Squares numbers; -1 cannot be squared. Remembers its batches."""

    def __init__(self, seconds=0.0):
        self.seconds, self.batches, self.salts = seconds, [], []

    def __call__(self, items, salts):
        self.batches.append(list(items))
        self.salts.append(list(salts))
        time.sleep(self.seconds)
        if -1 in items:
            raise ArithmeticError("not this one")
        return np.square(items)


def run(story, score=None, **changes):
    """Run `story(batcher, submit)`, where submit(numbers) is a request."""
    score = score or Counting()
    settings = {"batch_pairs": 4, "queue_pairs": 100, "wait_seconds": 0.02, "longest_wait": 10.0} | changes

    async def main():
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            batcher = Batcher(score, executor, **settings)
            running = asyncio.create_task(batcher.run())

            async def submit(numbers, salt=b""):
                with batcher.place(len(numbers)) as place:
                    return (await batcher.score(numbers, salt, place)).rows.tolist()

            found = await story(batcher, submit)
            assert batcher.held == 0
            running.cancel()
            return found

    return asyncio.run(main()), score


def test_requests_that_come_together_are_scored_together():
    async def story(batcher, submit):
        return await asyncio.gather(submit([1, 2]), submit([3], b"s"))

    found, score = run(story)
    assert found == [[1, 4], [9]] and score.batches == [[1, 2, 3]] and score.salts == [[b"", b"", b"s"]]


def test_a_full_batch_does_not_wait():
    async def story(batcher, submit):
        return await asyncio.wait_for(submit([1, 2, 3, 4]), 5)

    found, score = run(story, wait_seconds=60.0)
    assert found == [1, 4, 9, 16]


def test_a_long_request_takes_turns():
    async def story(batcher, submit):
        return await asyncio.gather(submit(list(range(10))), submit([20]), submit([30]))

    found, score = run(story)
    assert found == [[n * n for n in range(10)], [400], [900]]
    assert score.batches == [[0, 1, 2, 3], [20, 30, 4, 5], [6, 7, 8, 9]]


def test_a_failure_is_its_own():
    async def story(batcher, submit):
        return await asyncio.gather(submit([1]), submit([-1]), submit([3]), return_exceptions=True)

    found, _ = run(story)
    assert found[0] == [1] and found[2] == [9] and isinstance(found[1], ArithmeticError)


def test_a_long_request_that_fails_is_not_scored_further():
    async def story(batcher, submit):
        with pytest.raises(ArithmeticError):
            await submit([-1, *range(20)])
        return await submit([5])

    found, score = run(story)
    assert found == [25] and len(score.batches) == 2


def test_who_is_cancelled_leaves_the_queue():
    async def story(batcher, submit):
        busy = asyncio.create_task(submit([1, 2, 3, 4]))
        await asyncio.sleep(0.03)
        waiting = asyncio.create_task(submit([7]))
        await asyncio.sleep(0.01)
        assert batcher.held == 5
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert batcher.held == 4
        return await busy

    found, score = run(story, Counting(0.1))
    assert found == [1, 4, 9, 16] and score.batches == [[1, 2, 3, 4]]


def test_the_queue_has_an_end():
    async def story(batcher, submit):
        first = asyncio.create_task(submit([1, 2, 3]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await submit([1, 2])
        assert await submit([5]) == [25]
        await first

    run(story, queue_pairs=4)


def test_nobody_is_admitted_to_wait_too_long():
    async def story(batcher, submit):
        await submit([1, 2, 3, 4])  # 0.1 s: so fast it is
        filling = [asyncio.create_task(submit([1, 2, 3, 4])) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert batcher.expected_wait == pytest.approx(0.3, rel=0.3)
        with pytest.raises(QueueFull) as full:
            await submit([1])
        assert full.value.retry_after == pytest.approx(0.3, rel=0.3)
        await asyncio.gather(*filling)
        assert await submit([6]) == [36]  # an idle queue refuses nobody

    run(story, Counting(0.1), longest_wait=0.25)


def test_times_are_told():
    async def story(batcher, submit):
        with batcher.place(1) as place:
            return await batcher.score([3], b"", place)

    scored, _ = run(story, Counting(0.05))
    assert scored.compute_seconds >= 0.05 and 0.015 <= scored.queue_seconds < 1
