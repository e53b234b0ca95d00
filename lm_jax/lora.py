"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W + A B with A [inputs, r], B [r, outputs]; W is frozen.

A model that carries adapters is a parameter dictionary with two more entries a target, and wherever there are
adapters, they alone are trained: gradients, optimizer state and their sharding follow from the names. The sum is formed
a layer at a time inside the scan, so neither merged weights nor their gradient ever exist for all layers at once. B
starts at zero, so training starts from the model as it is; the published factor alpha / r is 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameter, Parameters, abstract, table
from sharding import rules

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
_DOWN, _UP = "_lora_down", "_lora_up"


def trained(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that training changes: the adapters, or everything where there are none."""
    adapters = {name: x for name, x in parameters.items() if name.endswith((_DOWN, _UP))}
    return adapters or dict(parameters)


def adapter_table(config: DecoderConfig, rank: int, targets: Collection[str]) -> dict[str, Parameter]:
    """Rows as `lm_jax.parameters.table` has them, two a target: down [L, inputs..., r], up [L, r, outputs...]."""
    rows = {}
    for target in targets:
        row = table(config)[target]
        cut = 1 + row.inputs
        shape, axes = row.shape, row.axes
        rows[target + _DOWN] = dataclasses.replace(row, shape=(*shape[:cut], rank), axes=(*axes[:cut], None))
        rows[target + _UP] = dataclasses.replace(
            row, shape=(shape[0], rank, *shape[cut:]), axes=("layers", None, *axes[cut:]), start="zeros", inputs=1
        )
    return rows


def attach(
    config: DecoderConfig, parameters: Parameters, *, rank: int, targets: Collection[str], seed: int, dtype: str,
    mesh: Mesh | None = None,
) -> Parameters:  # fmt: skip
    """The model with fresh float32 adapters; its own matrices, frozen from here on, are kept in `dtype`.

    With rank 0 it is returned as it is.

    Raises:
        ValueError: a target that is no matrix of a layer.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"lora_targets: {', '.join(unknown)} unknown; known are {', '.join(TARGETS)}")
    if not rank:
        return parameters
    rows = adapter_table(config, rank, targets)

    def draw() -> Parameters:
        key = jax.random.key(seed)
        drawn = {}
        for name, row in rows.items():
            scale = 0.0 if row.start == "zeros" else 1 / math.sqrt(math.prod(row.shape[1:-1]))
            drawn[name] = scale * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), row.shape)
        return drawn

    places = None if mesh is None else {n: rules.sharding(mesh, row.axes, row.shape) for n, row in rows.items()}
    frozen = {name: x.astype(dtype) if table(config)[name].decayed else x for name, x in parameters.items()}
    return frozen | jax.jit(draw, out_shardings=places)()


def abstract_attached(
    config: DecoderConfig, *, rank: int, targets: Collection[str], dtype: str, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `attach` makes of a float32 model, as ShapeDtypeStructs with shardings."""
    if not rank:
        return abstract(config, mesh)
    kept = {
        name: jax.ShapeDtypeStruct(x.shape, dtype if table(config)[name].decayed else x.dtype, sharding=x.sharding)
        for name, x in abstract(config, mesh).items()
    }
    return kept | {
        name: jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=mesh and rules.sharding(mesh, row.axes, row.shape))
        for name, row in adapter_table(config, rank, targets).items()
    }


def merged_layer(weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """One layer's weights (no leading L) with its adapters added in; what has none is passed on."""
    merged = {name: x for name, x in weights.items() if not name.endswith((_DOWN, _UP))}
    for name in [name.removesuffix(_DOWN) for name in weights if name.endswith(_DOWN)]:
        down, up = weights[name + _DOWN].astype(jnp.float32), weights[name + _UP].astype(jnp.float32)
        weight = merged[name]
        merged[name] = (weight.astype(jnp.float32) + jnp.tensordot(down, up, axes=1)).astype(weight.dtype)
    return merged


def merge(parameters: Parameters, *, config: DecoderConfig) -> Parameters:
    """A float32 model without adapters that computes the same; export and every later stage read it."""
    return parameters if len(trained(parameters)) == len(parameters) else _merge(parameters, config)


@functools.partial(jax.jit, static_argnames="config")
def _merge(parameters: Parameters, config: DecoderConfig) -> Parameters:
    rows = table(config)
    whole = {name: x.astype(jnp.float32) for name, x in parameters.items()}
    layers = {name: x for name, x in whole.items() if name not in rows or rows[name].stacked}
    merged = jax.vmap(lambda weights: merged_layer(weights))(layers)
    return {name: rules.constrain(merged.get(name, whole[name]), row.axes) for name, row in rows.items()}
