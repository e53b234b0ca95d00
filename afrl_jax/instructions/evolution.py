"""Instruction evolution: Probe, Identify, Amend, Recheck, Synthesize, and again. That AFRL has such a system, PIAR, is
told of it (arXiv 2602.10006); this loop is ours.

    state   an instruction, and the Pareto pool of those that stood
    sets    dev_new: disagreements are read here, and an edit must pay here; dev_replay: frozen, here nothing may be
            forgotten. Test pairs never come near this module.

Each round probes the best of the pool, clusters its disagreements, lets a proposer amend it, and of each cluster's
edits takes the best that Recheck accepts. The loop ends after its rounds, or when nothing is proposed any more. A round
that is finished is on disk and never done again; the probes of an unfinished one are too. The control is the same loop
with as many random edits.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afrl_jax.answer_format import query_text
from afrl_jax.instructions import recheck
from afrl_jax.instructions.budget import BudgetExceeded
from afrl_jax.instructions.edits import Edit, EditError, Kind, apply, words
from afrl_jax.instructions.identify import Cluster, Table, identify
from afrl_jax.instructions.probe import Probe
from afrl_jax.instructions.proposers import Proposer
from afrl_jax.relevance_file import instruction_from
from afrl_jax.schema import Instruction, Judgment
from lm_jax import run_log
from lm_jax.run_folder import write_atomically

NEW, REPLAY = "dev_new", "dev_replay"
Synthesizer = Callable[[Instruction, Instruction, int], Mapping[str, Any]]  # before, after, round -> facts


@dataclasses.dataclass(frozen=True)
class Size:
    """How far the loop goes."""

    rounds: int = 4
    clusters: int = 8  # a round
    edits: int = 4  # a cluster, J
    least_cluster: int = 3

    @property
    def probes(self) -> int:
        """The most instructions that a judge can be asked to follow on dev_new, one merge group a round included."""
        return 1 + self.rounds * (self.clusters + 1) * self.edits


@dataclasses.dataclass
class Proposal:
    """An edit and what became of it."""

    edit: Edit
    cluster: int  # index in the round, -1: for no cluster
    verdict: recheck.Verdict


@dataclasses.dataclass
class Round:
    """One round as it is kept on disk."""

    instruction: Instruction  # after the round
    new: float
    replay: float
    clusters: list[Cluster]
    proposals: list[Proposal]
    pool: list[recheck.Kept]
    synthesized: Mapping[str, Any]
    seconds: float
    stopped: str = ""  # why the loop ends here
    unfinished: bool = False  # for want of budget: it is not kept, and done again when there is more
    malformed: int = 0  # what the proposer left out

    @property
    def accepted(self) -> list[Proposal]:
        """The proposals that stand."""
        return [proposal for proposal in self.proposals if proposal.verdict.accepted]


class Evolution:
    """One arm of the loop: a proposer, its rounds, its folder.

    Args:
        probe: has the sets dev_new and dev_replay.
        table: features of dev_new.
        synthesize: makes examples for the rules of a round that changed the instruction; its facts are kept.
    """

    def __init__(
        self,
        probe: Probe,
        proposer: Proposer,
        table: Table,
        *,
        size: Size,
        rule: recheck.Rule,
        folder: Path,
        seed: int = 0,
        synthesize: Synthesizer | None = None,
    ):
        self._probe, self._proposer, self._table, self._size, self._rule = probe, proposer, table, size, rule
        self._folder, self._seed, self._synthesize = folder, seed, synthesize

    def __call__(self, base: Instruction) -> list[Round]:
        """Run the rounds that are not on disk; round 0 is the base instruction. A budget may run out: the loop
        then ends with what it has, and a later run goes on."""
        rounds = [self._kept(0) or self._keep(0, self._begin(base))]
        while len(rounds) <= self._size.rounds and not rounds[-1].stopped:
            number = len(rounds)
            rounds.append(self._kept(number) or self._keep(number, self._round(number, rounds, base)))
        return rounds

    def _begin(self, base: Instruction) -> Round:
        began = time.monotonic()
        new, replay = (recheck.score(self._probe(name, base)) for name in (NEW, REPLAY))
        pool = [recheck.Kept(base, new, replay, words(base))]
        return Round(base, new, replay, [], [], pool, {}, round(time.monotonic() - began, 1))

    def _round(self, number: int, before: Sequence[Round], base: Instruction) -> Round:
        began, malformed = time.monotonic(), self._proposer.malformed
        current = start = before[-1].pool[0].instruction
        pool, proposals, stopped, unfinished = list(before[-1].pool), [], "", False
        tried = {proposal.edit for done in before for proposal in done.proposals}
        clusters = identify(
            self._probe.sets[NEW],
            self._probe(NEW, start),
            start,
            self._table,
            least=self._size.least_cluster,
            most=self._size.clusters,
        )
        try:
            groups = self._proposer.propose(start, clusters, self._size.edits, number, tried)
            reworded: dict[str, str] = {}
            for place, edits in enumerate(groups):
                cluster = place if place < len(clusters) else -1
                edits = [_renamed(edit, reworded) for edit in edits]
                amended = self._best_of(base, current, edits, cluster, proposals, pool)
                reworded, current = _reworded(reworded, current, amended), amended
        except BudgetExceeded as error:
            stopped, unfinished = str(error), True
        pool = recheck.pareto(pool)
        if not stopped and not proposals:
            stopped = "nothing was proposed"
        facts = self._synthesize(start, current, number) if self._synthesize and current != start else {}
        new, replay = (recheck.score(self._probe(name, current)) for name in (NEW, REPLAY))
        seconds = round(time.monotonic() - began, 1)
        malformed = self._proposer.malformed - malformed
        return Round(current, new, replay, clusters, proposals, pool, facts, seconds, stopped, unfinished, malformed)

    def _best_of(
        self,
        base: Instruction,
        current: Instruction,
        edits: Sequence[Edit],
        cluster: int,
        proposals: list[Proposal],
        pool: list[recheck.Kept],
    ) -> Instruction:
        """Recheck each edit of a group; the one that raises dev_new most stands."""
        passed: list[tuple[float, Proposal, recheck.Kept]] = []
        for edit in edits:
            verdict, kept = self._recheck(base, current, edit)
            proposals.append(Proposal(edit, cluster, verdict))
            if kept:
                passed.append((verdict.difference.value, proposals[-1], kept))
        if not passed:
            return current
        best = max(passed, key=lambda item: item[0])
        for _, proposal, _ in passed:
            if proposal is not best[1]:
                proposal.verdict = dataclasses.replace(
                    proposal.verdict, accepted=False, reason="another edit of the cluster is better"
                )
        pool.append(best[2])
        return best[2].instruction

    def _recheck(
        self, base: Instruction, current: Instruction, edit: Edit
    ) -> tuple[recheck.Verdict, recheck.Kept | None]:
        try:
            candidate = apply(current, edit)
        except EditError as error:
            return recheck.Verdict(False, str(error)), None
        if words(candidate) > max(self._rule.most_words, words(current)):
            return recheck.Verdict(False, f"longer than {self._rule.most_words} words"), None
        before, after = self._probe(NEW, current), self._probe(NEW, candidate)
        verdict = recheck.rises(before, after, self._rule, shortens=edit.kind is Kind.MERGE, seed=self._seed)
        if not verdict.accepted:
            return verdict, None
        befores, replayed = [self._probe(REPLAY, one) for one in (base, current)], self._probe(REPLAY, candidate)
        verdict = recheck.keeps(verdict, befores, replayed, self._rule)
        if not verdict.accepted:
            return verdict, None
        return verdict, recheck.Kept(candidate, recheck.score(after), recheck.score(replayed), words(candidate))

    def _file(self, number: int) -> Path:
        return self._folder / f"round_{number:02d}.json"

    def _keep(self, number: int, done: Round) -> Round:
        if not done.unfinished:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(number), json.dumps(dataclasses.asdict(done), indent=1) + "\n")
        changed = f", {len(done.accepted)} of {len(done.proposals)} edits stand" if number else ""
        scores = f"dev_new {done.new:.3f}, dev_replay {done.replay:.3f}"
        run_log.say(f"{self._folder.name} round {number}: {scores}{changed}")
        return done

    def _kept(self, number: int) -> Round | None:
        file = self._file(number)
        return round_from(json.loads(file.read_text())) if file.exists() else None


def _reworded(known: Mapping[str, str], before: Instruction, after: Instruction) -> dict[str, str]:
    """Text of a rule as the round found it -> its text now; an edit rewords at most one rule, or two to one."""
    old, new = ([rule.text for rule in one.rules] for one in (before, after))
    gone, come = [text for text in old if text not in new], [text for text in new if text not in old]
    latest = dict.fromkeys(gone, come[0]) if gone else {}
    return latest | {first: latest.get(now, now) for first, now in known.items()}


def _renamed(edit: Edit, reworded: Mapping[str, str]) -> Edit:
    """The edit of the rules that it meant, as they read now."""
    target, other = (reworded.get(text, text) for text in (edit.target, edit.other))
    return dataclasses.replace(edit, target=target, other=other)


def round_from(fields: Mapping[str, Any]) -> Round:
    """The round that `dataclasses.asdict` took apart."""
    clusters = [
        Cluster(**{name: tuple(value) if isinstance(value, list) else value for name, value in cluster.items()})
        for cluster in fields["clusters"]
    ]
    proposals = [
        Proposal(Edit(**{**p["edit"], "kind": Kind(p["edit"]["kind"])}), p["cluster"], _verdict(p["verdict"]))
        for p in fields["proposals"]
    ]
    pool = [recheck.Kept(**{**kept, "instruction": instruction_from(kept["instruction"])}) for kept in fields["pool"]]
    read = {"clusters": clusters, "proposals": proposals, "pool": pool}
    return Round(**{**fields, **read, "instruction": instruction_from(fields["instruction"])})


def _verdict(fields: Mapping[str, Any]) -> recheck.Verdict:
    difference, worst = fields["difference"], fields["worst"]
    return recheck.Verdict(
        fields["accepted"],
        fields["reason"],
        recheck.Difference(*difference) if difference else None,
        tuple(worst) if worst else None,
    )


def group_sizes(rounds: Sequence[Round]) -> list[list[int]]:
    """For each round number how many edits each group of proposals had: what a fair control draws."""
    sizes = []
    for done in rounds:
        groups: dict[int, int] = {}
        for proposal in done.proposals:
            groups[proposal.cluster] = groups.get(proposal.cluster, 0) + 1
        sizes.append(list(groups.values()))
    return sizes


def first_queries(judgments: Sequence[Judgment], pairs: int) -> list[Judgment]:
    """The judgments of the first queries, whole, that come to at most so many pairs; of the first query in any case."""
    kept: list[Judgment] = []
    of_query: dict[str, list[Judgment]] = {}
    for judgment in judgments:
        of_query.setdefault(judgment.query.query_id, []).append(judgment)
    for some in of_query.values():
        if kept and len(kept) + len(some) > pairs:
            break
        kept += some
    return kept


def queries_of(judgments: Iterable[Judgment]) -> set[tuple[str, str]]:
    """(id, text) of their queries: two data sets may number theirs alike."""
    return {(judgment.query.query_id, query_text(judgment)) for judgment in judgments}


def split_by_query(judgments: Sequence[Judgment], share: float) -> tuple[list[Judgment], list[Judgment]]:
    """(first, second): the first `share` of the queries in their order, and the others; no query's text is in both."""
    queries = list(dict.fromkeys(map(query_text, judgments)))
    first = set(queries[: round(share * len(queries))])
    return [j for j in judgments if query_text(j) in first], [j for j in judgments if query_text(j) not in first]
