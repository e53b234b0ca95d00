"""Who proposes edits: mined rules (no language model needed), a language model, and the random control."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from afrl_jax.answer_format import render_document, render_instruction
from afrl_jax.data.conditions import ELSE, parse
from afrl_jax.instructions.client import LanguageModel
from afrl_jax.instructions.edits import Edit, EditError, Kind, apply, condition_of
from afrl_jax.instructions.identify import Cause, Cluster, Table
from afrl_jax.schema import Instruction, Judgment, Rule

Proposals = list[list[Edit]]  # a list a cluster
_SHOWN = 8  # pairs of a cluster that a language model sees


class Proposer(Protocol):
    """Proposes edits for clusters of disagreements. `malformed` counts what was no edit, and was left out."""

    malformed: int

    def propose(
        self,
        instruction: Instruction,
        clusters: Sequence[Cluster],
        count: int,
        round: int,
        tried: Collection[Edit] = frozenset(),
    ) -> Proposals:
        """For each cluster in its place at most `count` edits, the most promising first; none for label noise.

        `tried` are the edits of earlier rounds.
        """


def last_place(instruction: Instruction) -> str:
    """The rule before which a rule stands last: "anything else", where there is one."""
    return next((rule.text for rule in instruction.rules if condition_of(rule, instruction) == ELSE), "")


class MinedRules:
    """Rules read off the clusters: their conditions, first and last in the order; exceptions and narrowings of readable
    rules that decide wrongly now; merges of readable rules that lead to the same grade. What was tried, or does not fit
    the instruction, gives its place to the next.

    Args:
        table: of dev_new; a rule is readable whose condition holds for some pair there.
    """

    malformed = 0

    def __init__(self, table: Table):
        self._table = table

    def propose(
        self,
        instruction: Instruction,
        clusters: Sequence[Cluster],
        count: int,
        round: int,
        tried: Collection[Edit] = frozenset(),
    ) -> Proposals:
        """See `Proposer`."""

        def first_new(edits: Iterable[Edit]) -> list[Edit]:
            return list(itertools.islice((e for e in edits if e not in tried and _fits(e, instruction)), count))

        merges = first_new(self._merges(instruction))
        return [
            [] if cluster.cause is Cause.NOISE else first_new(self._edits(instruction, cluster)) for cluster in clusters
        ] + ([merges] if merges else [])

    def _edits(self, instruction: Instruction, cluster: Cluster):
        first, last = instruction.rules[0].text if instruction.rules else "", last_place(instruction)
        yield Edit(Kind.ADD, cluster.condition, cluster.grade, target=first)
        if last != first:
            yield Edit(Kind.ADD, cluster.condition, cluster.grade, target=last)
        for rule in instruction.rules:
            if rule.text in cluster.rivals[:1]:
                yield Edit(Kind.EXCEPT, cluster.condition, target=rule.text)
                if feature := self._sparing(condition_of(rule, instruction), cluster.members):
                    yield Edit(Kind.NARROW, feature, target=rule.text)
        yield from (Edit(Kind.ADD, condition, cluster.grade, target=first) for condition in cluster.alternatives)

    def _sparing(self, condition: str, members: tuple[int, ...]) -> str:
        """The feature that no member has and most of the other pairs that meet the condition have; "" without one."""
        others = np.array([parse(condition)(case) for case in self._table.cases])
        others[list(members)] = False
        kept = self._table.holds[:, others].sum(axis=1) * ~self._table.holds[:, list(members)].any(axis=1)
        return self._table.features[int(kept.argmax())] if kept.any() else ""

    def _merges(self, instruction: Instruction) -> list[Edit]:
        """Neighbouring readable rules of one grade: shorter, and with the same meaning."""
        return [
            Edit(Kind.MERGE, target=one.text, other=two.text)
            for one, two in itertools.pairwise(instruction.rules)
            if one.grades == two.grades and all(self._is_readable(rule, instruction) for rule in (one, two))
        ]

    def _is_readable(self, rule: Rule, instruction: Instruction) -> bool:
        condition = condition_of(rule, instruction)
        return condition != ELSE and " except " not in condition and any(map(parse(condition), self._table.cases))


def _fits(edit: Edit, instruction: Instruction) -> bool:
    try:
        apply(instruction, edit)
    except EditError:
        return False
    return True


class RandomEdits:
    """The control: as many edits, each of a random kind with a random feature, grade and place.

    Args:
        table: whose features are drawn from; the proposals see neither the judge nor the grades.
        sizes: for each round the number of proposals in each of its groups, those of the proposer compared with.
    """

    malformed = 0

    def __init__(self, table: Table, sizes: Sequence[Sequence[int]], seed: int):
        self._features, self._sizes, self._seed = table.features, sizes, seed

    def propose(
        self,
        instruction: Instruction,
        clusters: Sequence[Cluster],
        count: int,
        round: int,
        tried: Collection[Edit] = frozenset(),
    ) -> Proposals:
        """See `Proposer`; `clusters`, `count` and `tried` play no part."""
        rng = np.random.default_rng((self._seed, round))
        sizes = self._sizes[round] if round < len(self._sizes) else ()
        return [[self._draw(rng, instruction) for _ in range(size)] for size in sizes]

    def _draw(self, rng: np.random.Generator, instruction: Instruction) -> Edit:
        some = rng.choice(len(self._features), size=int(rng.integers(1, 3)), replace=False)
        condition = " and ".join(sorted(self._features[i] for i in some))
        places = [rule.text for rule in instruction.rules]
        if not places or rng.random() < 0.7:
            target = str(rng.choice([*places, ""])) if places else ""
            return Edit(Kind.ADD, condition, int(rng.integers(len(instruction.scale))), target=target)
        kind = (Kind.NARROW, Kind.EXCEPT, Kind.MERGE)[int(rng.integers(3))]
        if kind is Kind.MERGE:
            return Edit(kind, target=str(rng.choice(places)), other=str(rng.choice(places)))
        return Edit(kind, condition, target=str(rng.choice(places)))


class LanguageModelEdits:
    """A language model reads the instruction and some pairs of a cluster and answers with edits as JSON.

    `malformed` counts answers without an edit, and objects in them that are none; nothing is guessed at.
    """

    def __init__(self, model: LanguageModel, judgments: Sequence[Judgment], *, max_tokens: int = 600):
        self.model, self._judgments, self.max_tokens = model, judgments, max_tokens
        self.malformed = 0

    def propose(
        self,
        instruction: Instruction,
        clusters: Sequence[Cluster],
        count: int,
        round: int,
        tried: Collection[Edit] = frozenset(),
    ) -> Proposals:
        """See `Proposer`."""
        prompts = [
            self._prompt(instruction, cluster, count) for cluster in clusters if cluster.cause is not Cause.NOISE
        ]
        answers = iter(self.model.complete(prompts, max_tokens=self.max_tokens, temperature=0.7, seed=round))
        return [
            [] if cluster.cause is Cause.NOISE else self._read(next(answers).text, instruction)[:count]
            for cluster in clusters
        ]

    def longest_prompt(self, instruction: Instruction) -> int:
        """Bytes of a prompt with the longest pairs there are: no prompt of a round is longer by much."""
        shown = sorted((_shown(judgment, instruction) for judgment in self._judgments), key=len)[-_SHOWN:]
        cluster = Cluster(Cause.MISSING, "", 0, (), 0)
        return len(self._prompt(instruction, cluster, 9).encode()) + sum(len(pair.encode()) + 1 for pair in shown)

    def _prompt(self, instruction: Instruction, cluster: Cluster, count: int) -> str:
        pairs = [_shown(self._judgments[i], instruction) for i in cluster.members[:_SHOWN]]
        return _PROMPT.format(
            instruction=render_instruction(instruction),
            label=instruction.scale.labels[cluster.grade],
            pairs="\n".join(pairs),
            cause=cluster.cause,
            count=count,
        )

    def _read(self, text: str, instruction: Instruction) -> list[Edit]:
        """Every whole object of an answer that may be cut off, or have words around them."""
        edits, place, before = [], text.find("{"), self.malformed
        while place >= 0:
            try:
                row, end = json.JSONDecoder().raw_decode(text, place)
                edits.append(_edit(row, instruction))
            except json.JSONDecodeError:
                self.malformed += 1
                break
            except (TypeError, ValueError, LookupError, AttributeError):
                self.malformed += 1
            place = text.find("{", end)
        self.malformed += not edits and self.malformed == before and not re.search(r"\[\s*\]", text)
        return edits


def _shown(judgment: Judgment, instruction: Instruction) -> str:
    document = render_document(judgment.document).replace("\n", " | ")[:400]
    return f"- query: {judgment.query.text[:200]} / document: {document} / {instruction.scale.labels[judgment.grade]}"


def _edit(row: dict[str, Any], instruction: Instruction) -> Edit:
    kind = Kind(row["edit"])
    condition = " ".join(str(row.get("text", "")).split())
    if kind is not Kind.MERGE and not condition:
        raise ValueError("an edit without text")
    texts = [instruction.rule(int(row[key])).text if row.get(key) else "" for key in ("rule", "other")]
    if kind is not Kind.ADD:
        return Edit(kind, condition, 0, *texts)
    grade = instruction.scale.labels.index(str(row["grade"]))
    return Edit(kind, condition, grade, texts[0] or last_place(instruction))


_PROMPT = """You maintain the instruction of relevance assessors. It reads:

{instruction}

The first rule that applies decides the grade. On these pairs the assessors should have given {label}, and did not
({cause} rule):

{pairs}

Propose {count} different small edits of the rules, each of which would set such pairs right and change little else.
Answer with a JSON list alone, of objects such as
{{"edit": "add", "text": "condition in a few words", "grade": "{label}", "rule": 3}}   a new rule before rule 3
{{"edit": "narrow", "rule": 2, "text": "condition that must hold too"}}
{{"edit": "except", "rule": 2, "text": "condition that spares a pair from the rule"}}
{{"edit": "merge", "rule": 2, "other": 4}}
"""
