"""The queue: who is scored together, in what order and by when, and what becomes of those who leave or fail."""

import asyncio
import concurrent.futures
import time

import numpy as np
import pytest

from afrl_jax.serve.batching import Batcher, QueueFull


class Counting:
    """Squares numbers; -1 cannot be squared. Remembers its batches."""

    def __init__(self, seconds=0.0, seconds_per_pair=0.0):
        self.seconds, self.seconds_per_pair, self.batches, self.salts = seconds, seconds_per_pair, [], []

    def __call__(self, items, salts):
        self.batches.append(list(items))
        self.salts.append(list(salts))
        time.sleep(self.seconds + self.seconds_per_pair * len(items))
        if -1 in items:
            raise ArithmeticError("not this one")
        return np.square(items)


def run(story, score=None, **changes):
    """Run `story(batcher, submit)`, where submit(numbers) is a request."""
    score = score or Counting()
    settings = {"batch_pairs": 4, "queue_pairs": 100, "wait_seconds": 0.02, "deadline_seconds": 20.0} | changes

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


def test_the_wait_for_an_explanation_to_end_is_no_scoring():
    """Else one that holds the executor would make the service believe it scores slowly, and refuse what it can do."""

    async def story(batcher, submit):
        explaining = asyncio.get_running_loop().run_in_executor(batcher._executor, time.sleep, 0.5)
        await submit([1])
        await explaining
        return batcher.expected_seconds(1)

    found, _ = run(story, Counting(0.01))
    assert 0.01 <= found < 0.25


@pytest.mark.parametrize(
    ("deadline", "pause", "batches"),
    [
        # By itself it takes 0.25 s at the rate so far; of the second deadline it lets others pass for 0.12 s.
        (20.0, 0.0, [[0, 1, 2, 3], [20, 30, 40, 4], [5, 6, 7, 8], [9]]),
        (0.8, 0.2, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 20, 30], [40]]),
    ],
)
def test_a_long_request_lets_short_ones_pass_for_a_while(deadline, pause, batches):
    async def story(batcher, submit):
        batcher._recent = (4.0, 0.1)
        long = asyncio.create_task(submit(list(range(10))))
        await asyncio.sleep(pause)
        return await asyncio.gather(long, submit([20]), submit([30]), submit([40]))

    found, score = run(story, Counting(0.3), deadline_seconds=deadline)
    assert found == [[n * n for n in range(10)], [400], [900], [1600]]
    assert score.batches == batches


def test_what_is_admitted_is_answered_in_time_whatever_its_size():
    """Short requests at 1.5 times the capacity, and every 0.3 s one that takes 0.2 s by itself."""
    deadline, per_pair = 1.0, 0.002
    random = np.random.default_rng(0)
    due = [(at, 8) for at in np.cumsum(random.exponential(8 * per_pair / 1.5, 280))]
    due += [(0.3 * n, 100) for n in range(1, 10)]

    async def story(batcher, submit):
        start = time.perf_counter()

        async def ask(at, pairs):
            await asyncio.sleep(start + at - time.perf_counter())
            begun = time.perf_counter()
            try:
                await submit([1] * pairs)
            except QueueFull:
                return pairs, None
            return pairs, time.perf_counter() - begun

        await submit([1] * 16)
        return await asyncio.gather(*(ask(at, pairs) for at, pairs in due))

    score = Counting(seconds_per_pair=per_pair)
    found, _ = run(story, score, batch_pairs=16, queue_pairs=10_000, deadline_seconds=deadline)
    assert max(seconds for _, seconds in found if seconds) < deadline
    for size in (8, 100):
        assert sum(pairs == size and seconds is not None for pairs, seconds in found) >= 3
    assert any(seconds is None for _, seconds in found)


def test_a_failure_is_its_own():
    async def story(batcher, submit):
        return await asyncio.gather(submit([1]), submit([-1]), submit([3]), return_exceptions=True)

    told = []
    found, _ = run(story, failed=lambda pairs, requests, error: told.append((pairs, requests, str(error))))
    assert found[0] == [1] and found[2] == [9] and isinstance(found[1], ArithmeticError)
    assert told == [(3, 3, "not this one"), (1, 1, "not this one")]


def test_a_batch_that_fails_is_told_though_its_requests_pass_alone():
    class TooMany(Counting):
        def __call__(self, items, salts):
            if len(items) > 1:
                raise MemoryError("too many")
            return super().__call__(items, salts)

    async def story(batcher, submit):
        return await asyncio.gather(submit([1]), submit([2]))

    told = []
    found, _ = run(story, TooMany(), failed=lambda pairs, requests, error: told.append((pairs, requests, str(error))))
    assert found == [[1], [4]] and told == [(2, 2, "too many")]


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


def test_nobody_is_admitted_to_be_late():
    async def story(batcher, submit):
        batcher._recent = (4.0, 0.1)
        filling = [asyncio.create_task(submit([1, 2, 3, 4]))]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await submit(list(range(20)))  # 0.1 s to wait, 0.5 s to be scored
        filling += [asyncio.create_task(submit([1, 2, 3, 4])) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as full:
            await submit([1])
        assert full.value.retry_after == pytest.approx(0.3)
        await asyncio.gather(*filling)
        assert len(await submit(list(range(8)))) == 8  # 0.6 s: an idle queue refuses nobody

    run(story, Counting(0.3), deadline_seconds=0.58)


def test_times_are_told():
    async def story(batcher, submit):
        with batcher.place(1) as place:
            return await batcher.score([3], b"", place)

    scored, _ = run(story, Counting(0.05))
    assert scored.compute_seconds >= 0.05 and 0.015 <= scored.queue_seconds < 1
