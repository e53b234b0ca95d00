"""Requests of many clients scored together, in a queue that has an end.

An idle service waits `wait_seconds` for company for the first request; a busy one gathers what arrives meanwhile. A
request is scored in the order of its turn, which is when it arrived and as much later as it takes by itself: short ones
do not wait behind a long one, and by no more than a share of the deadline, so that a stream of them cannot starve it.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

FORGET = 0.8  # what a batch leaves of the pairs and seconds counted before it: the rate follows the last few
# Shares of the deadline: who is admitted begins within START and ends within FINISH, at the present rate, and lets
# later ones pass for YIELD at most. When that is over, no more than FINISH of work is held, and nothing new comes
# before it: at a steady rate all is answered within FINISH + YIELD. The rest is for a rate that falls.
START, FINISH, YIELD = 0.5, 0.75, 0.15


class QueueFull(Exception):
    """There is no place; `retry_after` is in how many seconds there may be one."""

    def __init__(self, retry_after: float):
        super().__init__(f"no place for {retry_after:.1f} s")
        self.retry_after = retry_after


@dataclasses.dataclass
class Place:
    """Room in the queue, given back pair by pair as they are scored, the rest when the request ends."""

    pairs: int


@dataclasses.dataclass
class Scored:
    """Rows [N, ...] of a request, and where its time went."""

    rows: np.ndarray
    queue_seconds: float  # until its first pair was taken
    compute_seconds: float  # of the batches it was in


@dataclasses.dataclass(eq=False)
class _Work:
    items: Sequence[Any]
    salt: bytes
    place: Place
    done: asyncio.Future[None]
    since: float
    turn: float
    taken: int = 0
    started: float = 0.0
    compute: float = 0.0
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.items) - self.taken


class Batcher:
    """Gathers items of requests into batches, which `score` turns into rows on `executor`.

    Args:
        score: (items, salts) -> rows [N, ...], one an item; runs on the executor.
        batch_pairs, queue_pairs, wait_seconds, deadline_seconds: see `Settings`.
        observe: is told of every batch that was scored: (pairs, seconds).
        failed: is told of every batch that was not: (pairs, requests, why), also where each request of it passes alone.
    """

    def __init__(
        self,
        score: Callable[[list[Any], list[bytes]], np.ndarray],
        executor: Executor,
        *,
        batch_pairs: int,
        queue_pairs: int,
        wait_seconds: float,
        deadline_seconds: float,
        observe: Callable[[int, float], None] = lambda pairs, seconds: None,
        failed: Callable[[int, int, Exception], None] = lambda pairs, requests, error: None,
    ):
        self._score, self._executor, self._observe, self._failed = score, executor, observe, failed
        self.batch_pairs, self.queue_pairs = batch_pairs, queue_pairs
        self.wait_seconds, self.deadline_seconds = wait_seconds, deadline_seconds
        self.held = 0  # pairs that have a place
        self.failed_in_row = 0  # batches
        self._queue: list[_Work] = []  # in the order of their turns
        self._arrived = asyncio.Event()
        self._recent = (0.0, 0.0)  # pairs, seconds

    def expected_seconds(self, pairs: int) -> float:
        """What scoring so many takes, at the rate of the last batches; 0 before the first."""
        counted, seconds = self._recent
        return pairs * seconds / counted if counted else 0.0

    @contextlib.contextmanager
    def place(self, pairs: int) -> Iterator[Place]:
        """Hold room for a request, from before it is tokenized to its end, however it ends.

        Raises:
            QueueFull: there is not so much room, or it would be scored too late. An idle service refuses nobody: its
                rate may be one of long ago, or of a first batch that was compiled.
        """
        wait, whole = self.expected_seconds(self.held), self.expected_seconds(self.held + pairs)
        late = wait > START * self.deadline_seconds or whole > FINISH * self.deadline_seconds
        if self.held and (late or self.held + pairs > self.queue_pairs):
            raise QueueFull(wait)
        held = Place(pairs)
        self.held += pairs
        try:
            yield held
        finally:
            self.held -= held.pairs

    async def score(self, items: Sequence[Any], salt: bytes, place: Place) -> Scored:
        """The rows of `items`, which are at least one. Cancelling it takes what is not yet scored out of the queue.

        Raises:
            Whatever scoring these items raises; other requests of the batch are scored all the same.
        """
        since = time.perf_counter()
        turn = since + min(self.expected_seconds(len(items)), YIELD * self.deadline_seconds)
        work = _Work(items, salt, place, asyncio.get_running_loop().create_future(), since, turn)
        bisect.insort(self._queue, work, key=lambda one: one.turn)
        self._arrived.set()
        try:
            await work.done
        finally:
            if work in self._queue:
                self._queue.remove(work)
        return Scored(np.concatenate(work.rows), work.started - work.since, work.compute)

    async def run(self) -> None:
        """Score what arrives, until cancelled."""
        while True:
            await self._gather()
            pieces = self._take()
            if not pieces:
                continue
            if not await self._score_pieces(pieces) and len(pieces) > 1:
                for piece in pieces:  # one request's failure is not the others'
                    await self._score_pieces([piece])

    async def _gather(self) -> None:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        until = min(work.since for work in self._queue) + self.wait_seconds
        while self._queue and sum(work.left for work in self._queue) < self.batch_pairs:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), max(0.0, until - time.perf_counter()))
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Work, slice]]:
        """The next batch; who has more than fits keeps its turn with the rest."""
        pieces, room = [], self.batch_pairs
        while self._queue and room:
            work = self._queue[0]
            work.started = work.started or time.perf_counter()
            piece = slice(work.taken, work.taken + min(room, work.left))
            work.taken = piece.stop
            room -= piece.stop - piece.start
            pieces.append((work, piece))
            if not work.left:
                self._queue.pop(0)
        return pieces

    async def _score_pieces(self, pieces: list[tuple[_Work, slice]]) -> bool:
        """Whether it went well. A failure is told to the one request it belongs to, where there is but one."""
        pieces = [(work, piece) for work, piece in pieces if not work.done.done()]
        if not pieces:
            return True
        items = [item for work, piece in pieces for item in work.items[piece]]
        salts = [work.salt for work, piece in pieces for _ in work.items[piece]]

        def score() -> tuple[np.ndarray, float]:  # an explanation may hold the executor: that wait is no scoring
            start = time.perf_counter()
            return self._score(items, salts), time.perf_counter() - start

        try:
            rows, seconds = await asyncio.get_running_loop().run_in_executor(self._executor, score)
        except Exception as error:
            self.failed_in_row += 1
            self._failed(len(items), len(pieces), error)
            if len(pieces) == 1 and not pieces[0][0].done.done():
                pieces[0][0].done.set_exception(error)
            return False
        self.failed_in_row = 0
        self._recent = tuple(FORGET * old + new for old, new in zip(self._recent, (len(items), seconds), strict=True))
        self._observe(len(items), seconds)
        begin = 0
        for work, piece in pieces:
            count = piece.stop - piece.start
            self._give(work, rows[begin : begin + count], seconds)
            begin += count
        return True

    def _give(self, work: _Work, rows: np.ndarray, seconds: float) -> None:
        work.rows.append(rows)
        work.compute += seconds
        if work.done.done():
            return
        work.place.pairs -= len(rows)
        self.held -= len(rows)
        if sum(map(len, work.rows)) == len(work.items):
            work.done.set_result(None)
