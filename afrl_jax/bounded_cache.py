"""A cache bounded in bytes that forgets what was used least recently."""

from __future__ import annotations

import collections
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key, at most `capacity` bytes of them.

    Attributes:
        bytes: held now.
        hits, misses, evictions: since the beginning.
    """

    def __init__(self, capacity: int):
        self.capacity, self.bytes = capacity, 0
        self.hits = self.misses = self.evictions = 0
        self._values: collections.OrderedDict[Hashable, tuple[Value, int]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable) -> Value | None:
        """The value, which now counts as used, or None."""
        if key not in self._values:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Hold a value of `size` bytes; the least recently used make room. A value beyond the capacity is not held."""
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]
        if size > self.capacity:
            return
        while self.bytes + size > self.capacity:
            self.bytes -= self._values.popitem(last=False)[1][1]
            self.evictions += 1
        self._values[key] = value, size
        self.bytes += size
