"""ONE table of the decoder's parameters, from which everything else follows.

An entry names a parameter, its shape, its logical axes (`sharding.rules`), how it starts and what Hugging Face calls
it. Initialization, shardings, import and export read this table; no other file knows a parameter's shape.
A layer parameter is stored stacked, [L, ...], and scanned over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from lm_jax.config import DecoderConfig
from sharding import rules

Parameters = dict[str, jax.Array]
NEAR = 50  # tokens
CONSTANT = 4.0


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
        shape, axes: of the whole array; a stacked parameter begins with L and "layers".
        start: "normal" (initializer_range), "residual" (the same over sqrt(2 L): it writes into the residual stream),
            "ones" or "zeros".
        hugging_face: tensor name, with {layer} where stacked.
        matrix: a torch Linear, stored there as [out, in]; ours is [in..., out...].
        inputs: how many of our leading (per-layer) axes are inputs of that Linear.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    start: str
    hugging_face: str
    matrix: bool = False
    inputs: int = 1

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def decayed(self) -> bool:
        """Weight decay is for matrices, not for norms and biases."""
        return self.matrix or self.axes == ("vocab", "embed")

    def to_hugging_face(self, array: np.ndarray) -> np.ndarray:
        """One layer's (or an unstacked) array in the layout of the Hugging Face tensor."""
        if not self.matrix:
            return array.reshape(-1) if array.ndim == 2 and self.stacked else array
        inputs = math.prod(array.shape[: self.inputs])
        return np.ascontiguousarray(array.reshape(inputs, -1).T)

    def from_hugging_face(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_hugging_face`."""
        return (array.T if self.matrix else array).reshape(self.layer_shape)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hugging_face_shape(self) -> tuple[int, ...]:
        if not self.matrix:
            return (math.prod(self.layer_shape),) if self.stacked else self.shape
        inputs = math.prod(self.layer_shape[: self.inputs])
        return (math.prod(self.layer_shape) // inputs, inputs)


@functools.cache
def table(config: DecoderConfig) -> dict[str, Parameter]:
    """Every parameter of a decoder of this shape, in a fixed order."""
    L, V, D, F = config.layers, config.vocab_size, config.embed, config.ffn
    N, K, H = config.query_heads, config.kv_heads, config.head_size

    def layer(shape, axes, start, name, **kwargs) -> Parameter:
        return Parameter((L, *shape), ("layers", *axes), start, f"model.layers.{{layer}}.{name}", **kwargs)

    def linear(shape, axes, name, start="normal", inputs=1) -> Parameter:
        return layer(shape, axes, start, f"{name}.weight", matrix=True, inputs=inputs)

    rows = {
        "embed": Parameter((V, D), ("vocab", "embed"), "normal", "model.embed_tokens.weight"),
        "attention_norm": layer((D,), ("activation",), "ones", "input_layernorm.weight"),
        "query": linear((D, N, H), ("embed", "heads", "head_size"), "self_attn.q_proj"),
        "key": linear((D, K, H), ("embed", "kv_heads", "head_size"), "self_attn.k_proj"),
        "value": linear((D, K, H), ("embed", "kv_heads", "head_size"), "self_attn.v_proj"),
        "output": linear((N, H, D), ("heads", "head_size", "embed"), "self_attn.o_proj", "residual", inputs=2),
        "ffn_norm": layer((D,), ("activation",), "ones", "post_attention_layernorm.weight"),
        "gate": linear((D, F), ("embed", "ffn"), "mlp.gate_proj"),
        "up": linear((D, F), ("embed", "ffn"), "mlp.up_proj"),
        "down": linear((F, D), ("ffn", "embed"), "mlp.down_proj", "residual"),
        "final_norm": Parameter((D,), ("activation",), "ones", "model.norm.weight"),
    }
    if config.qk_norm:
        rows["query_norm"] = layer((H,), ("head_size",), "ones", "self_attn.q_norm.weight")
        rows["key_norm"] = layer((H,), ("head_size",), "ones", "self_attn.k_norm.weight")
    if config.qkv_bias:
        rows["query_bias"] = layer((N, H), ("heads", "head_size"), "zeros", "self_attn.q_proj.bias")
        rows["key_bias"] = layer((K, H), ("kv_heads", "head_size"), "zeros", "self_attn.k_proj.bias")
        rows["value_bias"] = layer((K, H), ("kv_heads", "head_size"), "zeros", "self_attn.v_proj.bias")
    if not config.tied_head:
        rows["head"] = Parameter((V, D), ("vocab", "embed"), "normal", "lm_head.weight")
    return rows


def initialize(config: DecoderConfig, seed: int, mesh: Mesh | None = None) -> Parameters:
    """Random float32 parameters, each drawn from (seed, its name): the same on every mesh, created where they live.

    Two things are not left to chance, because judging a document by a query is made of them and a short run spends
    much of itself on finding them. Keys start as the first query head of their group, with the rotary pairs negated
    that turn by a radian within NEAR tokens: so that head looks for tokens like its own, and not at its own. And one
    coordinate of all embeddings starts at CONSTANT times their scale: what biases are made of, in a decoder without.
    """
    turning = rotary_frequencies(config.head_size, config.rope_theta) > 1 / NEAR
    sign_H = np.tile(np.where(turning, -1.0, 1.0), 2).astype(np.float32)

    def draw() -> Parameters:
        key = jax.random.key(seed)
        parameters = {}
        for name, row in table(config).items():
            if row.start in ("ones", "zeros"):
                parameters[name] = jnp.full(row.shape, float(row.start == "ones"), jnp.float32)
                continue
            scale = config.initializer_range / (math.sqrt(2 * config.layers) if row.start == "residual" else 1.0)
            parameters[name] = scale * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), row.shape)
        parameters["key"] = parameters["query"][:, :, :: config.query_heads // config.kv_heads] * sign_H
        parameters["embed"] = parameters["embed"].at[:, 0].set(CONSTANT * config.initializer_range)
        return parameters

    return jax.jit(draw, out_shardings=None if mesh is None else shardings(config, mesh))()


def rotary_frequencies(head_size: int, theta: float) -> np.ndarray:
    """float64 [H/2], radians a token of each rotary pair; the pairs are (i, i + H/2)."""
    return theta ** (-np.arange(0, head_size, 2) / head_size)


def shardings(config: DecoderConfig, mesh: Mesh) -> dict[str, jax.sharding.NamedSharding]:
    """Where each parameter lives on the mesh."""
    return {name: rules.sharding(mesh, row.axes, row.shape) for name, row in table(config).items()}


def abstract(config: DecoderConfig, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and place of each parameter, float32: what a checkpoint of them is read by."""
    single = SingleDeviceSharding(jax.local_devices()[0])
    places = dict.fromkeys(table(config), single) if mesh is None else shardings(config, mesh)
    return {
        name: jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=places[name]) for name, row in table(config).items()
    }


def decay_mask(config: DecoderConfig) -> dict[str, bool]:
    """Which parameters weight decay applies to."""
    return {name: row.decayed for name, row in table(config).items()}
