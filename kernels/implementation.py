"""Which implementation of a kernel runs. The same rule for every kernel, never silent.

An implementation is named by the argument `implementation` of the call; where that is None, by the setting

    with implementation.setting("xla"): ...     # for a block of code; jit compiles anew where the value differs
    implementation.setting.set_global("xla")    # for the process

whose default is "auto": "pallas_tpu" for a TPU, "xla" for everything else, by `platform`. It is decided when a program
is traced, so that nothing is traced but what runs. A Pallas kernel is not split over devices by the compiler, so under
a mesh of several devices "auto" is "xla" too, except inside `jax.shard_map`, where each device has arrays of its own.

A named implementation runs or raises; only "auto" chooses. Every choice is told once, through the logger "kernels": as
a warning where a Pallas kernel cannot run on the TPU that the program is for, else as information.
"""

from __future__ import annotations

import functools
import logging

import jax

NAMES = ("xla", "pallas_tpu")

setting = jax.make_user_context("auto")
log = logging.getLogger("kernels")


def platform() -> str:
    """What a program that is traced now is for: the platform of the mesh that is set, if one is, else this process's.

    A program that is compiled here for a TPU that is elsewhere is traced under a mesh of its chips.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def choice(kernel: str, implementation: str | None = None, *, obstacle: str = "") -> str:
    """The name of what runs, one of NAMES.

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
        return name
    if platform() != "tpu":
        _tell(logging.INFO, f"{kernel}: xla, as on every {platform()}")
        return "xla"
    if obstacle:
        _tell(logging.WARNING, f"{kernel}: xla, though for a TPU, because {obstacle}")
        return "xla"
    _tell(logging.INFO, f"{kernel}: pallas_tpu, as on every TPU")
    return "pallas_tpu"


@functools.cache
def _tell(level: int, line: str) -> None:
    log.log(level, line)


def _mesh_obstacle() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    split = [f"{axis}={size}" for axis, size, kind in axes if size > 1 and kind != jax.sharding.AxisType.Manual]
    return f"the mesh {','.join(split)} would split it; call it inside jax.shard_map" if split else ""
