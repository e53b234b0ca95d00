"""What the TPU compiler makes of each kernel, for three generations of chips that are not here.

The least possible bytes are those of the operands and results, each once. What a kernel says it moves is compared with
them, and so is all that the compiled module reads and writes, the copies around the kernel included. The figures are
those of the docstrings.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from kernels.label_head import label_head
from kernels.prefix_attention import prefix_attention
from kernels.row_attention import row_attention
from kernels.token_logprobs import token_logprobs

MIB = 2**20


def nbytes(*arrays) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in arrays)


# SmolLM2-135M and Qwen3-0.6B, 64 positions.
@pytest.mark.parametrize(
    ("embed", "vocabulary", "dtype", "vmem"), [(576, 49_152, "float32", 7.8), (1024, 151_936, "bfloat16", 5.3)]
)
def test_label_head(compiled, embed, vocabulary, dtype, vmem):
    arrays = [((64, 1, embed), dtype), ((64, 1), "int32"), ((embed,), "float32"), ((vocabulary, embed), dtype)]
    head = functools.partial(label_head, label_ids=(15, 16, 17, 18), epsilon=1e-6)
    least = nbytes(*arrays, ((64, 5), "float32"))
    _, costs, kernels = compiled(head, *arrays)
    assert list(kernels) == ["label_head"]
    assert kernels["label_head"].vmem <= vmem * MIB
    assert least <= kernels["label_head"].bytes < 1.0001 * least
    assert least <= costs.bytes < 1.006 * least
    _, costs, kernels = compiled(functools.partial(head, labels_only=True), *arrays)
    assert list(kernels) == ["label_head"]
    assert costs.bytes < 2**20 < 0.01 * nbytes(arrays[-1])


# 32 suffixes behind one prefix, heads of SmolLM2-135M and of Qwen3-0.6B.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype", "vmem", "around"),
    [(9, 3, 64, "float32", 2.1, 4.1), (16, 8, 128, "bfloat16", 0.8, 3.7)],
)
def test_prefix_attention(compiled, heads, kv_heads, size, dtype, vmem, around):
    queries, keys = ((32, 128, heads, size), dtype), ((32, 128, kv_heads, size), dtype)
    prefix = ((1, 256, kv_heads, size), dtype)
    integers = [((32, 128), "int32"), ((1,), "int32"), ((32,), "int32")]
    arrays = [queries, keys, keys, integers[0], prefix, prefix, *integers[1:]]
    _, costs, kernels = compiled(prefix_attention, *arrays)
    least = nbytes(*arrays, queries)
    assert list(kernels) == ["prefix_attention"]
    assert kernels["prefix_attention"].vmem <= vmem * MIB
    assert 0.999 * least < kernels["prefix_attention"].bytes <= least  # the integers are not counted
    assert costs.bytes < around * least


def with_gradients(function, differentiable: int):
    """`function` of arrays and the cotangents of its results, with the gradients by the first `differentiable`."""

    def both(arrays, cotangents):
        value, backward = jax.vjp(lambda *some: function(*some, *arrays[differentiable:]), *arrays[:differentiable])
        return value, backward(cotangents)

    return both


# 128 tokens of SmolLM2-135M and of Qwen3-0.6B: one tile, so that the head is read once in each direction.
@pytest.mark.parametrize(
    ("embed", "vocabulary", "dtype", "vmem"), [(576, 49_152, "float32", 16.1), (1024, 151_936, "bfloat16", 9.0)]
)
def test_token_logprobs(compiled, embed, vocabulary, dtype, vmem):
    hidden, head, token = ((128, embed), dtype), ((vocabulary, embed), dtype), ((128,), "float32")

    def both(hidden, head, target, a, b):
        return with_gradients(token_logprobs, 2)((hidden, head, target), (a, b))

    _, costs, kernels = compiled(both, hidden, head, ((128,), "int32"), token, token)
    assert set(kernels) == {"token_logprobs_forward", "token_logprobs_d_hidden", "token_logprobs_d_head"}
    least = {"forward": nbytes(hidden, head), "d_hidden": nbytes(hidden, hidden, head)}
    least["d_head"] = nbytes(hidden, head, head)
    assert max(kernel.vmem for kernel in kernels.values()) <= vmem * MIB
    most = {"forward": 1.001, "d_hidden": 1.001, "d_head": 1.07}
    for name, bytes_ in least.items():
        assert bytes_ <= kernels[f"token_logprobs_{name}"].bytes < most[name] * bytes_
    # A head whose rows are no whole registers lies column by column: it and its gradient are copied.
    assert costs.bytes < (1.001 if embed % 128 == 0 else 2.001) * sum(least.values())


def test_token_logprobs_of_qwen3_32b(compiled):
    """The widest model, a 64th of its head: tiles are planned to fit; that they do, `compiled` asserts."""
    token = ((2048,), "float32")

    def both(hidden, head, target, a, b):
        return with_gradients(token_logprobs, 2)((hidden, head, target), (a, b))

    arrays = ((2048, 5120), "float32"), ((2374, 5120), "bfloat16"), ((2048,), "int32"), token, token
    kernels = compiled(both, *arrays)[-1]
    assert set(kernels) == {"token_logprobs_forward", "token_logprobs_d_hidden", "token_logprobs_d_head"}


# A row of 1024 tokens, heads of Qwen3-0.6B.
def test_row_attention(compiled):
    queries, keys = ((1, 1024, 16, 128), "bfloat16"), ((1, 1024, 8, 128), "bfloat16")
    place = ((1, 1024), "int32")

    def both(q, k, v, groups, branches, d_mixed):
        return with_gradients(row_attention, 3)((q, k, v, groups, branches), d_mixed)

    memory, _, kernels = compiled(both, queries, keys, keys, place, place, queries)
    assert set(kernels) == {"row_attention_forward", "row_attention_d_q", "row_attention_d_kv"}
    assert max(kernel.vmem for kernel in kernels.values()) <= 5.8 * MIB
    least = {"forward": nbytes(queries, queries, keys, keys), "d_q": nbytes(*[queries] * 3, keys, keys)}
    least["d_kv"] = nbytes(queries, queries, *[keys] * 4)
    for name, bytes_ in least.items():
        assert bytes_ <= kernels[f"row_attention_{name}"].bytes < 1.3 * bytes_
    # The scores of all heads in float32 would be 64 MiB.
    assert memory.temp_size_in_bytes < 12.5 * MIB
