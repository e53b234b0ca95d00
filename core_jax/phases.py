"""One phase of semi-online optimization: synchronize once, sample once, score once, pair, then many steps.

    policy --sync--> sampler --N rewrites a context--> reward --top-k / bottom-k--> pairs --many steps--> policy

The policy at the phase's start is the reference; its log-probs of the pairs are computed once. (Semi-online DPO: arXiv
2506.21495; that CoRe, arXiv 2606.14127, synchronizes once a phase is reported of it.)

A killed phase goes on where it was: drawn rewrites are on disk block by block, scores in the relevance cache, steps in
checkpoints; all else follows from them, so the phase ends with the bits it would have ended with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from afrl_jax.data import batches
from core_jax import mpo
from core_jax.inputs import Inputs
from core_jax.preference_pairs import Pair, preference_pairs, query_pairs
from core_jax.ratio_reward import Rewards, score_rewrites
from core_jax.relevance import Counted, Relevance
from core_jax.sampler import Rewrites, Sampler
from core_jax.schema import SearchSession
from core_jax.settings import Settings, TrainSettings
from lm_jax import lora, optimizer, run_log
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters
from lm_jax.rows import Group, RowShape, plan_rows, render_row, stack
from lm_jax.run_folder import RunFolder, write_atomically
from lm_jax.train_loop import fit
from sharding.distributed import place_batch


class NoPairs(RuntimeError):
    """A phase found nothing to learn from: no two rewrites of any context differ by the margin."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a phase learns from, and what it cost."""

    pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]  # tokens of prompt, chosen and rejected rewrite
    figures: Mapping[str, float]


