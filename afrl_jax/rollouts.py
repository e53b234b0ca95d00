"""Rollouts: what one step of reinforcement learning trains on - prompts, sampled answers, rewards, advantages, experts.

Everything a step draws comes from (seed, stage, step, row, sample) and the parameters, so a resumed run repeats it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from afrl_jax.answer_format import LABEL, SEGMENTS, AnswerFormat
from afrl_jax.curriculum import choose_prompts
from afrl_jax.data.batches import SFT_VALUES, answer_branch, judgment_groups, row_batches
from afrl_jax.evaluation import NO_RULE
from afrl_jax.label_scorer import LabelScorer
from afrl_jax.rewards import answer_rewards, label_reward
from afrl_jax.schema import Judgment
from afrl_jax.stepwise_grpo import TOKEN_VALUES, advantages, rollout_branches, step_mask
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import Parameters
from lm_jax.rows import Batch, Branch, Group, RowShape, empty_row, render_row, stack
from lm_jax.sample import Samples, sample
from lm_jax.token_loss import outputs
from lm_jax.train_state import TrainState
from sharding import distributed


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are drawn and rewarded; see `afrl_jax.stepwise_grpo` for the formulas.

    Answers are drawn at temperature 1: the log-probs of the train step are those of the distribution drawn from.
    """

    prompts: int = 8  # a step
    group: int = 8  # answers a prompt, G
    max_new_tokens: int = 64
    graded: bool = False  # label reward 1 - |error| / range instead of 1[right]
    label: str = "sampled"  # or "exact": the closed-form expectation
    stepwise: bool = True  # a reward a segment; False: their weighted sum, plain GRPO
    mask: bool = False  # OptGRM-like step mask
    weights: tuple[float, ...] = (1.0, 0.25, 0.5, 0.25)  # of label, match, rule, consistency
    pool: int = 1  # prompts looked at for each one practised on; above 1, those whose groups will be mixed are taken
    expert_rows: int = 2  # rows of expert answers a step, where the stage names experts
    gated: bool = False  # expert answers of the step's own prompts, where no sampled label is right

    @property
    def rows(self) -> int:
        """Of a step's batch."""
        return self.prompts + (0 if self.gated else self.expert_rows)


