"""The programs that every recipe gives to `lm_jax.plan_table`: drawing from a model and a train step.

All arrays are abstract and lie where the mesh puts them; no data, weights or tokenizer are opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm_jax import lora
from lm_jax.config import PRESETS, DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.rows import RowShape, abstract_batch
from lm_jax.sample import sample
from lm_jax.shape import shape_from_fields
from lm_jax.train_state import Step, TrainState
from lm_jax.weights import read_source_config
from sharding import rules
from sharding.plan import Program


def planned_shape(source: str, fields: Mapping[str, Any], vocabulary: int) -> DecoderConfig:
    """The shape of a model: a published one is known by its name, another is read, one from scratch is spelled out.

    Raises:
        ValueError, ConnectionError: it cannot be known.
    """
    if not Path(source).exists() and (published := PRESETS.get(PurePath(source).name.lower())):
        return published
    return read_source_config(source) if source else shape_from_fields(fields, vocabulary)


def on_mesh(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array whose first axis is the batch."""
    place = rules.sharding(mesh, ("batch",) + (None,) * (len(shape) - 1), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def rows_on_mesh(mesh: Mesh, shape: RowShape, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of so many rows of that shape."""
    return {key: on_mesh(mesh, x.dtype, *x.shape) for key, x in abstract_batch(shape, rows).items()}


def sampling(
    name: str,
    config: DecoderConfig,
    mesh: Mesh,
    held: Mapping[str, Any],
    *,
    prompts: int,
    prompt_tokens: int,
    group: int,
    max_new_tokens: int,
    dtype: str,
) -> Iterator[Program]:
    """The prefill of a rollout, and the whole of it: `group` answers to each prompt.

    Args:
        held: what is in memory meanwhile, as in `Program`; "weights" are the parameters that are drawn from.
        prompt_tokens: what each prompt is padded to.
    """
    parameters = held["weights"]
    tokens, sizes = on_mesh(mesh, np.int32, prompts, prompt_tokens), on_mesh(mesh, np.int32, prompts)

    def prefill(parameters, tokens, sizes):
        return Decoder(config, parameters, dtype=dtype).prefill(tokens, sizes, group, max_new_tokens)

    answers = group * max_new_tokens
    resident = tuple(held.keys() - {"weights"})
    held = {**held, "cache": _cache(config, dtype, prompts, prompt_tokens, answers, mesh)}
    yield Program(
        f"{name} prefill",
        lambda remat: jax.jit(prefill).trace(parameters, tokens, sizes),
        held,
        prompts * prompt_tokens,
        "tokens",
        resident,
    )
    yield Program(
        f"{name}, {max_new_tokens} tokens",
        lambda remat: sample.trace(
            parameters, tokens, sizes, on_mesh(mesh, np.uint32, prompts), jax.eval_shape(lambda: jax.random.key(0)),
            config=config, group=group, max_new_tokens=max_new_tokens, eos=0, dtype=dtype,
        ),
        held,
        prompts * answers,
        "tokens",
        resident,
        max_new_tokens,
    )  # fmt: skip


def training(
    name: str,
    make_step: Callable[[str], Step],
    state: TrainState,
    shape: RowShape,
    rows: int,
    coefficients: Mapping[str, float],
    mesh: Mesh,
    beside: Mapping[str, Any] | None = None,
) -> Program:
    """One update on `rows` rows of that shape.

    Args:
        make_step: remat policy -> the step.
        state: abstract, as `train_state.abstract_state` makes it.
        beside: what stays in memory, by name, that is no part of the state.
    """
    batch = rows_on_mesh(mesh, shape, rows)
    weights = {key: jax.ShapeDtypeStruct((), np.float32) for key in coefficients}
    held = {"weights": state.parameters, "optimizer": state.optimizer, "batch": batch, **(beside or {})}

    def trace(remat: str) -> Any:
        return make_step(remat).update.trace(state, batch, weights, jax.ShapeDtypeStruct((), np.float32))

    flops = training_flops(state.parameters, shape, rows)
    return Program(name, trace, held, rows * shape.tokens, "tokens", tuple(beside or ()), model_flops=flops)


def training_flops(parameters: Mapping[str, Any], shape: RowShape, rows: int) -> float:
    """FLOPs of the model in a step on `rows` full rows, after PaLM (arXiv 2204.02311, appendix B).

    Each product counts forward, for the gradient of what comes in, and for that of the weights, if they are trained;
    nothing counts twice that is computed twice: remat, or scores and logits where their gradients are formed. As there
    attention counts whole squares of the rows, though half of a causal one is empty.

    Args:
        parameters: of the state, arrays or abstract; with adapters, the other weights are frozen.
    """
    trained = lora.trained(parameters)
    products = {name: math.prod(parameters[name].shape) for name in (*lora.TARGETS, *trained) if name in parameters}
    stacked = {name: size for name, size in products.items() if name not in ("embed", "head") and "norm" not in name}
    matrices = sum(size * (3 if name in trained else 2) for name, size in stacked.items() if "bias" not in name)
    head = "head" if "head" in parameters else "embed"
    head_products = math.prod(parameters[head].shape) * (3 if head in trained else 2)
    layers, _, heads, head_size = parameters["query"].shape
    squares = 2 * 3 * layers * heads * head_size * shape.tokens  # scores and mixing, a token
    return 2.0 * rows * (shape.tokens * (matrices + squares) + shape.targets * head_products)


def _cache(
    config: DecoderConfig, dtype: str, prompts: int, tokens: int, answers: int, mesh: Mesh
) -> list[jax.ShapeDtypeStruct]:
    """Keys and values of the prompts and of all answer tokens."""
    found = []
    for length in (tokens, answers):
        shape = (config.layers, prompts, length, config.kv_heads, config.head_size)
        place = rules.sharding(mesh, ("layers", "batch", "length", "kv_heads", "head_size"), shape)
        found += [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)] * 2
    return found
