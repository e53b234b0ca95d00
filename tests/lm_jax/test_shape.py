import dataclasses
import re

import numpy as np
import pytest

from lm_jax.config import DecoderConfig
from lm_jax.parameters import initialize
from lm_jax.shape import cut_layers, evenly_spaced, shape_from_fields

FIELDS = {
    "family": "llama", "embed": 8, "layers": 9, "query_heads": 2, "kv_heads": 1, "head_size": 4, "ffn": 12,
}  # fmt: skip


def test_the_vocabulary_is_rounded_up_and_the_family_says_the_rest():
    expected = DecoderConfig("llama", 128, 8, 9, 2, 1, 4, 12, rope_theta=1e6)
    assert shape_from_fields({**FIELDS, "rope_theta": 1_000_000}, 65) == expected
    assert shape_from_fields({**FIELDS, "vocab_size": 70}, 65).vocab_size == 70
    assert shape_from_fields({**FIELDS, "family": "qwen3"}, 65).qk_norm
    assert shape_from_fields({**FIELDS, "family": "qwen2"}, 65).qkv_bias


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layerz": 2}, "unknown config key shape.layerz; did you mean shape.layers?"),
        ({"embed": 12.5}, "shape.embed: 12.5 is a float, expected int"),
        ({"rope_theta": "abc"}, "shape.rope_theta: 'abc' is a str, expected float"),
        ({"tied_head": "no"}, "shape.tied_head: 'no' is a str, expected bool"),
        ({"rope_theta": 0}, "rope_theta: 0.0 must be above 0"),
        ({"initializer_range": float("nan")}, "initializer_range: nan must be above 0"),
        ({"layers": 0}, "layers: 0 must be at least 1"),
        ({"layers": -1}, "layers: -1 must be at least 1"),
        ({"kv_heads": 0}, "kv_heads: 0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size: 0 must be at least 1"),
        ({"qk_norm": True}, "qk_norm must be False in the family 'llama'"),
        ({"family": "qwen3", "qk_norm": False}, "qk_norm must be True in the family 'qwen3'"),
        ({"qkv_bias": True}, "qkv_bias must be False in the family 'llama'"),
        ({"family": "qwen2", "qkv_bias": False}, "qkv_bias must be True in the family 'qwen2'"),
        ({"family": "mamba"}, "unknown architecture 'mamba'; known are qwen3, qwen2, llama"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_what_would_be_right(change, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        shape_from_fields({**FIELDS, **change}, 65)


def test_layers_that_are_kept_are_evenly_spaced_with_the_first_and_the_last():
    assert evenly_spaced(9, 4) == [0, 3, 5, 8]
    assert evenly_spaced(30, 24)[::23] == [0, 29]
    assert len(set(evenly_spaced(30, 24))) == 24
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    assert evenly_spaced(5, 1) == [0]
    for keep in (0, 6):
        with pytest.raises(ValueError, match=f"cannot keep {keep} of 5 layers"):
            evenly_spaced(5, keep)


def test_a_cut_model_has_the_chosen_layers_and_all_else_of_the_deep_one():
    config = shape_from_fields({**FIELDS, "family": "qwen3", "tied_head": False}, 64)
    deep = initialize(config, seed=1)
    shallow, cut = cut_layers(config, deep, [0, 3, 5, 8])
    assert shallow == dataclasses.replace(config, layers=4)
    assert sum(x.size for x in cut.values()) == shallow.parameter_count
    stacked = {name for name, x in deep.items() if x.shape[0] == config.layers}
    assert {"query", "ffn_norm"} < stacked and stacked.isdisjoint({"embed", "head", "final_norm"})
    for name, x in deep.items():
        expected = np.asarray(x)[[0, 3, 5, 8]] if name in stacked else np.asarray(x)
        np.testing.assert_array_equal(cut[name], expected)
