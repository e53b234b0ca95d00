"""Which implementation of a kernel runs. The same rule for every kernel, never silent.

An implementation is named by the argument `implementation` of the call; where that is None, by the setting

    with implementation.setting("xla"): ...     # for a block of code; jit compiles anew where the value differs
    implementation.setting.set_global("xla")    # for the process

whose default is "auto": "pallas_tpu" where the program is lowered for a TPU, "xla" everywhere else. What lowers is what
counts, not what this machine is: a program compiled here for a TPU topology gets the TPU kernel. A Pallas kernel is not
split over devices by the compiler, so under a mesh of several devices "auto" is "xla" too, except inside
`jax.shard_map`, where each device has arrays of its own.

A named implementation runs or raises; only "auto" chooses. Every choice is told once, through the logger "kernels": as
a warning where a TPU is at hand and a Pallas kernel cannot run on it, else as information.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

NAMES = ("xla", "pallas_tpu")

setting = jax.make_user_context("auto")
log = logging.getLogger("kernels")


def choice(kernel: str, implementation: str | None = None, *, obstacle: str = "") -> dict[str, str]:
    """What runs, by platform: {"tpu": "pallas_tpu", "default": "xla"}, "default" being every platform not named.

    Args:
        kernel: its name, for what is told.
        implementation: "auto" or one of NAMES; None is the setting.
        obstacle: why the Pallas kernel cannot run with these shapes; empty if it can.

    Raises:
        ValueError: an unknown name, or "pallas_tpu" against an obstacle or under a mesh of several devices.
    """
    name = setting.value if implementation is None else implementation
    if name not in ("auto", *NAMES):
        raise ValueError(f"implementation={name!r}; known are 'auto', {', '.join(map(repr, NAMES))}")
    obstacle = obstacle or _mesh_obstacle()
    if name == "pallas_tpu" and obstacle:
        raise ValueError(f"{kernel}: implementation='pallas_tpu' cannot run: {obstacle}")
    if name != "auto":
        _tell(logging.INFO, f"{kernel}: {name}, as asked for")
        return {"default": name}
    if obstacle:
        here = jax.default_backend() == "tpu"
        _tell(logging.WARNING if here else logging.INFO, f"{kernel}: xla everywhere, because {obstacle}")
        return {"default": "xla"}
    _tell(logging.INFO, f"{kernel}: pallas_tpu on a TPU, xla elsewhere")
    return {"tpu": "pallas_tpu", "default": "xla"}


@functools.cache
def _tell(level: int, line: str) -> None:
    log.log(level, line)


def run(chosen: Mapping[str, str], implementations: Mapping[str, Callable[..., Any]], *arrays: Any) -> Any:
    """Apply to `arrays` the implementation that `chosen` (of `choice`) names for the platform this is lowered for."""
    branches = {platform: implementations[name] for platform, name in chosen.items()}
    default = branches.pop("default")
    return jax.lax.platform_dependent(*arrays, default=default, **branches) if branches else default(*arrays)


def _mesh_obstacle() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    split = [f"{axis}={size}" for axis, size, kind in axes if size > 1 and kind != jax.sharding.AxisType.Manual]
    return f"the mesh {','.join(split)} would split it; call it inside jax.shard_map" if split else ""
