"""Float32 means float32 wherever it runs: no product leaves its precision to the platform."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from kernels import implementation, products
from kernels.label_head import label_head
from kernels.prefix_attention import prefix_attention
from kernels.row_attention import row_attention
from kernels.token_logprobs import token_logprobs
from lm_jax.decoder import contract


def products_in(jaxpr):
    """(dtypes of the operands, precision) of every product, those inside kernels and loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {str(x.aval.dtype) for x in equation.invars}, equation.params["precision"]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products_in(inner)


def shapes(*arrays):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]


def cases(dtype):
    heads, keys = ((2, 128, 4, 64), dtype), ((2, 128, 2, 64), dtype)
    integers = ((2, 128), "int32")
    return {
        "row_attention": (
            jax.grad(lambda *arrays: row_attention(*arrays).astype("float32").sum(), (0, 1, 2)),
            shapes(heads, keys, keys, integers, integers),
        ),
        "token_logprobs": (
            jax.grad(lambda h, w, t: token_logprobs(h, w, t)[0].sum(), (0, 1)),
            shapes(((64, 128), dtype), ((512, 128), dtype), ((64,), "int32")),
        ),
        "prefix_attention": (
            prefix_attention,
            shapes(heads, keys, keys, integers, *[((1, 256, 2, 64), dtype)] * 2, ((1,), "int32"), ((2,), "int32")),
        ),
        "label_head": (
            functools.partial(label_head, label_ids=(1, 2), epsilon=1e-6),
            shapes(((64, 1, 128), dtype), ((64, 1), "int32"), ((128,), "float32"), ((512, 128), dtype)),
        ),
        "contract": (
            jax.grad(lambda a, b: contract("td,df->tf", a, b).sum(), (0, 1)),
            shapes(((8, 16), dtype), ((16, 4), dtype)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kernels", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("name", cases("float32"))
def test_float32_is_multiplied_as_such_and_bfloat16_in_one_pass(name, kernels):
    for dtype, precision in (("float32", jax.lax.Precision.HIGHEST), ("bfloat16", None)):
        function, arrays = cases(dtype)[name]
        with implementation.setting(kernels):
            found = list(products_in(jax.make_jaxpr(function)(*arrays).jaxpr))
        assert found
        for operands, of in found:
            assert operands == {dtype}, found
            assert set(of if isinstance(of, tuple) else (of,)) == {precision}, found


def test_a_tpu_is_told(compiled):
    arrays = [((1024, 1024), "float32")] * 2
    _, costs, _ = compiled(functools.partial(products.einsum, "ij,jk->ik"), *arrays)
    _, rounded, _ = compiled(functools.partial(jnp.einsum, "ij,jk->ik"), *arrays)
    assert costs.cycles > 1.8 * rounded.cycles
