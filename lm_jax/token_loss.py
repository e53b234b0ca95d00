"""Losses as (sum, denominator): added up over micro-batches and devices, divided once.

A mean of means weighs a token by the company it keeps. So an objective never divides: it gives the *sum* of each of its
terms over the tokens at hand, and separately the term's *denominator*, which depends on the data alone. The total

    loss = sum over terms of  coefficient[term] * sum[term] / denominator[term]

is then the same number, with the same gradient, for any micro-batching, packing, row order or mesh. A term without data
has denominator 0 and contributes exactly 0; as a metric it is absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.token_logprobs import split_token_logprobs, splits, token_logprobs
from lm_jax.decoder import Decoder, contract
from sharding.rules import RULES

Sums = dict[str, jax.Array]


class Outputs(NamedTuple):
    """What every objective reads of one forward pass."""

    logprob_BM: jax.Array  # float32 log-prob of each target over the full vocabulary
    entropy_BM: jax.Array  # nats
    label_logprob_BQC: jax.Array  # log-softmax over the label tokens alone, at each label slot


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes:
        sums: (outputs, batch) -> (sum of each loss term, sum of each metric).
        denominators: batch -> denominator of each loss term and of each metric, from the data alone.
    """

    sums: Callable[[Outputs, Mapping[str, jax.Array]], tuple[Sums, Sums]]
    denominators: Callable[[Mapping[str, jax.Array]], Sums]


def outputs(decoder: Decoder, batch: Mapping[str, jax.Array], label_ids: tuple[int, ...]) -> Outputs:
    """One forward pass over a batch of rows (`lm_jax.rows`)."""
    hidden_BTD = decoder(batch["tokens"], batch["positions"], batch["groups"], batch["branches"])
    head_VD = decoder.output_embedding

    def gather(at_BM: jax.Array) -> jax.Array:
        return jnp.take_along_axis(hidden_BTD, at_BM[..., None], axis=1)

    B, M = batch["at"].shape
    logprob, entropy = _logprobs(gather(batch["at"]).reshape(B * M, -1), head_VD, batch["target"].reshape(-1))
    label_logits_BQC = contract("bqd,cd->bqc", gather(batch["label_at"]), head_VD[jnp.array(label_ids)])
    return Outputs(logprob.reshape(B, M), entropy.reshape(B, M), jax.nn.log_softmax(label_logits_BQC, axis=-1))


def _logprobs(hidden_MD: jax.Array, head_VD: jax.Array, target_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On a mesh the vocabulary is split over all axes that split the head, so that nobody gathers it."""
    rows, head = RULES["batch"], (RULES["vocab"], RULES["embed"])
    if splits(jax.sharding.get_abstract_mesh(), target_M.shape[0], head_VD.shape[0], rows, head):
        return split_token_logprobs(hidden_MD, head_VD, target_M, rows, head)
    return token_logprobs(hidden_MD, head_VD, target_M)


def ratio(total: jax.Array, denominator: jax.Array) -> jax.Array:
    """total / denominator, exactly 0 where the denominator is 0."""
    return jnp.where(denominator > 0, total / jnp.where(denominator > 0, denominator, 1.0), 0.0)


def combine(sums: Sums, denominators: Sums, coefficients: Mapping[str, jax.Array]) -> jax.Array:
    """The scalar loss of these sums."""
    return sum(coefficients[term] * ratio(total, denominators[term]) for term, total in sums.items())
