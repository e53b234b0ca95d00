"""Device meshes from one line of configuration, such as "data=1,fsdp=16,tensor=4"."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(shape: str = "", devices: list | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Args:
        shape: "fsdp=16,tensor=4"; an axis left out has size 1, one axis may be -1 = all devices that remain.
            Empty means fsdp=-1.
        devices: the devices to arrange; all of them by default.

    Raises:
        ValueError: an unknown axis, a size that is no integer, sizes that do not multiply to the device count, or that
            the slice's torus cannot be cut into.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict.fromkeys(AXES, 1)
    for part in (shape or "fsdp=-1").split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ValueError(f"mesh {shape!r}: unknown axis {axis!r}; the axes are {', '.join(AXES)}")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ValueError(f"mesh {shape!r}: the size of {axis} is {size!r}, not an integer") from None
    unknown = [axis for axis in AXES if sizes[axis] == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) == 1 and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {shape!r} does not cover {len(devices)} devices: {sizes}")
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # jax takes whole axes of the torus, or products of them
        cut = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise ValueError(
            f"mesh {shape!r}: {cut} does not go into this slice; each size must be one axis of its torus, or a product "
            "of several, such as fsdp=16,tensor=4 of 4x4x4"
        ) from None
