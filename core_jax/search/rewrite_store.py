"""The near-line store of rewrites: written after a promotion, read by the search engine under `Context.key`.

A search must never depend on it, and never trust it. An entry is sealed with a secret (HMAC-SHA256) over key, text,
version and times, so that whatever else finds its way into the store is refused like a missing entry; so are entries
that have expired, that another version of the rewriter wrote, and texts that `Refusals` does not let pass. `SQLite` is
a file; `Redis` is a server that many searchers share and that expires entries by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import sqlite3
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

WEEK = 7 * 24 * 3600.0  # seconds
# Characters without a shape that are no control characters, or that some script's spelling needs.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c\u200d\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Scripts whose words stand alone: others write them without blanks, or join articles and particles to them.
_ALONE = ("LATIN ", "GREEK ", "CYRILLIC ", "DIGIT ")


class Backend(Protocol):
    """Bytes under keys. `seconds` is how long an entry is worth keeping."""

    def write(self, entries: Mapping[str, bytes], seconds: float) -> None: ...

    def read(self, key: str) -> bytes | None: ...


class SQLite:
    """Entries in a file; any number of processes read while one writes."""

    def __init__(self, file: Path | str, *, timeout: float = 1.0):
        self._file, self._timeout = str(file), timeout
        with self._connected() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS rewrites (key TEXT PRIMARY KEY, entry BLOB, until REAL)")

    def write(self, entries: Mapping[str, bytes], seconds: float) -> None:
        """All entries or none; entries whose time is over are dropped."""
        now = time.time()
        with self._connected() as connection:
            rows = [(key, entry, now + seconds) for key, entry in entries.items()]
            connection.execute("DELETE FROM rewrites WHERE until < ?", (now,))
            connection.executemany("INSERT OR REPLACE INTO rewrites VALUES (?, ?, ?)", rows)

    def read(self, key: str) -> bytes | None:
        with self._connected() as connection:
            row = connection.execute("SELECT entry FROM rewrites WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _connected(self) -> _Connection:
        # A connection a call: they may not cross threads, and opening one costs tens of microseconds.
        return _Connection(sqlite3.connect(self._file, timeout=self._timeout))


class _Connection:
    """A transaction whose connection is closed at its end, which sqlite3's own context manager leaves open."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.__enter__()
        return self._connection

    def __exit__(self, *error: object) -> None:
        try:
            self._connection.__exit__(*error)
        finally:
            self._connection.close()


class Redis:
    """Entries on a Redis server, under `prefix` + key."""

    def __init__(self, url: str, *, timeout: float = 1.0, prefix: str = "rewrite:"):
        import redis  # a client that only those need who have such a server

        # No retry: a search goes on without its rewrite sooner than it waits.
        self._client = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=None)
        self._prefix = prefix

    def write(self, entries: Mapping[str, bytes], seconds: float) -> None:
        with self._client.pipeline() as pipeline:
            for key, entry in entries.items():
                pipeline.set(self._prefix + key, entry, px=math.ceil(1000 * seconds))
            pipeline.execute()

    def read(self, key: str) -> bytes | None:
        return self._client.get(self._prefix + key)


def open_backend(url: str, *, timeout: float = 1.0) -> Backend:
    """`redis://host:port/0` (or rediss://, unix://) is a server, anything else the path of an SQLite file.

    Raises:
        ValueError: the address is that of no store that is known.
        ConnectionError: the file cannot be opened.
    """
    server = is_server(url)
    with _as_connection_error():
        return Redis(url, timeout=timeout) if server else SQLite(url.removeprefix("sqlite:///"), timeout=timeout)


def is_server(url: str) -> bool:
    """Whether the address is that of a server; a ValueError where it is of no store that is known."""
    scheme, given, _ = url.partition("://")
    if given and scheme not in ("redis", "rediss", "unix", "sqlite"):
        raise ValueError(f"{url}: a store is redis://, rediss://, unix:// or the path of an SQLite file")
    return bool(given) and scheme != "sqlite"


def read_secret(file: Path) -> bytes:
    """The secret that seals a run's rewrites, made by the first who asks, readable by its owner alone."""
    if not file.exists():
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as written:  # nobody else reads it
            written.write(secrets.token_bytes(32))
            written.flush()
            with contextlib.suppress(FileExistsError):  # made meanwhile: that one counts
                os.link(written.name, file)
    return file.read_bytes()


