"""The plan: figures of programs whose costs are known, for chips that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding.chips import topology
from sharding.compiled import Collective
from sharding.mesh import make_mesh
from sharding.plan import Program, matrix_flops, measure, meshes, ring_bytes

B, D = 256, 512


def test_matrix_products_are_counted_as_often_as_they_run():
    def layers(x, weights):
        def layer(x, weight):
            return jax.checkpoint(lambda x, weight: jnp.tanh(x @ weight))(x, weight), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    x, weights = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    once = 2 * 4 * 8 * 8
    assert matrix_flops(jax.make_jaxpr(layers)(x, weights).jaxpr) == 3 * once
    backward = jax.make_jaxpr(jax.grad(layers, argnums=(0, 1)))(x, weights)
    assert matrix_flops(backward.jaxpr) == 3 * 4 * once  # forward, again, and one for each of the two gradients

    def decode(x, weight):
        return jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 1, s[1] @ weight), (0, x))

    assert matrix_flops(jax.make_jaxpr(decode)(x, weights[0]).jaxpr, turns=7) == 7 * once


def test_bytes_around_a_ring():
    def exchange(kind, group):
        return Collective(kind, (), 800, 1, group, False)

    assert ring_bytes(exchange("all-gather", 4)) == 600
    assert ring_bytes(exchange("all-reduce", 4)) == 1200
    assert ring_bytes(exchange("reduce-scatter", 8)) == 700
    assert ring_bytes(exchange("collective-permute", 2)) == 800


def test_meshes_worth_a_try():
    assert meshes(64, 8) == ["fsdp=64,tensor=1", "fsdp=32,tensor=2", "fsdp=16,tensor=4", "fsdp=8,tensor=8"]
    assert meshes(6, 8) == ["fsdp=6,tensor=1", "fsdp=3,tensor=2"]


@pytest.fixture(scope="module")
def v5e():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    chip, devices = topology("v5e:2x2")
    return chip, make_mesh("fsdp=2,tensor=2", devices)


def step(mesh, rows: int) -> Program:
    """tanh(x W) W', 8 times: W is split over tensor and gathered over fsdp."""

    def run(x, weights):
        def layer(x, pair):
            first, second = pair
            return jnp.tanh(x @ first).astype(x.dtype) @ second, None

        return jax.lax.scan(layer, x, weights)[0]

    def on(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    weights = (on((8, D, 4 * D), None, None, "tensor"), on((8, 4 * D, D), None, "tensor", None))
    x = on((rows, D), "fsdp", None)
    return Program("step", lambda remat: jax.jit(run).trace(x, weights), {"weights": weights}, rows, "rows")


def test_a_small_step_on_four_chips(v5e):
    chip, mesh = v5e
    found = measure(step(mesh, B), chip, mesh, "none")
    flops = 8 * 2 * 2 * B * D * 4 * D
    assert found.fits and found.available_bytes == 15.75 * 2**30
    assert found.flops == flops / 4  # each chip has a quarter: half of the rows, half of the columns
    assert found.held["weights"] == 8 * 2 * D * 4 * D * 2 / 2
    times, total = found.collectives["all-reduce"]
    assert times == 8  # the second product sums over the tensor axis, once a layer
    assert total >= 8 * (B // 2) * D * 2
    assert found.peak_bytes > found.held["weights"]
    # Nobody is faster than the chip's peak, and what is not computing is waiting.
    assert found.compute_seconds >= found.flops / chip.peak
    assert found.seconds >= found.compute_seconds
    assert found.mfu == pytest.approx(flops / (4 * chip.peak * found.seconds))
    assert found.per_second == pytest.approx(B / found.seconds)


def test_what_does_not_fit_says_how_much_it_needs(v5e):
    chip, mesh = v5e
    found = measure(step(mesh, 2**25), chip, mesh, "none")
    assert not found.fits
    assert found.peak_bytes > chip.memory
    assert found.seconds == 0


def test_a_slice_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unknown chip 'v9'; known are v5e, v5p, v6e"):
        topology("v9:2x2")
