"""The search engine: the original path, and beside it a rewrite, if the store has one in time.

The original path is computed first and whole. It never waits for, reads, or depends on a rewrite. One that is there in
time, sealed, fresh and safe is then consumed; where it is not, or consuming it fails, the results are those of the
original path, bit for bit, and the response says why.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping

from core_jax.schema import Context
from core_jax.search.rewrite_store import Found, RewriteStore
from core_jax.search.stages import LAUNCH_B, ORIGINAL, Clock, Consumption, Result, Stages


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """Results best first, and `original`, those of the path without a rewrite; `rewrite` is what was consumed, None
    nothing, and `reason` says why; the ids of all that recall found; milliseconds by stage (the store's are those spent
    waiting) and in "total"."""

    results: tuple[Result, ...]
    original: tuple[Result, ...]
    rewrite: str | None
    reason: str
    recalled: tuple[str, ...]
    milliseconds: Mapping[str, float]


class Engine:
    """Search that consumes rewrites in parallel.

    Args:
        stages: recall, rawrank and finerank.
        store: of rewrites; None: there are none.
        version: names the rewriter in production at each search; rewrites of another are not used.
        consumption: which stages take rewrites.
        deadline: seconds from its start that a search waits for the store at most; the stages run meanwhile.
        readers: reads of the store at once. While so many hang, searches do without and start no more.
    """

    def __init__(
        self,
        stages: Stages,
        *,
        store: RewriteStore | None = None,
        version: Callable[[], str | None] = lambda: None,
        consumption: Consumption = LAUNCH_B,
        deadline: float = 0.02,
        readers: int = 16,
    ):
        self._stages, self._store, self._version = stages, store, version
        self._consumption, self._deadline = consumption, deadline
        self._readers = threading.BoundedSemaphore(readers)

    def search(
        self,
        context: Context,
        *,
        size: int | None = None,
        rewrite: str | None = None,
        consumption: Consumption | None = None,
    ) -> Response:
        """Search for the query of a context.

        Args:
            size: so many results at most.
            rewrite: consumed as it is; by default the store is asked for one.
            consumption: of this search; by default the engine's.

        Raises:
            Exception: what a stage of the original path raises; never anything of the rewrite's.
        """
        consumption = consumption or self._consumption
        clock = Clock()
        if consumption == ORIGINAL:
            find = lambda: Found(None, "not asked for")
        elif rewrite is not None:
            find = lambda: Found(rewrite, "given")
        elif self._store is None:
            find = lambda: Found(None, "no store")
        else:
            find = self._read_aside(context.key, clock)
        candidates = original = self._stages.original(context.query, clock)
        found = find()
        if found.text is not None and not found.text.strip():
            found = Found(None, "empty")
        elif found.text == context.query:
            found = Found(None, "the query itself")
        if found.text is not None:
            try:
                candidates = self._stages.consume(original, found.text, consumption, clock)
            except Exception as error:  # whatever a rewrite breaks, it may not break the search
                found = Found(None, f"failed: {type(error).__name__}")
        recalled = tuple(document.doc_id for document in candidates.recalled)
        milliseconds = clock.milliseconds | {"total": 1000 * clock.seconds()}
        return Response(
            candidates.results[:size], original.results[:size], found.text, found.reason, recalled, milliseconds
        )

    def _read_aside(self, key: str, clock: Clock) -> Callable[[], Found]:
        """Ask the store in a thread that nobody has to wait for; returns how to get its answer, in time or not."""
        if not self._readers.acquire(blocking=False):
            return lambda: Found(None, "busy")
        answer: queue.SimpleQueue[Found] = queue.SimpleQueue()

        def read() -> None:
            try:
                version = self._version()
                answer.put(self._store.read(key, version) if version else Found(None, "no version in production"))
            except Exception as error:  # the store is down, or returns what it should not
                answer.put(Found(None, f"store: {type(error).__name__}"))
            finally:
                self._readers.release()

        try:
            threading.Thread(target=read, daemon=True).start()
        except RuntimeError as error:  # the system has no thread to give
            self._readers.release()
            reason = f"store: {type(error).__name__}"
            return lambda: Found(None, reason)

        def wait() -> Found:
            with clock.stage("store"):
                try:
                    return answer.get(timeout=max(0.0, self._deadline - clock.seconds()))
                except queue.Empty:
                    return Found(None, "late")

        return wait
