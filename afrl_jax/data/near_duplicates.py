"""Texts that are nearly the same: by the Jaccard similarity of their shingles, candidates from MinHash bands.

Every reported pair was compared exactly; MinHash (Broder 1997) only decides which pairs are compared.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

_BANDS, _ROWS = 24, 3  # a pair of similarity .8 is compared with probability 1 - (1 - .8^3)^24, above 0.9999999
_PRIME = (1 << 31) - 1
_SHINGLE = 4  # characters


def shingles(text: str) -> frozenset[int]:
    """Hashes of the text's runs of 4 characters, lower case, white space as one blank; a shorter text is one run."""
    plain = " ".join(text.lower().split())
    runs = {plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1))}
    return frozenset(zlib.crc32(run.encode()) for run in runs)


def similarity(one: frozenset[int], two: frozenset[int]) -> float:
    """Jaccard: |one and two| / |one or two|, both not empty."""
    return len(one & two) / len(one | two)


def _bands(sets: Sequence[frozenset[int]]) -> np.ndarray:
    """MinHash signatures cut into bands, int64 [N, bands, rows]."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, _PRIME, (2, _BANDS * _ROWS, 1), dtype=np.int64)
    hashed = [((a * (np.fromiter(s, np.int64, len(s)) % _PRIME) + b) % _PRIME).min(axis=1) for s in sets]
    return np.array(hashed).reshape(len(sets), _BANDS, _ROWS)


def near(
    texts: Sequence[str], threshold: float = 0.8, *, known: Sequence[str] = ()
) -> Iterator[tuple[int, str, float]]:
    """(index, the other text, similarity) of each text that is at least so similar to a known one, or to one before it
    that was not itself reported: without the reported texts no near duplicates that were compared are left. The other
    text is the most similar one, a known one before any other."""
    sets = [shingles(text) for text in (*known, *texts)]
    if not texts:
        return
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for place, bands in enumerate(_bands(sets)):
        keys = [(number, band.tobytes()) for number, band in enumerate(bands)]
        if place >= len(known):
            others = dict.fromkeys(other for key in keys for other in buckets[key])
            alike = [
                (other < len(known), likeness, -other)
                for other in others
                if (likeness := similarity(sets[place], sets[other])) >= threshold
            ]
            if alike:
                _, likeness, other = max(alike)
                yield place - len(known), (*known, *texts)[-other], likeness
                continue
        for key in keys:
            buckets[key].append(place)
