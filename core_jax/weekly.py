"""Weekly redeploys, simulated: train on a week, judge on the next, promote or keep, write the rewrites to the store.

    a week's sessions --one phase from the last PROMOTED version--> candidate --gate on the next week--> verdict

The world drifts from week to week, and incidents are planted in the weeks that the config names. What the gate decides
is what happens; what other gates would have said of the same candidates, and what the independent judge sees, which no
gate may, stands beside every verdict. The gate measures with the relevance model that the run began with: one that
measures with the model that rewarded a candidate cannot see that model's own bias. "reward_only" does, as a gate that
trusts the reward would. A finished week is skipped; a killed one is done again and ends the same. Whoever moves
production by hand meanwhile is obeyed: a promotion that was rolled back is not made again, and a week whose incumbent
is in production no longer begins anew, from what is.

In the run's folder: registry/ (core_jax.registry), weeks/<number>/report.html, weeks/report.html (the gates as
detectors), rewrites.sqlite and rewrites.key (the store that core_jax.serve reads; `weekly.store` names another one).
The built-in world goes on by itself; for a log of your own `python -m core_jax.fill_store --help` fills a store.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afrl_jax.data import batches
from afrl_jax.sft import SFT
from afrl_jax.sft import TERMS as SFT_TERMS
from core_jax import gate, weekly_report
from core_jax.evaluation import Evaluated, evaluate
from core_jax.gate import GATES, Measurements, Verdict
from core_jax.gate_report import write_gate_report
from core_jax.incidents import INCIDENTS, Incident
from core_jax.inputs import Inputs, Sessions, check_rows, example_groups, open_sessions, padded, prompt_lengths
from core_jax.phases import NoPairs, Phase
from core_jax.recipe import GOLDEN, START, Recipe, make_sampler
from core_jax.registry import MOVES, Registry, golden_self_test
from core_jax.relevance import Relevance
from core_jax.rewriter import Rewriter
from core_jax.sampler import Sampler
from core_jax.schema import Context
from core_jax.search.rewrite_store import RewriteStore, open_backend, read_refusals, read_secret
from core_jax.search.trial import Compared, Trial, compare
from core_jax.session_reader import RewriteExample
from lm_jax import run_log
from lm_jax.parameters import Parameters, abstract
from lm_jax.weights import read_weights

WHO = "weekly redeploy"
STORE, KEY, REGISTRY = "rewrites.sqlite", "rewrites.key", "registry"
STORE_TIMEOUT = 30.0  # seconds; nobody waits who searches
EXAMPLES = 12


class Weekly:
    """The weeks after a run: its rewriter is the first version in production."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.settings = recipe, recipe.settings
        weekly = self.settings.weekly
        self.numbers = range(weekly.first_week, weekly.first_week + weekly.weeks)
        self.training = {week: self._open("train", week, weekly.sessions) for week in self.numbers}
        self.following = {week: self._open("dev", week + 1, weekly.held_out) for week in self.numbers}
        self.inputs = _fitting(recipe, [*self.training.values(), *self.following.values()])
        self.refusals = read_refusals(weekly.unsafe)
        self.run = recipe.run  # all is checked: the folder may appear
        self.registry = Registry(self.run.path / REGISTRY, functools.partial(golden_self_test, mesh=recipe.inputs.mesh))

    def __call__(self) -> dict[str, float]:
        """Run the weeks that are not finished; returns the figures of weeks/metrics.json."""
        self._first_version()
        weeks = []
        for number in self.numbers:
            facts = self.run.once(f"week{number}", lambda: self._week(number, weeks))  # noqa: B023
            weeks.append(facts)
            run_log.say(f"week {number}{facts['incident'] and ', ' + facts['incident']}: {facts['decisions']['gate']}")
        return weekly_report.write(self.run.path / "weeks", weeks)

    def _open(self, split: str, week: int, count: int) -> Sessions:
        """Sessions of a week, in all else like those that the run trained on."""
        like = dict(self.settings.data[self.settings.sessions])
        drift = self.settings.weekly.drift
        source = like | {"split": split, "week": week, "sessions": count, "drift": drift}
        try:
            return open_sessions(source, self.settings.seed)
        except ValueError as error:
            raise ValueError(f"weekly: {error}") from error

    # --- one week --------------------------------------------------------------------------------------------------

    def _week(self, number: int, weeks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        while (facts := self._attempt(number, weeks)) is None:
            run_log.say(f"week {number}: somebody has moved production, so the week begins again from there")
            for stage in (f"week{number}.candidate", f"week{number}.incumbent"):
                shutil.rmtree(self.run.checkpoints(stage), ignore_errors=True)
                shutil.rmtree(self.run.path / "stages" / stage, ignore_errors=True)
        return facts

    def _standing(self, number: int, began: Mapping[str, Any]) -> str:
        """What became of production since the week began: "incumbent" - it is there, and this week has not moved it, or
        was killed between log and link -, "promoted" or "rolled back", this week's candidate; "moved", by others."""
        moves = [record for record in self.registry.history()[began["records"] :] if record["action"] in MOVES]
        own = [place for place, move in enumerate(moves) if (move["who"], move["why"]) == (WHO, _reason(number))]
        later = [move["action"] for move in moves[own[-1] + 1 :] if move["action"] != "recovered"] if own else []
        if "rollback" in later:
            return "rolled back"
        if self.registry.production() == began["version"] and not later:
            return "incumbent"
        return "promoted" if own else "moved"

    def _attempt(self, number: int, weeks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The week's facts; None where its incumbent is in production no longer."""
        began = self.run.once(
            f"week{number}.incumbent",
            # Of the registry, not of the week before: somebody may have rolled back since.
            lambda: {"version": self.registry.production(), "records": len(self.registry.history())},
        )
        if self._standing(number, began) == "moved":
            return None
        incumbent = began["version"]
        name = self.settings.weekly.incidents.get(f"week{number}", "")
        incident = INCIDENTS[name] if name else Incident("")
        wronged = incident.relevance or (lambda relevance: relevance)
        before = self._version(incumbent)
        candidate = self._candidate(number, incumbent, incident, wronged(self.recipe.relevance))
        after = self._rewriter(incident.damage(candidate, number) if incident.damage else candidate)
        following = self.following[number]
        # By the relevance model that the run began with: one that has gone wrong cannot be asked whether it has.
        trusted = self.recipe.deployed
        evaluated = [evaluate(rewriter, following, trusted, self.settings.reward) for rewriter in (before, after)]
        measured = [self._measurements(following.contexts, each) for each in evaluated]
        rewarded = measured
        if incident.relevance:
            asked = wronged(trusted)
            again = [evaluate(rewriter, following, asked, self.settings.reward) for rewriter in (before, after)]
            rewarded = [self._measurements(following.contexts, each) for each in again]
        first = measured[0]
        if incumbent != (version := self._first_version()):
            found = evaluate(self._version(version), following, trusted, self.settings.reward)
            first = self._measurements(following.contexts, found)
        options = {"first": first, "seed": self.settings.seed, "resamples": self.settings.weekly.resamples}
        verdicts = {
            gate_name: gate.decide(*(rewarded if of_gate is gate.REWARD_ONLY else measured), of_gate, **options)
            for gate_name, of_gate in GATES.items()
        }
        verdict = verdicts["gate"]
        version = self._publish(number, after)
        if (standing := self._standing(number, began)) == "moved":
            return None
        if verdict.promote and standing == "incumbent":
            self.registry.promote(
                version, who=WHO, why=_reason(number), figures=verdict.figures(), instead_of=incumbent
            )
        production = self.registry.production()
        if production in (incumbent, version):  # of another, moved there by hand, no rewrites are at hand
            self._write_store(production, following, evaluated[int(production == version)])
        judged = [float(np.mean(each.values["judge"])) for each in evaluated]
        effect = self._effect(following, evaluated, wronged(self.recipe.deployed))
        ndcg = effect["ndcg_exp@10"].difference.value if effect else None
        facts = {
            "week": number,
            "incident": name,
            "reasons": list(verdict.reasons),
            "incumbent": incumbent,
            "candidate": version,
            "production": production,
            "decisions": {gate_name: each.decision for gate_name, each in verdicts.items()},
            "rolled_back": standing == "rolled back",
            "figures": verdict.figures(),
            "judge": {"incumbent": judged[0], "candidate": judged[1]},
            "search": ndcg,
            "improvement_rate": float(np.mean(evaluated[1].values["improvement_rate"])),
        }
        self._report(number, verdicts, evaluated, facts, effect, weeks)
        return facts

    def _candidate(self, number: int, incumbent: str, incident: Incident, relevance: Relevance) -> Parameters:
        """One phase on the week's sessions from the version in production, and what the incident does to it."""
        name = f"week{number}.candidate"
        if self.run.finished(name) is not None:
            return self.run.arrays(name, abstract(self.inputs.shape, self.inputs.mesh))
        start = read_weights(self.registry.path(incumbent), mesh=self.inputs.mesh)[1]
        settings = self.settings
        if incident.reward:
            settings = dataclasses.replace(settings, reward=incident.reward(settings.reward))
        seed = settings.seed * 1000 + 500 + number
        log = run_log.RunLog(self.run.path)
        sessions = self.training[number].sessions
        if incident.text:
            return self._taught(name, number, incident, start, log)
        phase = Phase(
            name, settings, self.inputs, sessions, relevance=relevance, sampler=self._sampler, run=self.run, log=log,
            seed=seed,
        )  # fmt: skip
        try:
            trained = phase(start)
        except NoPairs as nothing:  # a week that teaches nothing leaves the incumbent as it is
            run_log.say(str(nothing))
            trained = start
        return trained

    def _taught(self, name: str, number: int, incident: Incident, start: Parameters, log: run_log.RunLog) -> Parameters:
        """The incumbent after it has learned to say what the incident says."""
        stage, contexts = self.settings.supervised, self.training[number].contexts
        examples = [RewriteExample(context, incident.text(context)) for context in contexts]
        groups = example_groups(self.inputs.format, examples, self.settings.rewriter.max_new_tokens)
        shape = batches.sft_row_shape(groups, stage.row_tokens, 1)
        dataset = batches.row_batches([(groups, 1.0)], shape, rows=stage.rows, branches_together=1, seed=number)
        coefficients = dict.fromkeys(SFT_TERMS, 0.0) | {"sft/explanation": 1.0}
        steps = self.settings.weekly.incident_steps
        return self.recipe.fit(name, stage, steps, start, SFT, batches.in_order(dataset), coefficients, log)

    # --- measuring -------------------------------------------------------------------------------------------------

    def _measurements(self, contexts: Sequence[Context], evaluated: Evaluated) -> Measurements:
        """The seven metrics of what `evaluate` found, surprisal under the frozen rewriter of the supervised start."""
        said = [self.inputs.format.encode_rewrite(text, ended=False) for text in evaluated.rewrites]
        values = evaluated.values
        return Measurements.of(
            [context.key for context in contexts],
            evaluated.queries,
            positive=values["s_pos"],
            negative=values["s_neg"],
            random=values["s_rand"],
            entropy=values["entropy"],
            surprisal=self._language.measure(contexts, said).surprisal,
            length=values["length"],
            truncated=values["truncated"],
            gamma=self.settings.reward.gamma,
            floor=self.settings.reward.floor,
        )

    @functools.cached_property
    def _language(self) -> Rewriter:
        """The frozen language model of surprisal: the rewriter of the supervised start."""
        return self._rewriter(self.run.arrays(START, abstract(self.inputs.shape, self.inputs.mesh)))

    @functools.cached_property
    def _sampler(self) -> Sampler:
        return make_sampler(self.settings, self.inputs, self.run.path / "served")

    def _version(self, version: str) -> Rewriter:
        return Rewriter.load(self.registry.path(version), dtype=self.settings.dtype, mesh=self.inputs.mesh)

    def _rewriter(self, parameters: Parameters) -> Rewriter:
        return Rewriter(
            self.inputs.shape, parameters, self.inputs.format,
            max_new_tokens=self.settings.rewriter.max_new_tokens, dtype=self.settings.dtype,
        )  # fmt: skip

    def _effect(
        self, following: Sessions, evaluated: Sequence[Evaluated], relevance: Relevance
    ) -> dict[str, Compared] | None:
        """Searching with the candidate's rewrites against searching with the incumbent's, on some of the sessions."""
        count = min(self.settings.weekly.searches, len(following.truth))
        if not count:
            return None
        trial = Trial.of(following.truth[:count], following.truth[count:])
        found = trial.with_rewrites(relevance, *map(_usable, evaluated), refusals=self.refusals)
        queries = [context.query for context in following.contexts[:count]]
        return compare(*found, queries, seed=self.settings.seed, resamples=self.settings.weekly.resamples)

    # --- what a week leaves ----------------------------------------------------------------------------------------

    def _first_version(self) -> str:
        """The run's rewriter, in production before the first week."""

        def make() -> dict[str, Any]:
            version = self.registry.publish(self.run.path / "export", who=WHO, why="the run's rewriter")
            if self.registry.production() is None:
                self.registry.promote(version, who=WHO, why="the first version")
            return {"version": version}

        return self.run.once("week0.version", make)["version"]

    def _publish(self, number: int, rewriter: Rewriter) -> str:
        """The candidate as a version, promoted or not: what was judged can be looked at later."""
        contexts = self.following[number].contexts
        folder = self.run.path / "candidates" / f"week{number}"
        rewriter.export(folder, contexts[:: max(1, len(contexts) // GOLDEN)][:GOLDEN], week=number)
        version = self.registry.publish(folder, who=WHO, why=f"candidate of week {number}")
        shutil.rmtree(folder)
        return version

    def _write_store(self, version: str, following: Sessions, evaluated: Evaluated) -> None:
        address = self.settings.weekly.store or str(self.run.path / STORE)
        backend = open_backend(address, timeout=STORE_TIMEOUT)
        store = RewriteStore(backend, read_secret(self.run.path / KEY), refusals=self.refusals)
        keys = [context.key for context in following.contexts]
        found = zip(keys, _usable(evaluated), strict=True)
        counts = store.write(version, [(key, rewrite) for key, rewrite in found if rewrite is not None])
        run_log.say("store: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))

    def _report(
        self,
        number: int,
        verdicts: Mapping[str, Verdict],
        evaluated: Sequence[Evaluated],
        facts: Mapping[str, Any],
        effect: Mapping[str, Compared] | None,
        weeks: Sequence[Mapping[str, Any]],
    ) -> None:
        contexts = self.following[number].contexts
        chosen = range(0, len(contexts), max(1, len(contexts) // EXAMPLES))[:EXAMPLES]
        write_gate_report(
            self.run.path / "weeks" / str(number),
            verdicts["gate"],
            title=f"Week {number}: {verdicts['gate'].decision}{', rolled back' if facts['rolled_back'] else ''}",
            back=f"python -m core_jax.registry --registry={shlex.quote(str(self.registry.folder))} rollback "
            f'--why="what week {number} left in production is taken back"',
            facts={
                "candidate": facts["candidate"][:12],
                "incumbent": facts["incumbent"][:12],
                "planted incident": facts["incident"] or "none",
                "independent judge": "{incumbent:.3f} incumbent, {candidate:.3f} candidate".format(**facts["judge"]),
                "improves on the query": f"{facts['improvement_rate']:.1%} of the candidate's rewrites",
            },
            effect=effect,
            other_gates={name: verdict for name, verdict in verdicts.items() if name != "gate"},
            examples=[
                {
                    "query": contexts[place].query,
                    "watched": contexts[place].watched.title if contexts[place].watched else "",
                    "incumbent": evaluated[0].rewrites[place],
                    "candidate": evaluated[1].rewrites[place],
                }
                for place in chosen
            ],
            weeks=weekly_report.week_rows([*weeks, facts]),
        )


def _reason(number: int) -> str:
    return f"week {number}: passes the gate"


def _usable(evaluated: Evaluated) -> list[str | None]:
    """The rewrites; None where one was cut off or says nothing."""
    cut = evaluated.values["truncated"].tolist()
    return [text if text and not of else None for text, of in zip(evaluated.rewrites, cut, strict=True)]


def _fitting(recipe: Recipe, some: Sequence[Sessions]) -> Inputs:
    """The run's inputs for prompts as long and as short as those of all weeks.

    Raises:
        ValueError: a pair of some week would not fit into a row.
    """
    inputs = recipe.inputs
    sessions = [session for each in some for session in each.sessions]
    lengths = prompt_lengths(inputs.format, sessions)
    check_rows(recipe.settings, "mpo", inputs.format, sessions, lengths, {})
    stage, most = recipe.settings.supervised, max(lengths) - 1 + recipe.settings.rewriter.max_new_tokens
    taught = [name for name in recipe.settings.weekly.incidents.values() if INCIDENTS[name].text]
    if taught and most > stage.row_tokens:
        raise ValueError(
            f"supervised.row_tokens: {stage.row_tokens} is too small for weekly.incidents ({taught[0]}), whose prompts "
            f"and rewrites have up to {most} tokens"
        )
    return dataclasses.replace(
        inputs,
        prompt_tokens=max(inputs.prompt_tokens, padded(max(lengths))),
        shortest_prompt=min(inputs.shortest_prompt, *lengths),
    )
