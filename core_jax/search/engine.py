"""The search engine: the original path, and beside it a rewrite, if the store has one in time.

The original path is computed first and whole. It never waits for, reads, or depends on a rewrite. One that is there in
time, sealed, fresh and safe is then consumed; where it is not, or consuming it fails or takes too long, the results are
those of the original path, bit for bit, and the response says why.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from afrl_jax.schema import Document
from core_jax.schema import Context
from core_jax.search.rewrite_store import Found, Refusals, RewriteStore
from core_jax.search.stages import LAUNCH_B, ORIGINAL, Candidates, Clock, Consumption, Result, Stages, TooLate
from lm_jax import run_log

T = TypeVar("T")
WARM_SEARCHES = 32  # no search met a new shape after so many, in the world of clips


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
        refusals: applied to rewrites that a search is given, the default ones if None; a store has its own.
        consumption: which stages take rewrites.
        deadline: seconds from its start that a search waits for the store at most; the stages run meanwhile.
        patience: seconds from its start in which a search must have consumed its rewrite, or does without; None: any
            time. After them no stage begins for a rewrite; one that has begun ends unseen.
        readers: reads of the store at once. While so many hang, searches do without and start no more.
        consumers: rewrites consumed at once, likewise. They and the original paths of others take turns at finerank:
            few, so that under load rewrites are given up and no search is late for them.
    """

    def __init__(
        self,
        stages: Stages,
        *,
        store: RewriteStore | None = None,
        version: Callable[[], str | None] = lambda: None,
        refusals: Refusals | None = None,
        consumption: Consumption = LAUNCH_B,
        deadline: float = 0.02,
        patience: float | None = None,
        readers: int = 16,
        consumers: int = 4,
    ):
        self.version, self._stages, self._store, self._refusals = version, stages, store, refusals or Refusals()
        self._consumption, self._deadline, self._patience = consumption, deadline, patience
        self._readers, self._consumers = threading.BoundedSemaphore(readers), threading.BoundedSemaphore(consumers)

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
            rewrite: consumed unless refused; by default the store is asked for one.
            consumption: of this search; by default the engine's.

        Raises:
            Exception: what a stage of the original path raises; never anything of the rewrite's.
        """
        consumption = consumption or self._consumption
        clock = Clock()
        if consumption == ORIGINAL:
            find = lambda: Found(None, "not asked for")
        elif rewrite is not None:
            reason = self._refusals.reason(rewrite)
            find = lambda: Found(None, reason) if reason else Found(rewrite, "given")
        elif self._store is None:
            find = lambda: Found(None, "no store")
        else:
            find = self._read_aside(context.key, clock)
        candidates = original = self._stages.original(context.query, clock)
        found = find()
        if found.text == context.query:
            found = Found(None, "the query itself")
        if found.text is not None:
            left = math.inf if self._patience is None else self._patience - clock.seconds()
            aside = Clock(limit=left)  # of its own: what comes too late may not write into the response
            consume = lambda text=found.text: self._stages.consume(original, text, consumption, aside)
            try:
                candidates = self._in_time(consume, left)
                for stage, milliseconds in aside.milliseconds.items():
                    clock.milliseconds[stage] = clock.milliseconds.get(stage, 0.0) + milliseconds
            except _Busy:
                found = Found(None, "busy")
            except (queue.Empty, TooLate):
                found = Found(None, "consumed too late")
            except Exception as error:  # whatever a rewrite breaks, it may not break the search
                found = Found(None, f"failed: {type(error).__name__}")
        recalled = tuple(document.doc_id for document in candidates.recalled)
        milliseconds = clock.milliseconds | {"total": 1000 * clock.seconds()}
        return Response(
            candidates.results[:size], original.results[:size], found.text, found.reason, recalled, milliseconds
        )

    def _in_time(self, consume: Callable[[], Candidates], left: float) -> Candidates:
        """What `consume` returns; raises queue.Empty where it does not within the seconds that are left."""
        if left <= 0:
            raise queue.Empty
        return consume() if math.isinf(left) else _aside(consume, self._consumers)(left)

    def _read_aside(self, key: str, clock: Clock) -> Callable[[], Found]:
        """Ask the store in a thread that nobody has to wait for; returns how to get its answer, in time or not."""

        def read() -> Found:
            version = self.version()
            return self._store.read(key, version) if version else Found(None, "no version in production")

        try:
            get = _aside(read, self._readers)
        except _Busy:
            return lambda: Found(None, "busy")
        except RuntimeError as error:
            reason = f"store: {type(error).__name__}"
            return lambda: Found(None, reason)

        def wait() -> Found:
            with clock.stage("store"):
                try:
                    return get(self._deadline - clock.seconds())
                except queue.Empty:
                    return Found(None, "late")
                except Exception as error:  # the store is down, or returns what it should not
                    return Found(None, f"store: {type(error).__name__}")

        return wait


def warm_up(stages: Stages, documents: Sequence[Document]) -> None:
    """Search for some titles, from one word to all of them: what is compiled meanwhile no search waits for.

    Shapes follow from how many documents are scored and how long they are, so that most are met soon.
    """
    engine, draw = Engine(stages), random.Random(0)
    titles = [document.title for document in documents if document.title.strip()] or ["?"]
    for _ in run_log.progress(range(WARM_SEARCHES), "compiling", WARM_SEARCHES):
        words = draw.choice(titles).split()
        engine.search(Context(" ".join(words[: draw.randint(1, len(words))])), rewrite=draw.choice(titles))


class _Busy(Exception):
    """As many threads as may hang do."""


def _aside(work: Callable[[], T], places: threading.Semaphore) -> Callable[[float], T]:
    """Start work in a thread that nobody has to wait for, if a place is free.

    Returns:
        (seconds) -> what the work returns or raises; raises queue.Empty where it is not done by then.

    Raises:
        _Busy: no place is free.
        RuntimeError: the system has no thread to give.
    """
    if not places.acquire(blocking=False):
        raise _Busy
    answer: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except Exception as error:
            answer.put((None, error))
        finally:
            places.release()

    def get(seconds: float) -> T:
        found, error = answer.get(timeout=max(0.0, seconds))
        if error is not None:
            raise error
        return found

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError:
        places.release()
        raise
    return get