class Phase:
    """One phase of a run, by name: makes what it does not find finished in the run's folder.

    Args:
        sessions: those of this phase.
        seed: decides what is drawn and in which order pairs are seen.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        inputs: Inputs,
        sessions: Sequence[SearchSession],
        *,
        relevance: Relevance,
        sampler: Sampler,
        run: RunFolder,
        log: run_log.RunLog,
        seed: int,
    ):
        self.name, self.settings, self.inputs, self.sessions = name, settings, inputs, sessions
        self.relevance, self.sampler, self.run, self.log, self.seed = relevance, sampler, run, log, seed

    def __call__(self, parameters: Parameters) -> Parameters:
        """The policy after the phase; the run's folder keeps it under the phase's name."""
        began = time.monotonic()
        collected = self.collect(parameters)
        groups = self._with_reference(parameters, collected)
        collecting = time.monotonic() - began
        trained, updates = self.train(parameters, groups)
        seconds = self.log.seconds(self.name)
        facts = dict(collected.figures) | {
            "steps": updates,
            "syncs": len((self._folder / "syncs").read_text()),  # one, and one more for each kill while sampling
            # The policy that drew a pair is at most so many updates older than the one that learns from it last.
            "staleness/most_steps": updates - 1,
            "seconds/training": round(seconds, 1),
            "seconds": round(collecting + seconds, 1),
        }
        self.run.finish(self.name, facts, trained)
        kept = f"{facts['pairs']} pairs, {facts['share_in_gradient']:.0%} of what was drawn"
        run_log.say(f"{self.name}: {kept}; {facts['seconds']:.0f} s")
        return trained

    # --- sampling and scoring --------------------------------------------------------------------------------------

    def collect(self, parameters: Parameters) -> Collected:
        """Draw and score the phase's rewrites, and pair them.

        Raises:
            NoPairs: says how far the rewrites' values lie apart.
        """
        phases = self.settings.phases
        began = time.monotonic()
        drawn = self._draw(parameters)
        sampled = time.monotonic()
        read = [[self.inputs.format.read(tokens) for tokens in rewrites] for rewrites in drawn]
        relevance = Counted(self.relevance)
        queries = [self.inputs.format.encode_rewrite(session.context.query) for session in self.sessions]
        texts = [[*of, self.inputs.format.read(query)] for of, query in zip(read, queries, strict=True)]
        with_query = score_rewrites(self.sessions, texts, relevance, self.settings.reward)
        scored = time.monotonic()
        values_SN = with_query.value.reshape(-1, phases.rewrites + 1)
        rewards = with_query[np.arange(values_SN.size) % (phases.rewrites + 1) < phases.rewrites]
        prompts = self.inputs.format.encode_prompts([session.context for session in self.sessions])
        pairs, margins, learned = [], [], 0
        for prompt, rewrites, query, said, values in zip(prompts, drawn, queries, texts, values_SN, strict=True):
            answers, found = [*rewrites, query], self._pairs([each.text for each in said], values, len(query))
            pairs += [(prompt, answers[pair.chosen], answers[pair.rejected]) for pair in found]
            margins += [pair.margin for pair in found]
            learned += len({place for pair in found for place in pair[:2]} - {len(rewrites)})
        if not pairs:
            finite = rewards.value[np.isfinite(rewards.value)]
            spread = f"values lie between {finite.min():.3g} and {finite.max():.3g}" if len(finite) else "none ended"
            raise NoPairs(
                f"{self.name}: no pair of {len(rewards.value)} rewrites reaches phases.margin {phases.margin}: {spread}"
            )
        count = len(rewards.value)
        figures = {
            "contexts": len(self.sessions),
            "sampled": count,
            "pairs": len(pairs),
            "share_in_gradient": learned / count,
            "margin": float(np.mean([margin for margin in margins if np.isfinite(margin)] or [0.0])),
            "reward_batches": relevance.calls,
            "relevance_pairs": relevance.pairs,
            "tokens": sum(len(tokens) for rewrites in drawn for tokens in rewrites),
            "distinct": float(np.mean([len({t.text for t in texts}) / len(texts) for texts in read])),
            "truncated": float(np.mean([t.truncated for texts in read for t in texts])),
            **rewards.means(),
            **_spread_within(rewards, phases.rewrites),
        }
        if not self._reference.exists():  # else it was written before the steps, where it belongs
            stage = f"{self.name}.collect"
            self.log.resume(stage, 0)
            self.log.write(stage, 0, figures)
        clock = {"seconds/sampling": round(sampled - began, 1), "seconds/scoring": round(scored - sampled, 1)}
        return Collected(pairs, figures | clock)

    def _pairs(self, texts: Sequence[str], values: np.ndarray, query_tokens: int) -> list[Pair]:
        """The pairs of a context's rewrites and its query, the last of texts and values. A query that is longer than a
        rewrite may be is in none."""
        phases = self.settings.phases
        found = preference_pairs(texts[:-1], values[:-1], k=phases.k, margin=phases.margin)
        if query_tokens <= self.settings.rewriter.max_new_tokens:
            found += query_pairs(texts, values, count=phases.query_pairs, margin=phases.margin)
        return found

    def _draw(self, parameters: Parameters) -> Rewrites:
        """The rewrites of all sessions, from disk as far as they are there."""
        phases = self.settings.phases
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "rewrites.jsonl"
        drawn = _read_journal(file, [session.session_id for session in self.sessions], phases.rows)
        missing = range(len(drawn), len(self.sessions), phases.rows)
        if not missing:
            return drawn
        self.sampler.sync(parameters, self.name)
        with (self._folder / "syncs").open("a") as syncs:
            syncs.write("1")
        with file.open("a", encoding="utf-8") as journal:
            for start in run_log.progress(missing, f"{self.name}: sampling", len(missing)):
                block = self.sessions[start : start + phases.rows]
                numbers = range(start, start + len(block))
                rewrites = self.sampler.sample([s.context for s in block], numbers, self.seed, phases.rewrites)
                for session, of_session in zip(block, rewrites, strict=True):
                    tokens = [answer.tolist() for answer in of_session]
                    journal.write(json.dumps({"session_id": session.session_id, "rewrites": tokens}) + "\n")
                journal.flush()
                drawn += rewrites
        return drawn

    @property
    def _folder(self) -> Path:
        return self.run.path / "stages" / self.name

    @property
    def _reference(self) -> Path:
        return self._folder / "reference.npy"

    @property
    def _paired(self) -> Path:
        return self._folder / "reference.sha256"  # of the pairs whose log-probs are in `_reference`

    # --- training --------------------------------------------------------------------------------------------------

    @property
    def _shape(self) -> RowShape:
        return mpo.row_shape(
            self.settings.mpo.row_tokens, self.inputs.shortest_prompt, self.settings.rewriter.max_new_tokens
        )

    def _groups(self, pairs: Sequence[tuple], reference: np.ndarray | None = None) -> list[Group]:
        reference = np.zeros((len(pairs), 2)) if reference is None else reference
        return [
            mpo.pair_group(
                *pair,
                normalization=self.settings.mpo.normalization,
                reference_logprobs=reference[number],
                number=number,
            )
            for number, pair in enumerate(pairs)
        ]

    def _with_reference(self, parameters: Parameters, collected: Collected) -> list[Group]:
        """The pairs as groups that carry the log-probs of the policy at the phase's start, computed once.

        Raises:
            ValueError: what is on disk was computed for other pairs.
        """
        pairs = json.dumps([[tokens.tolist() for tokens in pair] for pair in collected.pairs])
        digest = hashlib.sha256(pairs.encode()).hexdigest()
        if self._reference.exists() and self._paired.read_text() != digest:
            raise ValueError(
                f"{self._reference} holds log-probs of other pairs than those collected now; without "
                f"stages/{self.name} and checkpoints/{self.name} the phase begins again"
            )
        if not self._reference.exists():
            write_atomically(self._paired, digest)
            found = reference_logprobs(
                parameters, self.inputs, self._groups(collected.pairs), self._shape, self.settings
            )
            with self._reference.with_suffix(".tmp").open("wb") as partial:
                np.save(partial, found)
            self._reference.with_suffix(".tmp").replace(self._reference)
        return self._groups(collected.pairs, np.load(self._reference))

    def _rehearsed(self) -> list[tuple[list[Group], float]]:
        """People's rewrites beside the pairs, each source with its share of the rows."""
        mpo_settings, mixture = self.settings.mpo, self.settings.supervised.mixture
        if not mpo_settings.rehearsal:
            return []
        normalization = mpo_settings.normalization
        return [
            (
                [mpo.rehearsal_group(group, normalization=normalization) for group in self.inputs.supervised[name]],
                mpo_settings.rehearsal * share / sum(mixture.values()),
            )
            for name, share in mixture.items()
        ]

    def train(self, parameters: Parameters, groups: Sequence[Group]) -> tuple[Parameters, int]:
        """The policy after `mpo.steps` steps on the pairs, and how many updates its train state counted."""
        settings = self.settings.mpo
        transformation = make_optimizer(self.inputs.shape, settings)
        parameters = jax.tree.map(lambda x: x.copy(), parameters)  # the step donates them, the caller's stay
        parameters = adapted(parameters, settings, self.inputs, self.settings, self.seed)
        sources = [(groups, 1.0 - settings.rehearsal), *self._rehearsed()]
        dataset = batches.row_batches(sources, self._shape, rows=settings.rows, branches_together=2, seed=self.seed)
        weights = dict(zip(mpo.TERMS, settings.weights, strict=True))
        state = fit(
            stage=self.name,
            state=mpo.create(parameters, transformation),
            step=mpo.make_step(
                self.inputs.shape, transformation, beta=settings.beta, delta=settings.delta,
                micro_batches=settings.micro_batches, dtype=self.settings.dtype, remat=self.settings.remat,
            ),
            batch_at=batches.in_order(dataset),
            coefficients=lambda step: weights,
            learning_rate=learning_rate(settings, settings.steps),
            steps=settings.steps,
            folder=self.run.checkpoints(self.name),
            log=self.log,
            save_every=settings.save_every,
            mesh=self.inputs.mesh,
        )  # fmt: skip
        return lora.merge(state.parameters, config=self.inputs.shape), int(state.step)


