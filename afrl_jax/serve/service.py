"""One request from admission to probabilities, and an explanation as it is decoded."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from fastapi import Request

from afrl_jax.answer_format import PromptTokens
from afrl_jax.schema import Document, Query
from afrl_jax.serve.batching import Batcher, QueueFull
from afrl_jax.serve.keys import Client, Keys
from afrl_jax.serve.monitoring import Metrics, RequestRecord, log
from afrl_jax.serve.refusals import CLIENT_CLOSED_REQUEST, Refused
from afrl_jax.serve.scorer import Scorer
from afrl_jax.serve.settings import Settings

Value = TypeVar("Value")
PROBE = (Query("ready", "ready"), Document("ready", "ready"))  # what a doubted model is asked
FAILED_IN_ROW = 3  # batches, after which the service doubts its model: a bad request fails twice, in company and alone


@dataclasses.dataclass
class Answer:
    """Probabilities [N, C] of a request's pairs, and the prompts they were read from."""

    probabilities: np.ndarray
    prompts: list[PromptTokens]

    @property
    def tokens(self) -> int:
        return sum(len(prompt.prefix) + len(prompt.document) for prompt in self.prompts)


class Service:
    """All that lives as long as the server: settings, model, queue, keys, metrics."""

    def __init__(self, name: str, settings: Settings, keys: Sequence[str] = ()):
        self.name, self.settings, self.keys, self.metrics = name, settings, Keys(keys), Metrics()
        self.created = int(time.time())
        self.failure: Exception | None = (
            None  # what ended it before its time, most likely a model that could not be loaded
        )
        self._scorer: Scorer | None = None
        self._phase = "is being loaded"
        self._explaining = 0
        self._executor = ThreadPoolExecutor(1, "scoring")  # the model does one thing at a time

    @property
    def ready(self) -> bool:
        return self._scorer is not None

    @property
    def scorer(self) -> Scorer:
        """The model.

        Raises:
            Refused: it is not loaded yet.
        """
        if self._scorer is None:
            raise Refused(503, f"the model {self._phase}; /ready tells when it is there", retry_after=1)
        return self._scorer

    async def start(self, load: Callable[[], Scorer]) -> None:
        """Load the model, then score until cancelled. What ends it before is kept in `failure`, and raised."""
        try:
            loop = asyncio.get_running_loop()
            scorer = await loop.run_in_executor(self._executor, load)
            query_tokens = min(self.settings.warm_query_tokens, self.settings.max_query_tokens)
            self._phase = "is loaded and being compiled, minutes at the first start"
            log("compiling", model=self.name, told="the first start takes minutes; later ones find what it left")
            await loop.run_in_executor(self._executor, scorer.warm_up, self.settings.batch_pairs, query_tokens)
            self.batcher = Batcher(
                scorer.probabilities,
                self._executor,
                batch_pairs=self.settings.batch_pairs,
                queue_pairs=self.settings.queue_pairs,
                wait_seconds=self.settings.batch_wait_ms / 1e3,
                deadline_seconds=self.settings.deadline_seconds,
                observe=self.metrics.batch,
                failed=self._batch_failed,
            )
            self.metrics.watch_queue(lambda: self.batcher.held)
            self._scorer = scorer
            log("ready", model=self.name, model_version=scorer.model.version)
            await self.batcher.run()
        except Exception as error:
            self.failure = error
            raise

    async def check(self) -> None:
        """Whether the model is there and scores. Where batches failed in a row, a pair is scored to find out.

        Raises:
            Refused: 503.
        """
        scorer = self.scorer
        if self.batcher.failed_in_row < FAILED_IN_ROW:
            return
        try:
            prompts = await asyncio.to_thread(scorer.encode, [PROBE], None)
            with self.batcher.place(len(prompts)) as place:
                async with asyncio.timeout(self.settings.deadline_seconds):
                    await self.batcher.score(prompts, b"", place)
        except Exception as error:
            log("not ready", error=repr(error))
            raise Refused(503, "scoring fails; the service's log has the reason", retry_after=1) from error

    def close(self) -> None:
        """Let the thread of the model end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _batch_failed(self, pairs: int, requests: int, error: Exception) -> None:
        self.metrics.failed_batches.inc()
        where = "".join(traceback.format_exception(error))
        log("batch failed", pairs=pairs, requests=requests, error=repr(error), traceback=where)

    async def score(
        self,
        request: Request,
        client: Client,
        pairs: Sequence[tuple[Query, Document]],
        *,
        max_document_tokens: int | None = None,
        query_field: str = "query",
    ) -> Answer:
        """Probabilities of the pairs, at least one, within the deadline. The request's `query_field` has the query.

        Raises:
            Refused: 422 a query of too many tokens, 429 no place, 504 too late, 503 no model yet, 500 scoring failed,
                499 the client is gone.
        """
        record: RequestRecord = request.state.record
        scorer, record.pairs, record.client = self.scorer, len(pairs), client.name
        try:
            with self.batcher.place(len(pairs)) as place:
                async with asyncio.timeout(self.settings.deadline_seconds):
                    start = time.perf_counter()
                    prompts = await asyncio.to_thread(scorer.encode, pairs, max_document_tokens, client.salt)
                    record.tokenize_seconds = time.perf_counter() - start
                    longest = max(len(one.prefix) for one in prompts) - len(scorer.model.format.head_tokens)
                    if longest > (limit := self.settings.max_query_tokens):
                        told = f"{query_field}: {longest} tokens, context included; {limit} are allowed"
                        raise Refused(422, told, param=query_field)
                    scored = await _while_connected(request, self.batcher.score(prompts, client.salt, place))
        except QueueFull as error:
            raise Refused(429, "too many requests wait; try again later", retry_after=error.retry_after) from error
        except TimeoutError as error:
            raise Refused(504, f"not scored within {self.settings.deadline_seconds:g} s") from error
        except Refused:
            raise
        except Exception as error:
            log("scoring failed", request_id=record.request_id, error=repr(error))
            raise Refused(500, "scoring failed; the service's log has the reason under the request id") from error
        answer = Answer(scored.rows, prompts)
        record.queue_seconds, record.compute_seconds = scored.queue_seconds, scored.compute_seconds
        record.tokens = answer.tokens
        return answer

    @contextlib.contextmanager
    def place_to_explain(self) -> Iterator[None]:
        """Hold one of the places for explanations.

        Raises:
            Refused: 429, all are taken.
        """
        if self._explaining >= self.settings.max_explanations:
            raise Refused(429, "too many explanations are being written; try again later", retry_after=1)
        self._explaining += 1
        try:
            yield
        finally:
            self._explaining -= 1

    async def explain(
        self, prompt: PromptTokens, grade: str, max_tokens: int, salt: bytes
    ) -> AsyncIterator[tuple[str, bool]]:
        """See `Scorer.explanation`; each step takes its turn between batches.

        Raises:
            TimeoutError: it is not done within the deadline.
        """
        steps = self.scorer.explanation(prompt, grade, max_tokens, salt)
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.deadline_seconds
        while True:
            async with asyncio.timeout_at(until):
                step = await loop.run_in_executor(self._executor, next, steps, None)
            if step is None:
                return
            yield step


async def _while_connected(request: Request, answer: Awaitable[Value]) -> Value:
    """The answer; where the client leaves before, nobody needs it and it is cancelled.

    Raises:
        Refused: 499, the client is gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Refused(CLIENT_CLOSED_REQUEST, "the client has left")
        return await answering
    finally:
        answering.cancel()
        leaving.cancel()
