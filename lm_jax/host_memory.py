"""Keep the memory that a step frees, on hosts whose C library is glibc.

glibc gives every large block back to the system as soon as it is freed, so on CPU each step faults its temporaries in
again, page by page; a quarter or more of the time of a small model's train step.
"""

from __future__ import annotations

import ctypes

# Names and numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks of any size; call before the first computation. Nothing happens elsewhere.

    The process then keeps its largest use so far until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    for option, value in (
        (_M_MMAP_MAX, 0),  # no block is mapped for itself
        (_M_ARENA_MAX, 1),  # other threads' heaps are too small for large blocks, which would be mapped
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 2**28),
    ):
        mallopt(option, value)
