"""Which prompts come together: rows of a token budget out of prompts of like length, in few shapes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Sequence

from lm_jax.rows import rounded_width

SMALLEST_ROW = 64
PREFIXES = 16  # of one batch at most: each is copied for it
LOOK_AHEAD = 32  # items that a gap at the end of a row is offered to


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of item numbers, and the shape they are computed in: see `lm_jax.shared_prefix`."""

    rows: list[list[int]]
    tokens: int  # T of each row
    width: int  # W, of the longest item
    slots: int  # U of each row
    prefixes: int  # P

    @property
    def items(self) -> list[int]:
        """All of the batch, row by row."""
        return [item for row in self.rows for item in row]

    @property
    def first(self) -> int:
        """One item of the batch."""
        return next(item for row in self.rows for item in row)

    @property
    def shape(self) -> tuple[int, ...]:
        """All that decides what is compiled: B, T, W, U, P."""
        return len(self.rows), self.tokens, self.width, self.slots, self.prefixes


def row_sizes(budget: int) -> list[int]:
    """The sizes T of rows, smallest first, the last at least `budget`."""
    sizes = [SMALLEST_ROW]
    while sizes[-1] < budget:
        sizes.append(2 * sizes[-1])
    return sizes


def slots_of(tokens: int, width: int) -> int:
    """U of a row: what items of three quarters of the width fill; for attention a row is U x W."""
    return -(-4 * tokens // (3 * width))


def plan(
    lengths: Sequence[int],
    prefix_of: Sequence[int],
    kinds: Sequence[Hashable],
    *,
    budget: int,
    rows: int = 1,
) -> list[Batch]:
    """Every item in one row of one batch.

    Items of different kinds never come together. Inside a kind the longest come first and those of one prefix side by
    side; an item joins others of up to twice its width. A row takes `budget` tokens, or the longest item if that is
    more; the last batches are smaller.

    Args:
        lengths: tokens of each item, at least 1.
        prefix_of: which prefix it continues.
        kinds: sortable, what keeps items apart.
        rows: of each batch, the devices that share it; some may stay empty.
    """
    widths = [rounded_width(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (kinds[i], -widths[i], prefix_of[i]))
    batches = []
    for _, members in itertools.groupby(order, key=lambda i: kinds[i]):
        waiting = list(members)
        left = sum(lengths[i] for i in waiting)
        while waiting:
            width = widths[waiting[0]]
            share = -(-left // rows) + (width if rows > 1 else 0)  # whole items do not divide evenly
            tokens = row_sizes(max(width, min(budget, share)))[-1]
            filled, waiting = _fill(waiting, lengths, widths, prefix_of, rows, tokens, slots_of(tokens, width))
            sums = [sum(lengths[i] for i in row) for row in filled]
            left, used = left - sum(sums), max(sums)
            count = max(map(len, filled))
            tokens = next(t for t in row_sizes(tokens) if t >= max(used, width) and slots_of(t, width) >= count)
            slots = slots_of(tokens, width)
            several = len({prefix_of[i] for row in filled for i in row}) > 1
            batches.append(Batch(filled, tokens, width, slots, _prefixes_of(slots * rows) if several else 1))
    return batches


def shapes(rows: int, *, longest: int, budget: int) -> list[Batch]:
    """An empty batch of every shape that items of up to `longest` tokens can be planned into."""
    widths = sorted({rounded_width(length) for length in range(1, longest + 1)})
    largest = row_sizes(max(budget, widths[-1]))
    found = []
    for tokens in largest:
        for width in (width for width in widths if width <= tokens):
            slots = slots_of(tokens, width)
            for prefixes in sorted({1, _prefixes_of(slots * rows)}):
                found.append(Batch([[] for _ in range(rows)], tokens, width, slots, prefixes))
    return found


def _prefixes_of(slots: int) -> int:
    return min(PREFIXES, slots)


def _fill(
    waiting: list[int],
    lengths: Sequence[int],
    widths: Sequence[int],
    prefix_of: Sequence[int],
    rows: int,
    tokens: int,
    slots: int,
) -> tuple[list[list[int]], list[int]]:
    """Rows of `tokens`, taken from the front of `waiting`, each gap given to the next item that fits; and the rest."""
    width, prefixes = widths[waiting[0]], set()
    filled: list[list[int]] = []
    for _ in range(rows):
        row: list[int] = []
        rest: list[int] = []
        free = tokens
        for place, item in enumerate(waiting):
            if len(row) == slots or 2 * widths[item] < width or len(rest) == LOOK_AHEAD:
                rest += waiting[place:]
                break
            fits = lengths[item] <= free and (prefix_of[item] in prefixes or len(prefixes) < PREFIXES)
            if fits:
                row.append(item)
                prefixes.add(prefix_of[item])
                free -= lengths[item]
            else:
                rest.append(item)
        filled.append(row)
        waiting = rest
    return filled, waiting
