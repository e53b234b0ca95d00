"""One table from an array's logical axes to the mesh's axes.

Parameters, optimizer state, activations, caches and batches all name their axes in the same words, so this table is
the only place that decides what is split over what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "layers": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "activation": None,
    # parameters
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_size": None,
    "ffn": "tensor",
}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes bear these logical names."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The NamedSharding of an array of `shape`; an axis that the mesh does not divide stays whole."""
    return NamedSharding(mesh, _dividing(mesh, axes, shape))


def _dividing(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        entries.append(rule if size % parts == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pin an activation to its place on the current mesh (`jax.set_mesh`); the identity where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _dividing(mesh, axes, x.shape))


def on_each_device(
    function: Callable[..., jax.Array], axes: tuple[tuple[str | None, ...], ...], result: tuple[str | None, ...]
) -> Callable[..., jax.Array]:
    """`function` run by each device of the mesh that is set on its own part of every array, nothing exchanged.

    For what the compiler cannot split by itself, Pallas kernels above all. Without a mesh, or where the mesh does not
    divide an array evenly, it is `function` as it is.

    Args:
        axes, result: the logical axes of its arguments and of what it returns.
    """

    def run(*arrays: Any) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        specs = tuple(spec(each) for each in axes)
        parts = [(each, x.shape) for each, x in zip(axes, arrays, strict=True)]
        if mesh.empty or mesh.size == 1 or specs != tuple(_dividing(mesh, *part) for part in parts):
            return function(*arrays)
        return jax.shard_map(function, in_specs=specs, out_specs=spec(result), check_vma=False)(*arrays)

    return run