def reference_logprobs(
    parameters: Parameters, inputs: Inputs, groups: Sequence[Group], shape: RowShape, settings: Settings
) -> np.ndarray:
    """Log-probs float32 [P, 2] of the chosen and rejected rewrites of P pairs."""
    rows = settings.mpo.rows
    plan = plan_rows(groups, shape, branches_together=2, seed=0)
    plan += [[]] * (-len(plan) % rows)
    found = np.zeros((len(groups), 2), np.float32)
    for start in range(0, len(plan), rows):
        batch = stack([render_row(groups, row, shape) for row in plan[start : start + rows]])
        number_BQ = batch["number"].astype(np.int64)
        logprobs_BQ2 = mpo.pair_logprobs(
            parameters, place_batch(batch, inputs.mesh), config=inputs.shape, dtype=settings.dtype
        )
        used_BQ = number_BQ > 0
        found[number_BQ[used_BQ] - 1] = np.asarray(logprobs_BQ2)[used_BQ]
    return found


def adapted(parameters: Parameters, stage: TrainSettings, inputs: Inputs, settings: Settings, seed: int) -> Parameters:
    """What the stage trains: the parameters, or adapters on them."""
    return lora.attach(
        inputs.shape, parameters, rank=stage.lora_rank, targets=stage.lora_targets, seed=seed, dtype=settings.dtype,
        mesh=inputs.mesh,
    )  # fmt: skip


def make_optimizer(shape: DecoderConfig, stage: TrainSettings) -> optax.GradientTransformation:
    """The optimizer of a stage."""
    return optimizer.make_optimizer(shape, kind=stage.optimizer, weight_decay=stage.weight_decay, clip=stage.clip)


def learning_rate(stage: TrainSettings, steps: int) -> Callable[[int], float]:
    """Step -> learning rate of a stage of so many steps."""
    return optimizer.learning_rate_schedule(
        stage.learning_rate, steps, warmup=stage.warmup, schedule=stage.schedule, final=stage.final_learning_rate
    )


def _read_journal(file: Path, session_ids: Sequence[str], rows: int) -> Rewrites:
    """The rewrites of the blocks of `rows` sessions that are on disk whole; what a kill cut short leaves the file."""
    if not file.exists():
        return []
    found = file.read_text(encoding="utf-8")
    lines = [f"{line}\n" for line in found.split("\n")[:-1]]
    if len(lines) < len(session_ids):
        lines = lines[: len(lines) - len(lines) % rows]
    records = [json.loads(line) for line in lines]
    if [record["session_id"] for record in records] != list(session_ids[: len(records)]):
        raise ValueError(f"{file} holds the rewrites of other sessions")
    if (whole := "".join(lines)) != found:
        write_atomically(file, whole)
    return [[np.array(tokens, np.int32) for tokens in record["rewrites"]] for record in records]


def _spread_within(rewards: Rewards, group: int) -> dict[str, float]:
    """How far the rewards of one context lie apart (TRL's names)."""
    deviation = rewards.reward.reshape(-1, group).std(axis=1, ddof=1)
    return {"reward_std": float(deviation.mean()), "frac_reward_zero_std": float(np.mean(deviation < 1e-8))}
