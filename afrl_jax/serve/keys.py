"""API keys: who may ask, and the salt that keeps what is cached for one key from another."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Client:
    """Who asks. `name` is safe to log: the key's place in the file; empty where no keys are asked for."""

    name: str
    salt: bytes


class Keys:
    """The keys that are let in. Only their digests are kept."""

    def __init__(self, keys: Sequence[str]):
        self._secret = secrets.token_bytes(32)  # salts are of this process; nothing of a key can be told from one
        self._digests = [self._digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def client(self, key: str) -> Client | None:
        """The client of a key, None where it is none of ours. Takes as long for any key."""
        given = self._digest(key)
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return Client(f"key {matches.index(True) + 1}", given) if any(matches) else None

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "surrogatepass"), hashlib.sha256)


ANYBODY = Client("", b"")


def read_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """API keys of a file, one a line; blank lines and lines that begin with # are left out.

    Raises:
        ValueError: there is no key, or one that no header can carry. The message does not repeat it.
    """
    with open(path, encoding="utf-8") as file:
        lines = {number: line.strip() for number, line in enumerate(file, start=1)}
    keys = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    if not keys:
        raise ValueError(f"{path}: holds no API key; it has one a line")
    for number, key in keys.items():
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{path}:{number}: a key is printable ASCII without blanks")
    return tuple(keys.values())
