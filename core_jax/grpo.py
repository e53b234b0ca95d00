"""Online GRPO on the ratio reward: the arm that samples from the policy of every step.

The objective is plain GRPO, one reward a rewrite (`afrl_jax.stepwise_grpo` with a single segment, which equals TRL's
`grpo`). It spends as many rewards as the phases of semi-online MPO would have, so the two can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import jax
import numpy as np

from afrl_jax.data.batches import SFT_VALUES
from afrl_jax.stepwise_grpo import TOKEN_VALUES, advantages, make_objective, rollout_branches
from core_jax.inputs import Inputs
from core_jax.ratio_reward import score_rewrites
from core_jax.relevance import Relevance
from core_jax.sampler import InProcess
from core_jax.schema import SearchSession
from core_jax.settings import Settings
from lm_jax.rows import Batch, Group, RowShape, render_row, stack
from lm_jax.token_loss import Objective
from lm_jax.train_state import TrainState

COEFFICIENTS = {"policy": 1.0, "exact": 0.0, "sft/label": 0.0, "sft/explanation": 0.0}


def steps_of_budget(settings: Settings, sessions: int) -> int:
    """Steps that ask for as many rewards as MPO's phases: contexts x rewrites, phase after phase."""
    phases = settings.phases
    rewards = phases.count * min(phases.contexts or sessions, sessions) * phases.rewrites
    return max(1, rewards // (settings.grpo.rows * settings.grpo.group))


def objective(settings: Settings) -> Objective:
    """Plain GRPO without the metrics that speak of grades."""
    whole = make_objective(clip_low=settings.grpo.clip_low, clip_high=settings.grpo.clip_high)

    def sums(outputs, batch):
        terms, metrics = whole.sums(outputs, batch)
        return terms, {name: value for name, value in metrics.items() if not name.startswith("first_token/")}

    return Objective(sums, whole.denominators)


def row_shape(settings: Settings) -> RowShape:
    """The row of one context and its group of rewrites."""
    return RowShape(
        tokens=settings.grpo.row_tokens,
        targets=settings.grpo.group * settings.rewriter.max_new_tokens,
        labels=1,
        token_values=(*SFT_VALUES, *TOKEN_VALUES),
        label_values=(("label_unit", ()), ("label_gold", (1,)), ("exact_unit", ()), ("label_reward", (1,))),
    )


class RolloutSource:
    """Draws the batch of a step from the current policy and rewards it; follows from (seed, step, policy) alone."""

    def __init__(
        self,
        settings: Settings,
        inputs: Inputs,
        sessions: Sequence[SearchSession],
        relevance: Relevance,
        seed: int,
    ):
        self._settings, self._format, self._sessions, self._seed = settings, inputs.format, sessions, seed
        self._relevance = relevance
        self._prompts = inputs.format.encode_prompts([session.context for session in sessions])
        self._order = grain.MapDataset.range(len(sessions)).seed(seed).shuffle().repeat()
        answer = settings.rewriter.max_new_tokens
        self._sampler = InProcess(
            inputs.format, inputs.shape, max_new_tokens=answer, prompt_tokens=inputs.prompt_tokens,
            rows=settings.grpo.rows, dtype=settings.dtype, mesh=inputs.mesh,
        )  # fmt: skip
        self._shape = row_shape(settings)

    def batch(self, state: TrainState, step: int) -> tuple[Batch, dict[str, float]]:
        """The rows of one step, one context each, and what is known of it on the host."""
        grpo, reward = self._settings.grpo, self._settings.reward
        chosen = [int(self._order[step * grpo.rows + row]) for row in range(grpo.rows)]
        sessions, prompts = [self._sessions[i] for i in chosen], [self._prompts[i] for i in chosen]
        key = jax.random.fold_in(jax.random.key(self._seed), step)
        drawn = jax.device_get(self._sampler.draw(state.parameters, prompts, chosen, key, group=grpo.group))
        read = [
            [self._format.read(tokens[:length]) for tokens, length in zip(*of_prompt, strict=True)]
            for of_prompt in zip(drawn.tokens, drawn.lengths, strict=True)
        ]
        rewards = score_rewrites(sessions, read, self._relevance, reward)
        # A truncated rewrite is worth what the worst one as long as that may be.
        longer = max(0, self._settings.rewriter.max_new_tokens - reward.free_length) / reward.length_scale
        lowest = np.log(reward.low) + reward.off_query * np.log(reward.floor)
        worst = (lowest if reward.form == "ratio" else -1.0) - longer
        values_PG = np.where(np.isfinite(rewards.value), rewards.value, worst).reshape(grpo.rows, grpo.group)
        rows = []
        for place, prompt in enumerate(prompts):
            branches = rollout_branches(
                int(prompt[-1]), drawn.tokens[place], drawn.lengths[place], drawn.logprobs[place],
                np.zeros_like(drawn.tokens[place]), advantages(values_PG[place][:, None]), (1.0,), per_segment=False,
            )  # fmt: skip
            rows.append(render_row([Group(prompt[:-1], branches)], [(0, tuple(range(grpo.group)))], self._shape))
        spread_P = values_PG.std(axis=1, ddof=1)
        metrics = rewards.means() | {
            "reward_std": float(spread_P.mean()),
            "frac_reward_zero_std": float(np.mean(spread_P < 1e-8)),
            "completions/mean_length": float(drawn.lengths.mean()),
            "completions/clipped_ratio": float(drawn.truncated.mean()),
        }
        return stack(rows), metrics
