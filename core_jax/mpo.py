"""Mixed Preference Optimization: one objective of pairs of rewrites, and the train state that holds its reward shift.

After InternVL-MPO (arXiv 2411.10442), the mix CoRe (arXiv 2606.14127) is reported to use; the weights are our defaults.
A pair is a chosen and a rejected rewrite y+, y- of one context x. With log pi the sum over a rewrite's tokens, end of
text included, and the reference pi_ref the policy at the phase's start,

    u       = beta (log pi(y | x) - log pi_ref(y | x))
    L_DPO   = -log sigma(u+ - u-)                                    DPO, arXiv 2305.18290
    L_BCO   = -log sigma(u+ - delta) - log sigma(delta - u-)         BCO, arXiv 2404.04656
    L_SFT   = -log pi(y+ | x), a mean over the batch's tokens ("tokens", as TRL) or over each rewrite's ("sequence")
    L       = w_p mean L_DPO + w_q mean L_BCO + w_g L_SFT            means over pairs

delta is 0 ("none": TRL 1.16's `bco_pair`) or the mean of u over all pairs of the phase's earlier steps ("running"; our
form of InternVL's running mean: theirs counts the step at hand too). It is a number of the train state, so it is saved,
restored and the same on every host.

Rows: a pair is one group, the prompt its trunk, the two rewrites its branches, so the prompt is computed once. The
chosen branch carries the pair's label slot, whose number in the row is that of the pair's group. Rows of people's
rewrites may stand beside rows of pairs (`rehearsal_group`, ours): they count as chosen in L_SFT and nowhere else. What
the reward does not pay for, such as how people write, pairs alone let a policy forget.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lm_jax import train_state
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import Parameters
from lm_jax.rows import Branch, Group, RowShape
from lm_jax.token_loss import Objective, Outputs, Sums, outputs
from lm_jax.train_state import Step, TrainState

CHOSEN, REJECTED = 0, 1  # the segment of a branch's targets
TERMS = ("mpo/dpo", "mpo/bco", "mpo/sft")
DELTAS = ("none", "running")
NORMALIZATIONS = ("tokens", "sequence")


@struct.dataclass
class MPOState(TrainState):
    """A train state with BCO's reward shift: the mean of u over the `rewards_seen` rewrites of earlier steps."""

    delta: jax.Array
    rewards_seen: jax.Array


def create(parameters: Parameters, optimizer: optax.GradientTransformation) -> MPOState:
    """A state at step 0: policy and reference agree, so the mean reward is 0."""
    state = train_state.create(parameters, optimizer)
    delta, rewards_seen = jnp.zeros(()), jnp.zeros(())  # two arrays: a step donates each
    return MPOState(state.step, state.parameters, state.optimizer, delta, rewards_seen)


def pair_group(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    normalization: str,
    reference_logprobs: np.ndarray | None = None,
    number: int = 0,
) -> Group:
    """One pair as a group of two branches.

    Args:
        prompt, chosen, rejected: token ids; the rewrites with end of text where they have one.
        normalization: of L_SFT.
        reference_logprobs: [2], of chosen and rejected under the reference, 0 where they are to be computed.
        number: the pair's, which `pair_logprobs` reads back.
    """
    reference = np.zeros(2) if reference_logprobs is None else reference_logprobs

    def branch(answer: np.ndarray, segment: int) -> Branch:
        unit = 1.0 if normalization == "tokens" else 1.0 / len(answer)
        return Branch(
            inputs=np.concatenate([prompt[-1:], answer[:-1]]).astype(np.int32),
            targets=answer,
            segments=np.full(len(answer), segment, np.int32),
            token_values={"sft_weight": np.full(len(answer), unit if segment == CHOSEN else 0.0)},
            label_values={"pair_unit": 1.0, "reference_logprob": reference, "number": float(number + 1)}
            if segment == CHOSEN
            else None,
        )

    return Group(prompt[:-1], [branch(chosen, CHOSEN), branch(rejected, REJECTED)])


def rehearsal_group(example: Group, *, normalization: str) -> Group:
    """A supervised example (`core_jax.inputs.example_groups`) as a group that L_SFT alone sees."""
    (branch,) = example.branches
    count = len(branch.targets)
    weight = np.full(count, 1.0 if normalization == "tokens" else 1.0 / count)
    chosen = np.full(count, CHOSEN, np.int32)
    return Group(example.trunk, [dataclasses.replace(branch, segments=chosen, token_values={"sft_weight": weight})])


