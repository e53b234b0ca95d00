"""The decoder: one code path for Qwen3, Qwen2.5 and Llama, layers stacked and scanned, three entries.

`Decoder(config, parameters)` is built inside a jitted function from the parameter dictionary; that costs nothing at
run time and keeps train states plain dictionaries. Entries: `__call__` over full rows, `prefill` which also returns
the keys and values, `decode` for one token of each of G answers that share a prompt.

Rows. A row holds one or more *groups* (0 is padding); inside a group, branch 0 is a shared trunk and branches 1.. are
continuations of it that do not see each other. A token attends to earlier tokens of its own group that lie on the trunk
or on its own branch. So one row may hold packed examples (one group each, all branch 0), or one prompt followed by its
G sampled answers, or one query followed by all its documents - and the shared part is computed once.

Shapes: B batch, T and S tokens, D model, N query heads, K key/value heads, M = N / K, H head size, F feed-forward,
L layers, V vocabulary, P prompts, G group, A answer.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from kernels import implementation, products
from kernels.rms_norm import rms_norm
from kernels.row_attention import row_attention
from lm_jax.config import DecoderConfig
from lm_jax.lora import merged_layer
from lm_jax.parameters import Parameters, rotary_frequencies, table
from sharding.rules import RULES, constrain, on_each_device

REMAT = {
    "none": None,
    "matmuls": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with operands in b's dtype and float32 accumulation, forward and backward; float32 result.

    Autodiff alone would multiply float32 cotangents with bf16 operands, which no platform does fast. Every index of one
    operand must occur in the other or in the result.
    """
    return products.einsum(equation, a, b)


def _contract_forward(equation, a, b):
    return contract(equation, a, b), (a, b)


def _gradient_of_first(equation, b, cotangent):
    (axes_a, axes_b), result = equation.split("->")[0].split(","), equation.split("->")[1]
    return products.einsum(f"{result},{axes_b}->{axes_a}", cotangent, b)


def _gradient_of_second(equation, a, b, cotangent):
    (axes_a, axes_b), result = equation.split("->")[0].split(","), equation.split("->")[1]
    return products.einsum(f"{axes_a},{result}->{axes_b}", a, cotangent.astype(b.dtype)).astype(b.dtype)


def _contract_backward(equation, saved, cotangent):
    a, b = saved
    return (
        _gradient_of_first(equation, b, cotangent).astype(a.dtype),
        _gradient_of_second(equation, a, b, cotangent),
    )


