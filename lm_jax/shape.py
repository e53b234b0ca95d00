"""Where a decoder's shape and first weights come from besides a pretrained source: config fields, or a deeper model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lm_jax.config import FAMILY_OF, DecoderConfig
from lm_jax.parameters import Parameters, table
from lm_jax.typed_config import read_fields


def shape_from_fields(fields: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
    """A DecoderConfig from a config's fields, every error naming its own.

    By default the vocabulary is rounded up to a multiple of 64, `qk_norm` and `qkv_bias` are as the family has them.
    """
    defaults = {name: fields.get("family") == family for name, family in FAMILY_OF.items()}
    return read_fields(DecoderConfig, {"vocab_size": -(-vocab_size // 64) * 64, **defaults, **fields}, "shape.")


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """`keep` of `layers` layer numbers, first and last included: 4 of 9 are [0, 3, 5, 8]."""
    if not 1 <= keep <= layers:
        raise ValueError(f"cannot keep {keep} of {layers} layers")
    return [round(i * (layers - 1) / max(1, keep - 1)) for i in range(keep)]


def cut_layers(config: DecoderConfig, parameters: Parameters, keep: Sequence[int]) -> tuple[DecoderConfig, Parameters]:
    """A shallower decoder made of some layers of a deeper one, in order: where a student may start."""
    chosen = jnp.array(keep)
    cut = {name: parameters[name][chosen] if row.stacked else parameters[name] for name, row in table(config).items()}
    return dataclasses.replace(config, layers=len(keep)), cut
