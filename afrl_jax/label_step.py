"""The jitted step that reads grades: suffixes of shared prefixes in, log-probs of the labels out."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from afrl_jax.batch_plan import Batch
from kernels.label_head import label_head
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import Parameters
from lm_jax.shared_prefix import Block, SharedPrefixDecoder, Suffixes, joined
from sharding.rules import constrain, on_each_device, spec


def in_dtype(parameters: Parameters, config: DecoderConfig, dtype: str) -> Parameters:
    """Parameters as a decoder computes with them: converted once, not in every batch."""
    decoder = Decoder(config, parameters, dtype=dtype)
    return {name: getattr(decoder, name)[...] for name in parameters}


def abstract_in_dtype(
    parameters: Mapping[str, jax.ShapeDtypeStruct], config: DecoderConfig, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `in_dtype` makes of abstract parameters, where they live."""
    kinds = jax.eval_shape(lambda given: in_dtype(given, config, dtype), dict(parameters))
    return {
        name: jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=parameters[name].sharding)
        for name, kind in kinds.items()
    }


@functools.partial(jax.jit, static_argnames=("config", "width"))
def score_suffixes(parameters, labels_CD, suffixes, prefixes, *, config: DecoderConfig, width: int) -> jax.Array:
    """Log-softmax over the labels after each suffix, float32 [B, U, C], computed in the dtype of the label rows."""
    decoder = SharedPrefixDecoder(config, parameters, dtype=labels_CD.dtype)
    residual_BTD, _ = decoder.extend(suffixes, prefixes, width)
    return _read_labels(decoder, residual_BTD, labels_CD, suffixes)


@functools.partial(jax.jit, static_argnames=("config", "width", "size"))
def prefill_suffixes(parameters, labels_CD, suffixes, prefixes, *, config: DecoderConfig, width: int, size: int):
    """The same, and prefix and suffix of each together as a block padded to `size`, B x U of them."""
    decoder = SharedPrefixDecoder(config, parameters, dtype=labels_CD.dtype)
    residual_BTD, kept = decoder.extend(suffixes, prefixes, width, keep=True)
    blocks = joined(suffixes, prefixes, kept, size)
    return (
        _read_labels(decoder, residual_BTD, labels_CD, suffixes),
        jax.tree.map(lambda x: constrain(x, (None,) * 4), blocks),
    )


def _read_labels(decoder: SharedPrefixDecoder, residual_BTD, labels_CD, suffixes: Suffixes) -> jax.Array:
    def read(residual_BTD, at_BU, norm_D, labels_CD):
        ids = tuple(range(labels_CD.shape[0]))
        return label_head(
            residual_BTD, at_BU, norm_D, labels_CD, ids, epsilon=decoder.config.norm_epsilon, labels_only=True
        )[0]

    axes = (("batch", "length", "activation"), ("batch", None), (None,), (None, None))
    read = on_each_device(read, axes, ("batch", None, None))
    logprobs_BUC = read(residual_BTD, jnp.maximum(suffixes.ends - 1, 0), decoder.final_norm[...], labels_CD)
    return constrain(logprobs_BUC, (None, None, None))  # every process reads all of it


def trace_step(
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    config: DecoderConfig,
    batch: Batch,
    *,
    grades: int,
    prefix_size: int,
    dtype: str,
) -> jax.stages.Traced:
    """What scores a batch of this shape, traced under the mesh that is set, without any array: for plans and tests.

    Args:
        parameters: abstract, where they live; their dtypes do not matter.
        batch: its shape counts, its items do not.
        prefix_size: S of every prefix.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def abstract(kind, *shape: int, axes: tuple[str | None, ...] | None = None) -> jax.ShapeDtypeStruct:
        place = None if mesh.empty else NamedSharding(mesh, spec(axes or (None,) * len(shape)))
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    rows, slots = len(batch.rows), batch.slots
    suffixes = Suffixes(
        abstract(np.int32, rows, batch.tokens, axes=("batch", None)),
        abstract(np.int32, rows, slots, axes=("batch", None)),
        abstract(np.int32, rows, slots, axes=("batch", None)),
        abstract(np.int32, batch.prefixes),
    )
    keys = abstract(dtype, config.layers, prefix_size, config.kv_heads, config.head_size)
    weights = abstract_in_dtype(parameters, config, dtype)
    labels_CD = abstract(dtype, grades, config.embed)
    prefixes = [Block(keys, keys)] * batch.prefixes
    return score_suffixes.trace(weights, labels_CD, suffixes, prefixes, config=config, width=batch.width)
