"""The model's FLOPs by formula, against the matrix products of a traced forward pass."""

import jax
import pytest

from kernels import implementation
from lm_jax import lora
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import abstract
from lm_jax.plan_programs import training_flops
from lm_jax.rows import RowShape, abstract_batch
from lm_jax.token_loss import outputs
from sharding.plan import matrix_flops

ROWS = 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_costs_three_forward_passes(tied):
    config = DecoderConfig("qwen3", 512, 64, 3, 4, 2, 32, 96, tied_head=tied, qk_norm=True)
    shape = RowShape(128, 32, 8, ("label_weight",), (("label_unit", ()),))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in abstract_batch(shape, ROWS).items()}

    def forward(parameters, batch):
        return outputs(Decoder(config, parameters), batch, (5, 6))

    with implementation.setting("xla"):
        forward_flops = matrix_flops(jax.make_jaxpr(forward)(abstract(config), batch).jaxpr)
    label_rows = 2 * ROWS * 8 * config.embed * 2  # of the head, again: not counted
    assert training_flops(abstract(config), shape, ROWS) == pytest.approx(3 * (forward_flops - label_rows), rel=1e-6)


def test_frozen_weights_have_no_gradient():
    config = DecoderConfig("qwen3", 512, 64, 3, 4, 2, 32, 96, tied_head=False, qk_norm=True)
    shape = RowShape(128, 32, 8, (), ())
    full = training_flops(abstract(config), shape, ROWS)
    adapted = lora.abstract_attached(config, rank=2, targets=("query",), dtype="float32")
    attention = 2 * 3 * config.layers * 4 * 32 * 128 * 2 * 128 * ROWS
    adapters = 3 * 2 * 128 * ROWS * config.layers * (64 * 2 + 2 * 4 * 32)
    expected = (full - attention) * 2 / 3 + attention + adapters
    assert training_flops(adapted, shape, ROWS) == pytest.approx(expected, rel=1e-9)
