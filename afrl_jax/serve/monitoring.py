"""What the service tells about itself: a line of JSON a request, and metrics for Prometheus."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

import prometheus_client
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afrl_jax.serve.refusals import UNFORESEEN, response

LOGGER = logging.getLogger("afrl_jax.serve")
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)  # what we take over from a client; anything else gets a new one
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def log(event: str, **fields: Any) -> None:
    """One line of JSON, on the logger `afrl_jax.serve`."""
    LOGGER.info(_line(event, **fields))


def _line(event: str, **fields: Any) -> str:
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields})


class JsonLines(logging.Formatter):
    """A line of JSON of every record. Ours are such lines already; of others the traceback is a field."""

    def format(self, record: logging.LogRecord) -> str:
        """See `JsonLines`."""
        if record.name == LOGGER.name:
            return record.getMessage()
        fields = {"logger": record.name, "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return _line("message", **fields)


def log_to_stderr() -> None:
    """All that this process logs, warnings and the choice of kernels included, becomes lines of JSON on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    for name in (LOGGER.name, "kernels"):
        logging.getLogger(name).setLevel(logging.INFO)


@dataclasses.dataclass
class RequestRecord:
    """What is known of a request when it ends. Seconds and counts are of scoring, 0 where nothing was scored."""

    request_id: str
    client: str = ""
    error: str = ""  # what nobody foresaw
    pairs: int = 0
    tokens: int = 0
    queue_seconds: float = 0.0
    tokenize_seconds: float = 0.0
    compute_seconds: float = 0.0


class Metrics:
    """Prometheus metrics of one service, in a registry of its own."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        named = {"namespace": "afrl", "registry": self.registry}
        self.requests = prometheus_client.Counter("requests", "answered, by route", ["route", "status"], **named)
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "from the first byte to the last", ["route"], buckets=SECONDS, **named
        )
        self.stages = prometheus_client.Histogram(
            "stage_seconds", "of a scored request", ["stage"], buckets=SECONDS, **named
        )
        self.batch_pairs = prometheus_client.Histogram("batch_pairs", "scored together", buckets=PAIRS, **named)
        self.batch_seconds = prometheus_client.Histogram("batch_seconds", "of a batch", buckets=SECONDS, **named)
        failed = "not scored; of several requests, each was tried once more by itself"
        self.failed_batches = prometheus_client.Counter("failed_batches", failed, **named)
        self.pairs = prometheus_client.Counter("pairs", "scored", **named)
        self.tokens = prometheus_client.Counter("prompt_tokens", "of scored pairs", **named)
        self.queue_pairs = prometheus_client.Gauge("queue_pairs", "admitted and not yet scored", **named)

    def watch_queue(self, held: Callable[[], int]) -> None:
        """Read the length of the queue when asked for it."""
        self.queue_pairs.set_function(held)

    def batch(self, pairs: int, seconds: float) -> None:
        """A batch was scored."""
        self.batch_pairs.observe(pairs)
        self.batch_seconds.observe(seconds)
        self.pairs.inc(pairs)

    def request(self, route: str, status: int, seconds: float, record: RequestRecord) -> None:
        """A request was answered."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        if record.tokens:
            self.tokens.inc(record.tokens)
            for stage in ("queue", "tokenize", "compute"):
                self.stages.labels(stage).observe(getattr(record, f"{stage}_seconds"))

    def text(self) -> bytes:
        """The exposition format."""
        return prometheus_client.generate_latest(self.registry)


class Monitored:
    """ASGI middleware: every request has an id, which is answered in x-request-id, a log line and its metrics.

    A failure that nobody foresaw is told and answered here, and raised again for the server to write down where it was.

    Args:
        paths: the routes that are told apart, also where a request is refused before it is routed; "/page/*" is
            all that lies in a folder. Any other is "unknown": paths of clients have no end.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Monitored`."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        record = RequestRecord(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["state"] = {**scope.get("state", {}), "record": record}
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            record.error = repr(error)
            if not status:
                await response(UNFORESEEN)(scope, receive, answer)
            raise
        finally:
            seconds = time.perf_counter() - start
            folder = scope["path"].rpartition("/")[0] + "/*"
            route = next((path for path in (scope["path"], folder) if path in self.paths), "unknown")
            self.metrics.request(route, status, seconds, record)
            fields = {name: value for name, value in dataclasses.asdict(record).items() if value}
            for name in [name for name in fields if name.endswith("_seconds")]:
                fields[name.replace("_seconds", "_ms")] = round(1e3 * fields.pop(name), 3)
            total = round(1e3 * seconds, 3)
            log("request", method=scope["method"], route=route, status=status, total_ms=total, **fields)
