"""The TPU chips that a program can be compiled for without having one."""

from __future__ import annotations

import dataclasses
import os
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        peak: bf16 FLOP/s. cycles at `clock` (Hz) are those of the compiler's estimates.
        memory: bytes of HBM that the compiler lets a program have.
        bandwidth: HBM bytes/s.
        link: bytes/s between neighbours along one axis of the torus, both directions together.
    """

    peak: float
    clock: float
    memory: float
    bandwidth: float
    link: float


# Peak, bandwidths: cloud.google.com/tpu/docs and "How to Scale Your Model" (Austin et al. 2025), chapter 2. Memory:
# what the compiler of libtpu 0.0.52 says is available when a program does not fit. Clock: peak over the FLOPs a cycle
# of the chip's matrix units (units x side x side x 2); a 4096 matmul is estimated at 87 to 97% of that.
CHIPS = {
    "v5e": Chip(197e12, 197e12 / (4 * 128 * 128 * 2), 15.75 * 2**30, 819e9, 90e9),
    "v5p": Chip(459e12, 459e12 / (8 * 128 * 128 * 2), 95.73 * 2**30, 2765e9, 180e9),
    "v6e": Chip(918e12, 918e12 / (4 * 256 * 256 * 2), 31.24 * 2**30, 1640e9, 180e9),
}


def topology(name: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice such as "v5p:4x4x4", for compiling only.

    Raises:
        ValueError: unknown chip, a shape the chip does not come in, or libtpu, which holds the compiler, is missing.
    """
    for setting in (
        "TPU_SKIP_MDS_QUERY",  # nobody to ask what machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD",  # another process may plan too, or run: no chip is touched here
    ):
        os.environ.setdefault(setting, "1")
    from jax.experimental import topologies

    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"{name!r}: unknown chip {kind!r}; known are {', '.join(CHIPS)}, written such as v5p:4x4x4")
    try:
        return CHIPS[kind], list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu's own kinds, and import errors, depending on what is missing
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name!r} cannot be compiled for: {reason} (libtpu holds the compiler)") from error