contract.defvjp(_contract_forward, _contract_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def contract_each(equation: str, along: str, a: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """`contract` of one array with each of several, which differ in the size of the index `along`.

    Backward, the gradient of `a` is one product over all of them: where the mesh splits what is summed over, devices
    exchange that one sum, where autodiff would exchange one for each.
    """
    return tuple(contract(equation, a, b) for b in weights)


def _contract_each_forward(equation, along, a, weights):
    return contract_each(equation, along, a, weights), (a, weights)


def _contract_each_backward(equation, along, saved, cotangents):
    a, weights = saved
    axes_b, result = equation.split("->")[0].split(",")[1], equation.split("->")[1]
    cotangent = jnp.concatenate([each.astype(weights[0].dtype) for each in cotangents], axis=result.index(along))
    joined = jnp.concatenate(weights, axis=axes_b.index(along))
    pairs = zip(weights, cotangents, strict=True)
    d_weights = tuple(_gradient_of_second(equation, a, b, each) for b, each in pairs)
    return _gradient_of_first(equation, joined, cotangent).astype(a.dtype), d_weights


contract_each.defvjp(_contract_each_forward, _contract_each_backward)


def rotary_angles(positions: jax.Array, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [..., 1, H/2] float32 of positions [...]; the added axis broadcasts over heads."""
    frequency = rotary_frequencies(head_size, theta).astype(np.float32)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary positions on [..., heads, H]: the two halves of H are the two coordinates."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, groups_BT: jax.Array, branches_BT: jax.Array
) -> jax.Array:
    """Attention inside rows; on a mesh each device takes its own rows and heads, if the mesh divides them."""
    row, queries, keys = ("batch", "length"), ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    split = on_each_device(row_attention, (queries, keys, keys, row, row), queries)
    return split(q_BTNH, k_BTKH, v_BTKH, groups_BT, branches_BT)


def written_out() -> bool:
    """Whether the loop over layers is unrolled: on CPU, where the bookkeeping of a loop costs as much as its products.

    There each turn copies what it slices and stacks, and 16-bit floats become float32 and back on the way. Elsewhere a
    loop costs nothing and one layer compiles faster than many.
    """
    return implementation.platform() == "cpu"


@struct.dataclass
class Cache:
    """Keys and values of P prompts and of the G answers that continue each.

    The prompt block is written once by `prefill` and shared by the group; only the answer block grows.
    """

    prompt_keys: jax.Array  # [L, P, S, K, H]
    prompt_values: jax.Array  # [L, P, S, K, H]
    prompt_lengths: jax.Array  # [P]
    answer_keys: jax.Array  # [L, P, G, A, K, H], of `empty_answers`
    answer_values: jax.Array  # [L, P, G, A, K, H]


def empty_answers(shape_LPGAKH: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros for keys or values of answers; 16-bit floats on CPU as integers of the same bits.

    To write one token's keys into an array of such floats the CPU compiler turns all of it into float32 and back.
    """
    bits = jnp.dtype(dtype).itemsize == 2 and written_out()
    empty = jnp.zeros(shape_LPGAKH, jnp.uint16 if bits else dtype)
    return constrain(empty, ("layers", "batch", None, None, "kv_heads", "head_size"))


@jax.custom_vjp
def look_up(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table, whose gradient is summed in float32: of a token that occurs a thousand times in a batch, a sum
    of 16-bit floats stops growing after some hundred terms."""
    return table_VD[tokens]


def _look_up_forward(table_VD: jax.Array, tokens: jax.Array):
    return table_VD[tokens], (table_VD, tokens)


def _look_up_backward(saved: tuple[jax.Array, jax.Array], d: jax.Array):
    table_VD, tokens = saved
    zeros_VD = constrain(jnp.zeros(table_VD.shape, jnp.float32), ("vocab", "activation"))
    d_VD = zeros_VD.at[tokens].add(d.astype(jnp.float32))
    return constrain(d_VD, ("vocab", "activation")).astype(table_VD.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _bits_as(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


class Decoder(nnx.Module):
    """Weights plus the three entries. `dtype` is the compute dtype, `remat` what the backward pass recomputes."""

    def __init__(self, config: DecoderConfig, parameters: Parameters, *, dtype: Any = jnp.float32, remat: str = "none"):
        if missing := table(config).keys() - parameters.keys():
            raise ValueError(f"the decoder's parameters {sorted(missing)} are missing")
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        for name, row in table(config).items():
            keep = jnp.float32 if row.start == "ones" else self.dtype  # norms scale in float32
            setattr(self, name, nnx.Param(parameters[name].astype(keep)))
        adapters = sorted(parameters.keys() - table(config).keys())
        self.stacked = (*(name for name, row in table(config).items() if row.stacked), *adapters)
        for name in adapters:
            setattr(self, name, nnx.Param(parameters[name]))

    @property
    def output_embedding(self) -> jax.Array:
        """The head [V, D]: logits = hidden · headᵀ. Losses hand it to `kernels.token_logprobs`."""
        return self.embed[...] if self.config.tied_head else self.head[...]

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        groups_BT: jax.Array,
        branches_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, of full rows."""
        return self._full(tokens_BT, positions_BT, groups_BT, branches_BT, keep_cache=False)[0]

    def prefill(self, tokens_PS: jax.Array, lengths_P: jax.Array, group: int, answer: int) -> tuple[jax.Array, Cache]:
        """Run P right-padded prompts once.

        Returns:
            Hidden states [P, D] of each prompt's last token (what predicts the answer's first), and the cache for
            `group` answers of up to `answer` tokens each.
        """
        P, S = tokens_PS.shape
        positions_PS = jnp.broadcast_to(jnp.arange(S), (P, S))
        groups_PS = (positions_PS < lengths_P[:, None]).astype(jnp.int32)
        hidden_PSD, (keys, values) = self._full(tokens_PS, positions_PS, groups_PS, None, keep_cache=True)
        last_PD = jnp.take_along_axis(hidden_PSD, (lengths_P - 1)[:, None, None], axis=1)[:, 0]
        config = self.config
        empty = empty_answers((config.layers, P, group, answer, config.kv_heads, config.head_size), self.dtype)
        return last_PD, Cache(keys, values, lengths_P, empty, empty)

    def decode(self, tokens_PG: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Advance every answer by its token number `step`.

        Args:
            tokens_PG: the tokens sampled last.
            step: how many answer tokens the cache already holds.

        Returns:
            Hidden states [P, G, D] that predict the next token, and the cache with this token added.
        """
        P, G = tokens_PG.shape
        K, H = self.config.kv_heads, self.config.head_size
        angles = rotary_angles(
            jnp.broadcast_to((cache.prompt_lengths + step)[:, None], (P, G)), H, self.config.rope_theta
        )
        in_prompt_PS = jnp.arange(cache.prompt_keys.shape[2]) < cache.prompt_lengths[:, None]
        in_answer_A = jnp.arange(cache.answer_keys.shape[3]) <= step

        def block(carry, inputs):
            x_PGD, answer_keys, answer_values = carry
            index, weights, prompt_keys_PSKH, prompt_values_PSKH = inputs
            weights = merged_layer(weights)
            q_PGNH, k_PGKH, v_PGKH = self._queries_keys_values(x_PGD, weights, angles)

            def append(block, new_PGKH):
                new = _bits_as(new_PGKH, block.dtype)[None, :, :, None]
                return jax.lax.dynamic_update_slice(block, new, (index, 0, 0, step, 0, 0))

            answer_keys, answer_values = append(answer_keys, k_PGKH), append(answer_values, v_PGKH)
            own_keys_PGAKH, own_values_PGAKH = (_bits_as(x[index], self.dtype) for x in (answer_keys, answer_values))
            q_PGKMH = q_PGNH.reshape(P, G, K, -1, H)
            over_prompt = contract("pgkmh,pskh->pgkms", q_PGKMH, prompt_keys_PSKH) * H**-0.5
            over_prompt = jnp.where(in_prompt_PS[:, None, None, None], over_prompt, -jnp.inf)
            over_answer = contract("pgkmh,pgakh->pgkma", q_PGKMH, own_keys_PGAKH) * H**-0.5
            over_answer = jnp.where(in_answer_A, over_answer, -jnp.inf)
            weight = jax.nn.softmax(jnp.concatenate([over_prompt, over_answer], axis=-1), axis=-1)
            prompt_weight, answer_weight = jnp.split(weight, [prompt_keys_PSKH.shape[1]], axis=-1)
            mixed = contract("pgkms,pskh->pgkmh", prompt_weight, prompt_values_PSKH)
            mixed += contract("pgkma,pgakh->pgkmh", answer_weight, own_values_PGAKH)
            return (self._finish(x_PGD, mixed.reshape(q_PGNH.shape), weights), answer_keys, answer_values), None

        x_PGD = self._embed(tokens_PG)
        inputs = (jnp.arange(self.config.layers), self._layers(), cache.prompt_keys, cache.prompt_values)
        carry = (x_PGD, cache.answer_keys, cache.answer_values)
        (x_PGD, answer_keys, answer_values), _ = jax.lax.scan(block, carry, inputs, unroll=written_out())
        hidden_PGD = rms_norm(x_PGD, self.final_norm[...], self.config.norm_epsilon)
        return hidden_PGD, cache.replace(answer_keys=answer_keys, answer_values=answer_values)

    def _full(self, tokens_BT, positions_BT, groups_BT, branches_BT, keep_cache: bool):
        branches_BT = jnp.zeros_like(groups_BT) if branches_BT is None else branches_BT
        angles = rotary_angles(positions_BT, self.config.head_size, self.config.rope_theta)

        def block(x_BTD, weights):
            weights = self._gathered(weights)
            q_BTNH, k_BTKH, v_BTKH = self._queries_keys_values(x_BTD, weights, angles)
            x_BTD = self._finish(x_BTD, attend(q_BTNH, k_BTKH, v_BTKH, groups_BT, branches_BT), weights)
            x_BTD = constrain(x_BTD, ("batch", "length", "activation"))
            kept = ("batch", "length", "kv_heads", "head_size")
            return x_BTD, (constrain(k_BTKH, kept), constrain(v_BTKH, kept)) if keep_cache else None

        if self.remat != "none":
            block = jax.checkpoint(block, policy=REMAT[self.remat], prevent_cse=False)
        x_BTD = constrain(self._embed(tokens_BT), ("batch", "length", "activation"))
        x_BTD, cache = jax.lax.scan(block, x_BTD, self._layers(), unroll=written_out())
        return rms_norm(x_BTD, self.final_norm[...], self.config.norm_epsilon), cache

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # Only the vocabulary stays split: looking up rows that are split too would replicate what is found.
        return look_up(constrain(self.embed[...], ("vocab", "activation")), tokens)

    def _layers(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in self.stacked}

    def _gathered(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """One layer's weights, whole but for the tensor axis: rows of a batch are split over fsdp, so weights are not.

        Left to itself the partitioner may multiply piece by piece instead, which writes and reads the float32 sum of a
        product as often as there are pieces.
        """
        rows = table(self.config)
        return {
            name: constrain(x, tuple("activation" if axis == "embed" else axis for axis in rows[name].axes[1:]))
            for name, x in merged_layer(weights).items()
        }

    def _splits_heads(self) -> bool:
        """Whether the mesh that is set splits a layer's products by heads, and by the feed-forward's width."""
        mesh = jax.sharding.get_abstract_mesh()
        parts = 1 if mesh.empty else mesh.shape[RULES["kv_heads"]]
        return parts > 1 and self.config.kv_heads % parts == 0

    def _queries_keys_values(self, x: jax.Array, weights: dict[str, jax.Array], angles) -> tuple[jax.Array, ...]:
        """Normed and projected [..., heads, H], queries and keys rotated; x is [B, T, D]."""
        config = self.config
        y = rms_norm(x, weights["attention_norm"], config.norm_epsilon)
        names = ("query", "key", "value")
        if self._splits_heads():
            by_head = lambda x: x.reshape(*x.shape[:-2], config.kv_heads, -1, config.head_size)
            found = contract_each("btd,dkmh->btkmh", "m", y, tuple(by_head(weights[name]) for name in names))
            q, k, v = (each.reshape(*y.shape[:2], -1, config.head_size) for each in found)
        else:
            q, k, v = (contract("btd,dnh->btnh", y, weights[name]) for name in names)
        if config.qkv_bias:
            q, k, v = q + weights["query_bias"], k + weights["key_bias"], v + weights["value_bias"]
        if config.qk_norm:
            q = rms_norm(q, weights["query_norm"], config.norm_epsilon)
            k = rms_norm(k, weights["key_norm"], config.norm_epsilon)
        return rotate(q, angles).astype(self.dtype), rotate(k, angles).astype(self.dtype), v.astype(self.dtype)

    def _finish(self, x: jax.Array, mixed: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        """Output projection and feed-forward, each added to the residual stream."""
        x = x + contract("btnh,nhd->btd", mixed.astype(self.dtype), weights["output"]).astype(x.dtype)
        y = rms_norm(x, weights["ffn_norm"], self.config.norm_epsilon)
        # In the compute dtype, as the largest arrays of a layer: in float32 a TPU would wait for them.
        if self._splits_heads():
            both = contract_each("btd,dgf->btgf", "g", y, (weights["gate"][:, None], weights["up"][:, None]))
            gate, up = (each[:, :, 0].astype(self.dtype) for each in both)
        else:
            gate, up = (contract("btd,df->btf", y, weights[name]).astype(self.dtype) for name in ("gate", "up"))
        wide = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return x + contract("btf,fd->btd", wide.astype(self.dtype), weights["down"]).astype(x.dtype)