def prompt_width(longest: int) -> int:
    """Tokens that prompts of up to `longest` are padded to: few shapes."""
    return -(-longest // 32) * 32


class RolloutSource:
    """Draws the batch of a step from the current policy.

    Args:
        judgments: the pairs to practise on. experts: the pairs whose gold answers the auxiliary loss keeps alive.
        reference: parameters of the KL term's reference model, None without KL.
    """

    def __init__(
        self,
        format: AnswerFormat,
        config: DecoderConfig,
        settings: RolloutSettings,
        judgments: Sequence[Judgment],
        experts: Sequence[Judgment],
        *,
        seed: int,
        dtype: str,
        reference: Parameters | None = None,
        mesh: Mesh | None = None,
    ):
        if settings.label not in ("sampled", "exact"):
            raise ValueError(f"label: {settings.label!r} is neither 'sampled' nor 'exact'")
        self.format, self.config, self.settings, self.dtype, self.seed = format, config, settings, dtype, seed
        self.reference, self.mesh = reference, mesh
        self.judgments = list(judgments)
        self._encoded = format.encode_prompts([(j.query, j.document) for j in self.judgments])
        self._prompts = [prompt.tokens for prompt in self._encoded]
        self._order = grain.MapDataset.range(len(self.judgments)).seed(seed).shuffle().repeat()
        longest = max(len(prompt) for prompt in self._prompts)
        self._prompt_tokens = prompt_width(longest)
        explained = any(judgment.explanation for judgment in self.judgments)
        self.answer_tokens = settings.max_new_tokens if explained else 1
        gold = max(len(format.encode_answer(judgment)[0]) for judgment in self.judgments) if settings.gated else 0
        answers = settings.group * self.answer_tokens + gold
        grades = len(format.labels)
        expert_groups = []
        if settings.expert_rows and not settings.gated:
            expert_groups = judgment_groups(format, experts)
        sizes = [(len(group.trunk) + len(b.inputs), len(b.targets)) for group in expert_groups for b in group.branches]
        sizes.append((longest + answers, answers))
        tokens, targets = np.max(sizes, axis=0)
        self.shape = rollout_row_shape(int(tokens), int(targets), settings.group, grades)
        self._share = distributed.share(mesh)
        self._experts = None
        if expert_groups:
            self._experts = row_batches(
                [(expert_groups, 1.0)], self.shape, rows=settings.expert_rows, branches_together=4, seed=seed,
                share=self._share,
            )  # fmt: skip
        self._score = jax.jit(self._reference_logprobs)

    def batch(self, state: TrainState, step: int) -> tuple[Batch, dict[str, float]]:
        """This process's rows of one step and what is known of the step on the host: rewards, lengths, dead groups."""
        rows, natural = self._choose(state.parameters, step)
        samples = self.sample(state.parameters, rows, step)
        rendered, metrics = self._rollout_rows(rows, samples)
        metrics |= natural
        expert_rows = self.settings.expert_rows // self._share[1]
        if self._experts is not None:
            experts = self._experts[step]
            rendered += [{name: x[i] for name, x in experts.items()} for i in range(expert_rows)]
        elif expert_rows and not self.settings.gated:
            rendered += [empty_row(self.shape)] * expert_rows
        batch = stack(rendered)
        if self.reference is not None:
            batch["reference_logprob"] = self._reference(batch)
        return batch, metrics

    def _choose(self, parameters: Parameters, step: int) -> tuple[list[int], Mapping[str, float]]:
        """The judgments of a step: the next ones, or of the next `pool` times as many those worth practising."""
        size = self.settings.prompts * self.settings.pool
        rows = [int(self._order[step * size + i]) for i in range(size)]
        if self.settings.pool == 1:
            return rows, {}
        prompts = [self._encoded[row] for row in rows]
        head, labels = self.format.head_tokens, self.format.label_ids
        found = LabelScorer(parameters, self.config, labels, head=head, dtype=self.dtype).label_logprobs(prompts)
        accuracy = np.exp([of_grade[self.judgments[row].grade] for of_grade, row in zip(found, rows, strict=True)])
        rng = np.random.default_rng((self.seed, step))
        chosen = choose_prompts(accuracy, self.settings.prompts, self.settings.group, rng)
        return [rows[place] for place in chosen.places], chosen.natural

    def sample(self, parameters: Parameters, rows: Sequence[int], step: int, group: int | None = None) -> Samples:
        """G answers to each of these judgments' prompts."""
        tokens = np.zeros((len(rows), self._prompt_tokens), np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for place, row in enumerate(rows):
            lengths[place] = len(self._prompts[row])
            tokens[place, : lengths[place]] = self._prompts[row]
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        index, count = self._share
        mine = slice(len(rows) // count * index, len(rows) // count * (index + 1))
        earlier = [list(rows[:place]).count(row) for place, row in enumerate(rows)]  # one of few may come again
        identities = np.asarray(rows, np.uint32) + np.asarray(earlier, np.uint32) * len(self.judgments)
        inputs = (tokens[mine], lengths[mine], identities[mine])
        inputs = distributed.place_batch(inputs, self.mesh)
        drawn = sample(
            parameters,
            *inputs,
            key,
            config=self.config,
            group=group or self.settings.group,
            max_new_tokens=self.answer_tokens,
            eos=self.format.tokenizer.eos,
            dtype=self.dtype,
        )
        return distributed.fetch_rows(drawn, self.mesh)

    def own_right_answers(self, parameters: Parameters, rows: int = 16) -> list[Judgment]:
        """Judgments that the model, sampled once, answers fully right - with its own explanation (rehearsal)."""
        kept = []
        for start in range(0, len(self.judgments), rows):
            places = [min(start + i, len(self.judgments) - 1) for i in range(rows)]
            samples = self.sample(parameters, places, step=2**31 - 1, group=1)
            for offset, place in enumerate(range(start, min(start + rows, len(self.judgments)))):
                judgment, tokens = self.judgments[place], samples.tokens[offset, 0, : samples.lengths[offset, 0]]
                if np.nansum(1.0 - answer_rewards(self.format, judgment, tokens)) == 0:
                    parsed = self.format.parse(tokens) if judgment.explanation else None
                    own = parsed.explanation if parsed else None
                    kept.append(dataclasses.replace(judgment, explanation=own))
        return kept

    def _rollout_rows(self, rows: Sequence[int], samples: Samples) -> tuple[list[Batch], dict[str, float]]:
        settings, format = self.settings, self.format
        weights = np.array(settings.weights)
        rendered, rewards, dead = [], [], []
        index, count = self._share
        size = len(rows) // count
        for place, row in list(enumerate(rows))[index * size : (index + 1) * size]:
            judgment, prompt = self.judgments[row], self._prompts[row]
            tokens_GA, lengths_G = samples.tokens[place], samples.lengths[place]
            rewards_GS = np.array(
                [
                    answer_rewards(format, judgment, tokens[:length], graded=settings.graded)
                    for tokens, length in zip(tokens_GA, lengths_G, strict=True)
                ]
            )
            rewards.append(rewards_GS)
            if settings.stepwise:
                advantages_GS = np.nan_to_num(advantages(rewards_GS))
                if settings.mask:
                    advantages_GS = advantages_GS * step_mask(rewards_GS, advantages_GS)
            else:
                total_G1 = np.nansum(weights * rewards_GS, axis=1, keepdims=True)
                advantages_GS = np.repeat(advantages(total_G1), len(SEGMENTS), axis=1)
            right = tokens_GA[:, 0] == format.label_ids[judgment.grade]
            if settings.label == "exact":
                advantages_GS[:, LABEL] = 0.0
            branches = rollout_branches(
                int(prompt[-1]), tokens_GA, lengths_G, samples.logprobs[place], format.segments(tokens_GA),
                advantages_GS, weights, per_segment=settings.stepwise,
            )  # fmt: skip
            if settings.label == "exact":
                branches[0] = self._with_exact_label(branches[0], judgment)
            if settings.gated and not right.any():
                branches.append(answer_branch(format, judgment, prompt[-1:], judgment.weight))
            group = Group(prompt[:-1], branches)
            rendered.append(render_row([group], [(0, tuple(range(len(branches))))], self.shape))
            rule = judgment.deciding_rule
            dead.append((NO_RULE if rule is None else rule, not right.any()))
        if count > 1:
            rewards, dead = distributed.concatenate(np.array(rewards)), distributed.concatenate(np.array(dead))
        by_rule = defaultdict(list)
        for rule, value in np.array(dead, int).tolist():
            by_rule[rule].append(value)
        return rendered, self._metrics(np.array(rewards), samples) | {
            f"dead_groups/{rule}": float(np.mean(values)) for rule, values in by_rule.items() if rule != NO_RULE
        }

    def _with_exact_label(self, branch: Branch, judgment: Judgment) -> Branch:
        grades = len(self.format.labels)
        reward = [label_reward(grade, judgment.grade, grades, self.settings.graded) for grade in range(grades)]
        weighted = self.settings.weights[LABEL] * np.array(reward)
        return dataclasses.replace(branch, label_values={"exact_unit": 1.0, "label_reward": weighted})

    def _metrics(self, rewards_PGS: np.ndarray, samples: Samples) -> dict[str, float]:
        """TRL's names for what TRL has: https://huggingface.co/docs/trl/grpo_trainer#logged-metrics."""
        total_PG = np.nansum(rewards_PGS * np.array(self.settings.weights), axis=-1)
        deviation_P = total_PG.std(axis=1, ddof=1)
        metrics = {
            "reward": total_PG.mean(),
            "reward_std": deviation_P.mean(),
            "frac_reward_zero_std": np.mean(deviation_P < 1e-8),
            "completions/mean_length": samples.lengths.mean(),
            "completions/clipped_ratio": samples.truncated.mean() if self.answer_tokens > 1 else 0.0,
        }
        for number, name in enumerate(SEGMENTS):
            if not np.isnan(values := rewards_PGS[..., number]).all():
                metrics[f"rewards/{name}/mean"] = np.nanmean(values)
        return {name: float(value) for name, value in metrics.items()}

    def _reference(self, batch: Batch) -> np.ndarray:
        """Of this process's rows."""
        index, rows = self._share[0], len(batch["tokens"])
        scored = self._score(self.reference, distributed.place_batch(batch, self.mesh))
        whole = distributed.fetch_rows(scored, self.mesh)
        return whole[index * rows : (index + 1) * rows]

    def _reference_logprobs(self, parameters: Parameters, batch: Mapping[str, Any]) -> jax.Array:
        decoder = Decoder(self.config, parameters, dtype=self.dtype)
        return outputs(decoder, batch, self.format.label_ids).logprob_BM


def rollout_row_shape(tokens: int, targets: int, group: int, grades: int) -> RowShape:
    """The row that holds `tokens`, in steps of 64, of a prompt with its group of answers, or of expert answers."""
    return RowShape(
        tokens=-(-tokens // 64) * 64,
        targets=targets,
        labels=max(8, group),
        token_values=(*SFT_VALUES, *TOKEN_VALUES),
        label_values=(
            ("label_unit", ()),
            ("label_gold", (grades,)),
            ("exact_unit", ()),
            ("label_reward", (grades,)),
        ),
    )


def repeat_updates(source: RolloutSource, updates: int) -> Callable[[TrainState, int], tuple[Batch, dict[str, float]]]:
    """Draw rollouts every `updates` steps and train on them that often; from the second on, clipping matters."""
    held: dict[int, tuple[Batch, dict[str, float]]] = {}

    def batch_at(state: TrainState, step: int) -> tuple[Batch, dict[str, float]]:
        start = step - step % updates
        if start not in held:
            held.clear()
            held[start] = source.batch(state, step)
        return held[start]

    return batch_at