def row_shape(row_tokens: int, shortest_prompt: int, max_new_tokens: int) -> RowShape:
    """Rows with room for the pairs and targets of any row of `row_tokens` tokens, the same in every phase.

    Args:
        shortest_prompt: tokens of the shortest prompt of the run.
        max_new_tokens: of a rewrite.
    """
    trunk, rewrites = shortest_prompt - 1, 2 * max_new_tokens
    targets = -(-row_tokens * rewrites // (trunk + rewrites))  # the densest pair has the longest rewrites
    return RowShape(
        tokens=row_tokens,
        targets=min(row_tokens, -(-targets // 16) * 16),
        labels=max(1, row_tokens // (trunk + 2)),
        token_values=("sft_weight",),
        label_values=(("pair_unit", ()), ("reference_logprob", (2,)), ("number", ())),
    )


def sequence_logprobs(logprob_BM: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected) [B, Q]: the summed log-probs of each pair's two rewrites, 0 in slots without a pair."""
    group_BM = jnp.take_along_axis(batch["groups"], batch["at"], axis=1)
    of_pair_BMQ = group_BM[..., None] == jnp.arange(1, batch["pair_unit"].shape[1] + 1)

    def total(side: int) -> jax.Array:
        mine_BMQ = of_pair_BMQ & (batch["segment"] == side)[..., None]
        return jnp.sum(jnp.where(mine_BMQ, logprob_BM[..., None], 0.0), axis=1)

    return total(CHOSEN), total(REJECTED)


def make_objective(beta: float) -> Objective:
    """The three terms and TRL's metrics; the batch carries `delta`, one number a row."""

    def sums(outputs: Outputs, batch: Mapping[str, jax.Array]) -> tuple[Sums, Sums]:
        chosen_BQ, rejected_BQ = sequence_logprobs(outputs.logprob_BM, batch)
        unit_BQ, delta_B1 = batch["pair_unit"], batch["delta"][:, None]
        reward_BQ = beta * (chosen_BQ - batch["reference_logprob"][..., CHOSEN])
        rejected_reward_BQ = beta * (rejected_BQ - batch["reference_logprob"][..., REJECTED])
        margin_BQ = reward_BQ - rejected_reward_BQ
        bco_BQ = jax.nn.log_sigmoid(reward_BQ - delta_B1) + jax.nn.log_sigmoid(delta_B1 - rejected_reward_BQ)
        terms = {
            "mpo/dpo": -jnp.sum(unit_BQ * jax.nn.log_sigmoid(margin_BQ)),
            "mpo/bco": -jnp.sum(unit_BQ * bco_BQ),
            "mpo/sft": -jnp.sum(batch["sft_weight"] * outputs.logprob_BM),
        }
        on_BM = (batch["segment"] >= 0).astype(jnp.float32)
        metrics = {
            "rewards/chosen": jnp.sum(unit_BQ * reward_BQ),
            "rewards/rejected": jnp.sum(unit_BQ * rejected_reward_BQ),
            "rewards/margins": jnp.sum(unit_BQ * margin_BQ),
            "rewards/accuracies": jnp.sum(unit_BQ * (margin_BQ > 0)),
            "logps/chosen": jnp.sum(unit_BQ * chosen_BQ),
            "logps/rejected": jnp.sum(unit_BQ * rejected_BQ),
            "entropy": jnp.sum(on_BM * outputs.entropy_BM),
        }
        return terms, metrics

    def denominators(batch: Mapping[str, jax.Array]) -> Sums:
        pairs = jnp.sum(batch["pair_unit"])
        of_pairs = ("mpo/dpo", "mpo/bco", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        return {
            **dict.fromkeys((*of_pairs, "logps/chosen", "logps/rejected"), pairs),
            "mpo/sft": jnp.sum(batch["sft_weight"]),
            "entropy": jnp.sum(batch["segment"] >= 0).astype(jnp.float32),
        }

    return Objective(sums, denominators)


@functools.lru_cache(maxsize=1)  # every phase runs the same program
def make_step(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    beta: float,
    delta: str,
    micro_batches: int = 1,
    dtype: str = "float32",
    remat: str = "none",
) -> Step:
    """The jitted step over `MPOState`; `gradients` takes a batch that carries `delta`."""
    step = train_state.make_step(
        config, make_objective(beta), optimizer, label_ids=(0,), micro_batches=micro_batches, dtype=dtype, remat=remat
    )  # no grade is read here: label id 0 stands for none

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: MPOState, batch, coefficients, learning_rate=1.0):
        batch = with_delta(batch, state.delta)
        trained = TrainState(state.step, state.parameters, state.optimizer)
        trained, metrics = step.update(trained, batch, coefficients, learning_rate)
        metrics["delta"] = state.delta
        new, seen = state.delta, state.rewards_seen
        if delta == "running":
            count = 2 * jnp.sum(batch["pair_unit"])
            mean = jnp.where(count > 0, metrics["rewards/chosen"] + metrics["rewards/rejected"], 0.0) / 2
            seen = state.rewards_seen + count
            new = state.delta + (mean - state.delta) * count / jnp.maximum(seen, 1.0)
        return MPOState(trained.step, trained.parameters, trained.optimizer, new, seen), metrics

    return Step(update, step.gradients)


def with_delta(batch: Mapping[str, Any], delta: jax.Array) -> dict[str, Any]:
    """The batch with the reward shift in every row, as the objective reads it."""
    return {**batch, "delta": jnp.broadcast_to(delta, batch["pair_unit"].shape[:1])}


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def pair_logprobs(parameters: Parameters, batch, *, config: DecoderConfig, dtype: str) -> jax.Array:
    """Log-probs [B, Q, 2] of each pair's chosen and rejected rewrite: the reference of a phase, computed once."""
    logprob_BM = outputs(Decoder(config, parameters, dtype=dtype), batch, (0,)).logprob_BM
    return jnp.stack(sequence_logprobs(logprob_BM, batch), axis=-1)
