"""The same over a mesh, with the rows of the head split: no device ever holds the whole head, or a logit of it.

Each device multiplies the tokens of its group of devices with its own rows of the vocabulary. Normalizers are merged
as one log-sum-exp of log-sum-exps, so between devices go hidden states and a few floats a token.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from kernels import implementation as _implementation
from kernels.token_logprobs import pallas_tpu, reference


def splits(mesh: AbstractMesh, tokens: int, vocabulary: int, rows: tuple[str, ...], head: tuple[str, ...]) -> bool:
    """Whether `split_token_logprobs` can run: several devices, and the mesh divides tokens and vocabulary evenly."""
    if mesh.empty or mesh.size == 1:
        return False
    parts = [math.prod(mesh.shape[axis] for axis in axes) for axes in (rows, head)]
    return tokens % parts[0] == 0 and vocabulary % parts[1] == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def split_token_logprobs(
    hidden_MD: jax.Array, head_VD: jax.Array, target_M: jax.Array, rows: tuple[str, ...], head: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of global arrays on the mesh that is set (`jax.set_mesh`), differentiable likewise.

    Args:
        rows: mesh axes that split the M tokens.
        head: mesh axes that split the V rows of the head; those that are in `rows` too exchange their tokens.
    """
    return _forward(hidden_MD, head_VD, target_M, rows, head)[0]


def _forward(hidden_MD, head_VD, target_M, rows, head):
    shared = tuple(axis for axis in head if axis in rows)

    def local(hidden_mD, head_vD, target_m):
        hidden_MD, target_M = (_gather(x, shared) for x in (hidden_mD, target_m))
        here_M, inside_M = _own(target_M, head_vD, head)
        logprob_M, entropy_M, normalizer_M = _run("forward", hidden_MD, head_vD, here_M)
        largest_M = jax.lax.pmax(normalizer_M, head)
        total_M = largest_M + jnp.log(jax.lax.psum(jnp.exp(normalizer_M - largest_M), head))
        # Where p = w q with q normalized over a device's rows, H[p] = sum of w (H[q] - log w).
        log_share_M = normalizer_M - total_M
        entropy_M = jax.lax.psum(jnp.exp(log_share_M) * (entropy_M - log_share_M), head)
        logit_M = jax.lax.psum(jnp.where(inside_M, logprob_M + normalizer_M, 0.0), head)
        return tuple(_part(x, shared, hidden_mD.shape[0]) for x in (logit_M - total_M, entropy_M, total_M))

    mapped = jax.shard_map(
        local,
        in_specs=(PartitionSpec(rows, None), PartitionSpec(head, None), PartitionSpec(rows)),
        out_specs=(PartitionSpec(rows),) * 3,
        check_vma=False,
    )
    logprob_M, entropy_M, total_M = mapped(hidden_MD, head_VD, target_M)
    return (logprob_M, entropy_M), (hidden_MD, head_VD, target_M, total_M, entropy_M)


def _backward(rows, head, saved, cotangents):
    shared = tuple(axis for axis in head if axis in rows)
    beside = tuple(axis for axis in head if axis not in rows)
    apart = tuple(axis for axis in rows if axis not in head)

    def local(hidden_mD, head_vD, target_m, *floats_m):
        hidden_MD, target_M, *floats_M = (_gather(x, shared) for x in (hidden_mD, target_m, *floats_m))
        here_M, _ = _own(target_M, head_vD, head)
        # float32, because what the devices find is added up
        d_hidden_MD, d_head_vD = _run(
            "backward", hidden_MD.astype(jnp.float32), head_vD, here_M, *floats_M,
            head_dtype=jnp.float32 if apart else None,
        )  # fmt: skip
        d_hidden_MD = jax.lax.psum(d_hidden_MD, beside) if beside else d_hidden_MD
        if shared:
            d_hidden_MD = jax.lax.psum_scatter(d_hidden_MD, shared, tiled=True)
        d_head_vD = jax.lax.psum(d_head_vD, apart).astype(head_vD.dtype) if apart else d_head_vD
        return d_hidden_MD.astype(hidden_mD.dtype), d_head_vD

    tokens, vocabulary = PartitionSpec(rows, None), PartitionSpec(head, None)
    mapped = jax.shard_map(
        local,
        in_specs=(tokens, vocabulary, *(PartitionSpec(rows),) * 5),
        out_specs=(tokens, vocabulary),
        check_vma=False,
    )
    return *mapped(*saved, *cotangents), None


split_token_logprobs.defvjp(_forward, _backward)


def _run(direction: str, hidden_MD, head_vD, *rest: jax.Array, **options: Any):
    obstacle = pallas_tpu.obstacle(hidden_MD.shape[1], hidden_MD.dtype.itemsize, head_vD.dtype.itemsize)
    module = {"xla": reference, "pallas_tpu": pallas_tpu}[_implementation.choice("token_logprobs", obstacle=obstacle)]
    return getattr(module, direction)(hidden_MD, head_vD, *rest, temperature=1.0, **options)


def _gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _part(x_M: jax.Array, axes: tuple[str, ...], size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_M, jax.lax.axis_index(axes) * size, size) if axes else x_M


def _own(target_M: jax.Array, head_vD: jax.Array, head: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Each target counted from this device's first row, and whether it is one of its rows; one past them if not."""
    rows = head_vD.shape[0]
    here_M = target_M - jax.lax.axis_index(head) * rows
    inside_M = (here_M >= 0) & (here_M < rows)
    return jnp.where(inside_M, here_M, rows).astype(target_M.dtype), inside_M