@dataclasses.dataclass(frozen=True, slots=True)
class Refusals:
    """What may not be shown to a search engine, whoever wrote it.

    Attributes:
        most_characters: of a rewrite.
        unsafe: words, or several in a row, that no rewrite may hold; compared without case, compatibility forms undone
            (NFKC), any blanks as one, and without what nobody sees: joiners, fillers, variation selectors.
    """

    most_characters: int = 128
    unsafe: frozenset[str] = frozenset()

    def __post_init__(self):
        object.__setattr__(self, "unsafe", frozenset(map(_plain, self.unsafe)) - {""})

    def reason(self, text: str) -> str | None:
        """Why a rewrite is refused, None where it may pass."""
        plain = _plain(text)
        if not plain:
            return "empty"
        if len(text) > self.most_characters:
            return "overlong"
        # Joiners belong to the spelling of Persian and of Indic scripts.
        if any(
            unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for c in text if c not in "\u200c\u200d"
        ):
            return "control characters"
        if any(_holds(plain, word) for word in self.unsafe):
            return "unsafe"
        return None


def read_refusals(words: Path | str | None) -> Refusals:
    """What is refused by default, and the words of a file, a line each; none for "" and None."""
    lines = Path(words).read_text(encoding="utf-8-sig").splitlines() if words else []  # Windows begins it with a mark
    return Refusals(unsafe=frozenset(lines))


@contextlib.contextmanager
def _as_connection_error() -> Iterator[None]:
    """Clients of stores raise errors of their own."""
    try:
        yield
    except Exception as error:
        raise ConnectionError(f"the store of rewrites: {type(error).__name__}: {error}") from error


def _plain(text: str) -> str:
    seen = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(unicodedata.normalize("NFKC", seen).casefold().split())


def _holds(text: str, word: str) -> bool:
    """Whether the text holds the word: in scripts whose words stand alone as a whole word, in others anywhere."""
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not (_joined(text[start - 1 : start], text[start]) or _joined(text[end - 1], text[end : end + 1])):
            return True
        start = text.find(word, start + 1)
    return False


def _joined(before: str, after: str) -> bool:
    """Whether one word holds both characters; each may be "", the end of the text."""
    return all(each and unicodedata.name(each, "").startswith(_ALONE) for each in (before, after))


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What the store says of a context: the rewrite, or None and why there is none."""

    text: str | None
    reason: str  # "used", "absent", "expired", "stale", "not sealed", or what `Refusals` says


class RewriteStore:
    """Rewrites of one version of the rewriter, by context.

    Args:
        backend: where entries are kept.
        secret: seals entries; at least 16 bytes, the same for the program that writes and those that read.
        seconds: how long a rewrite is used after it was written.
        refusals: applied to what is written and to what is read.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        backend: Backend,
        secret: bytes,
        *,
        seconds: float = 2 * WEEK,
        refusals: Refusals = Refusals(),
        clock: Callable[[], float] = time.time,
    ):
        if len(secret) < 16:
            raise ValueError("the secret that seals rewrites has fewer than 16 bytes")
        self._backend, self._secret, self._seconds = backend, secret, seconds
        self._refusals, self._clock = refusals, clock

    def write(self, version: str, rewrites: Iterable[tuple[str, str]]) -> dict[str, int]:
        """Store the rewrites (context key, text) that a version made; how many were written, and refused by reason.

        Raises:
            ConnectionError: the backend does not take them.
        """
        entries, counts = {}, {"written": 0}
        until = self._clock() + self._seconds
        for key, text in rewrites:
            reason = self._refusals.reason(text)
            counts[reason or "written"] = counts.get(reason or "written", 0) + 1
            if reason is None:
                fields = [version, text, until]
                entries[key] = json.dumps([*fields, self._seal(key, fields)]).encode()
        with _as_connection_error():
            self._backend.write(entries, self._seconds)
        return counts

    def check(self) -> None:
        """Raise ConnectionError where the backend does not answer."""
        with _as_connection_error():
            self._backend.read("")

    def read(self, key: str, version: str) -> Found:
        """The rewrite that this version made for a context.

        Raises:
            Exception: whatever the backend raises when it is down; the engine takes that for a missing rewrite.
        """
        entry = self._backend.read(key)
        if entry is None:
            return Found(None, "absent")
        try:
            *fields, seal = json.loads(entry)
            writer, text, until = fields
            sealed = hmac.compare_digest(self._seal(key, fields), seal)
        except (ValueError, TypeError, RecursionError):
            sealed = False
        if not sealed:
            return Found(None, "not sealed")
        if writer != version:
            return Found(None, "stale")
        if until <= self._clock():
            return Found(None, "expired")
        reason = self._refusals.reason(text)
        return Found(None, reason) if reason else Found(text, "used")

    def _seal(self, key: str, fields: Sequence[object]) -> str:
        return hmac.new(self._secret, json.dumps([key, *fields]).encode(), hashlib.sha256).hexdigest()
