"""What a Pallas kernel may keep in a TPU core's fast memory (VMEM), and which tiles fit into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jax.experimental.pallas import tpu as pltpu

VMEM_BYTES = 48 * 2**20  # every kernel keeps below it and tells the compiler so; a v5p core has 64 MiB, v5e and v6e 128
PLANNED = VMEM_BYTES * 9 // 10  # what kernels plan to fill: the compiler has needed 6% more than was counted
LANES = 128  # of a vector register: the last axis of an array is padded to a multiple of it


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def parts(entries: int, width: int) -> int:
    """Bytes of the three bf16 parts into which operands of `entries` entries are split, where their `width` in bytes is
    that of float32: see `kernels.products`."""
    return 6 * entries if width == 4 else 0


def fit(candidates: Iterable[tuple[int, int]], needed: Callable[[int, int], int]) -> tuple[int, int]:
    """The first of the tile sizes whose `needed` bytes fit; the last one if none does: see `obstacle`."""
    sizes = (0, 0)
    for sizes in candidates:
        if needed(*sizes) <= PLANNED:
            break
    return sizes


def obstacle(needed: int) -> str:
    """Why a kernel that needs so many bytes of VMEM cannot run; empty if it can."""
    if needed <= PLANNED:
        return ""
    return f"it would need {needed / 2**20:.0f} MiB of fast memory (VMEM), more than {PLANNED >> 20}"


def compiler_params(*order: str) -> pltpu.CompilerParams:
    """`order` is "parallel" or "arbitrary" for each axis of the grid."""
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES)
