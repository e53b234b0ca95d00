"""Rows: how token sequences are laid out for one forward pass, and which positions a loss looks at.

A `Group` is a trunk of shared tokens and branches that continue it (see `lm_jax.decoder`). One query with its
documents, one prompt with its sampled answers, or a lone text (an empty trunk, one branch) are all groups. Groups are
packed into rows of T tokens. Only M *target* positions a row reach the vocabulary head, so a row that trains one label
token a pair pays for one; and Q *label slots* a row are where a grade is read off the label tokens alone.

Everything here is NumPy on the host; a batch is a dictionary of arrays:

    tokens, positions, groups, branches   int32 [B, T]   group 0 is padding
    at, target, segment                   int32 [B, M]   hidden state `at` predicts `target`; segment -1 is padding
    label_at                              int32 [B, Q]   where the grade is read; label_unit is 0 on padding
    <name>                                float32 [B, M] or [B, Q, ...]   what objectives add: weights, advantages, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

Batch = dict[str, np.ndarray]


def rounded_width(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192, ... that holds `length`: two sizes an octave."""
    octave = max(32, 1 << (length - 1).bit_length())
    return octave * 3 // 4 if octave > 32 and length <= octave * 3 // 4 else octave


@dataclasses.dataclass(frozen=True)
class Branch:
    """Input tokens and the targets predicted at the last `len(targets)` of them, unless `at` says where.

    `token_values` are floats a target ([n] each), `label_values` floats for the label slot, which is the position that
    predicts the first target, or the last input where there are no targets (None: this branch has no label slot).
    `at` are indices of inputs, one a target: so a hidden state may be asked for what is not the next input.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    token_values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    label_values: Mapping[str, np.ndarray | float] | None = None
    at: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        """The index of the input that predicts each target."""
        return np.arange(len(self.inputs) - len(self.targets), len(self.inputs)) if self.at is None else self.at


@dataclasses.dataclass(frozen=True)
class Group:
    trunk: np.ndarray
    branches: Sequence[Branch]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static sizes of a row: T tokens, M targets, Q label slots; and the per-target and per-slot floats it carries."""

    tokens: int
    targets: int
    labels: int
    token_values: tuple[str, ...] = ()
    label_values: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (name, trailing shape)

    def fits(self, tokens: int, targets: int, labels: int) -> bool:
        return tokens <= self.tokens and targets <= self.targets and labels <= self.labels


Row = list[tuple[int, tuple[int, ...]]]  # (index of a group, indices of its branches)


def plan_rows(
    groups: Sequence[Group], shape: RowShape, *, branches_together: int, seed: int, open_rows: int = 16
) -> list[Row]:
    """Pack all branches of all groups into rows, first fit over a few open rows, in an order drawn from `seed`.

    Args:
        branches_together: at most so many branches of a group share one copy of its trunk: more saves tokens, fewer
            mixes queries better.

    Raises:
        ValueError: a trunk with one branch does not fit a row; names the group and the sizes.
    """
    random = np.random.default_rng(seed)
    pieces: Row = []
    for index, group in enumerate(groups):
        order = random.permutation(len(group.branches))
        chosen: list[int] = []
        for branch in order.tolist():
            if chosen and (len(chosen) == branches_together or not shape.fits(*_size(group, [*chosen, branch]))):
                pieces.append((index, tuple(chosen)))
                chosen = []
            chosen.append(branch)
            if len(chosen) == 1 and not shape.fits(*_size(group, chosen)):
                tokens, targets, labels = _size(group, chosen)
                raise ValueError(
                    f"group {index} needs a row of {tokens} tokens, {targets} targets and {labels} label slots; "
                    f"rows have {shape.tokens}, {shape.targets} and {shape.labels}"
                )
        if chosen:
            pieces.append((index, tuple(chosen)))
    closed: list[Row] = []
    opened: list[tuple[np.ndarray, Row]] = []
    for position in random.permutation(len(pieces)).tolist():
        index, chosen = pieces[position]
        size = np.array(_size(groups[index], chosen))
        for used, row in opened:
            if shape.fits(*(used + size)):
                used += size
                row.append((index, chosen))
                break
        else:
            if len(opened) == open_rows:
                closed.append(opened.pop(0)[1])
            opened.append((size, [(index, chosen)]))
    return closed + [row for _, row in opened]


def _size(group: Group, chosen: Iterable[int]) -> tuple[int, int, int]:
    branches = [group.branches[index] for index in chosen]
    tokens = len(group.trunk) + sum(len(branch.inputs) for branch in branches)
    return tokens, sum(len(b.targets) for b in branches), sum(b.label_values is not None for b in branches)


def render_row(groups: Sequence[Group], row: Row, shape: RowShape) -> Batch:
    """The arrays of one row (no leading B)."""
    arrays: Batch = {
        name: np.zeros(size, np.int32)
        for names, size in (
            (("tokens", "positions", "groups", "branches"), shape.tokens),
            (("at", "target"), shape.targets),
            (("label_at",), shape.labels),
        )
        for name in names
    }
    arrays["segment"] = np.full(shape.targets, -1, np.int32)
    arrays |= {name: np.zeros(shape.targets, np.float32) for name in shape.token_values}
    arrays |= {name: np.zeros((shape.labels, *trailing), np.float32) for name, trailing in shape.label_values}
    token = target = label = 0

    def place(ids: np.ndarray, start: int, group: int, branch: int) -> None:
        here = slice(token, token + len(ids))
        arrays["tokens"][here] = ids
        arrays["positions"][here] = np.arange(start, start + len(ids))
        arrays["groups"][here] = group
        arrays["branches"][here] = branch

    for number, (index, chosen) in enumerate(row, start=1):
        group = groups[index]
        place(group.trunk, 0, number, 0)
        token += len(group.trunk)
        for order, branch in enumerate((group.branches[i] for i in chosen), start=1):
            place(branch.inputs, len(group.trunk), number, order)
            at = token + branch.places
            token += len(branch.inputs)
            here = slice(target, target + len(branch.targets))
            arrays["at"][here] = at
            arrays["target"][here] = branch.targets
            arrays["segment"][here] = branch.segments
            for name in shape.token_values:
                arrays[name][here] = branch.token_values.get(name, 0.0)
            target += len(branch.targets)
            if branch.label_values is not None:
                arrays["label_at"][label] = at[0] if len(at) else token - 1
                for name, _ in shape.label_values:
                    arrays[name][label] = branch.label_values.get(name, 0.0)
                label += 1
    return arrays


def empty_row(shape: RowShape) -> Batch:
    """A row of padding, to fill a batch."""
    return render_row([], [], shape)


def abstract_batch(shape: RowShape, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch, to trace or compile for it without any data."""
    return {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for name, x in empty_row(shape).items()}


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows to a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
