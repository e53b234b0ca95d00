"""One run of instruction evolution in one folder: both arms, the budget told first, report, examples for new rules."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afrl_jax.data.conditions import parse
from afrl_jax.evaluation import Predictions
from afrl_jax.instructions import recheck, report
from afrl_jax.instructions.budget import Budget, Limits
from afrl_jax.instructions.client import ChatClient, LocalModel
from afrl_jax.instructions.dataset_folder import write_synthesized
from afrl_jax.instructions.edits import condition_of, words
from afrl_jax.instructions.evolution import NEW, REPLAY, Evolution, Round, Size, group_sizes, queries_of
from afrl_jax.instructions.identify import Table
from afrl_jax.instructions.probe import Judge, Probe
from afrl_jax.instructions.proposers import LanguageModelEdits, MinedRules, Proposer, RandomEdits
from afrl_jax.instructions.synthesis import Labeller, synthesize
from afrl_jax.schema import Instruction, Judgment
from lm_jax import run_log
from lm_jax.report_pictures import Rows
from lm_jax.run_folder import write_atomically

PROPOSERS = ("mined", "language_model")
TEST = "test"


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """A language model behind an OpenAI-compatible address, its key read from the environment variable named; or
    without an address one in process, `model` its folder or .gguf file: it needs no key, and no budget."""

    base_url: str = ""
    model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    attempts: int = 5
    concurrency: int = 4
    calls: int = 500  # the budget: calls, tokens, and money at these prices of a million tokens
    tokens: int = 1_000_000
    money: float = math.inf
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def check(self) -> None:
        """ValueError where no model is named, or one that is not here without an address."""
        if not self.model or not (self.base_url or Path(self.model).exists()):
            raise ValueError("a language model needs base_url and model, or as model a folder or .gguf file")

    def client(self, folder: Path) -> ChatClient | LocalModel:
        """The client, its cache and its ledger in the folder; or the model itself.

        Raises:
            ValueError: no address, no model name, or an address that is none.
        """
        self.check()
        if not self.base_url:
            return LocalModel.load(self.model)
        limits = Limits(self.calls, self.tokens, self.money, self.prompt_price, self.completion_price)
        return ChatClient(
            self.base_url,
            self.model,
            cache=folder / "answers",
            budget=Budget(limits, folder / "spent.json"),
            key_variable=self.key_variable,
            timeout=self.timeout,
            attempts=self.attempts,
            concurrency=self.concurrency,
        )


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """What the loop does; see `Size` and `recheck.Rule` for what each number means."""

    proposer: str = "mined"  # or "language_model", which is `chat`
    rounds: int = 4
    clusters: int = 8
    edits: int = 4
    least_cluster: int = 3
    p: float = 0.1
    epsilon: float = 0.1
    least_pairs: int = 10
    most_words: int = 400
    resamples: int = 1000
    control: bool = True  # the same loop with as many random edits
    synthesize: int = 0  # examples of each kind for each new rule; clips only
    seed: int = 0
    chat: ChatSettings = dataclasses.field(default_factory=ChatSettings)

    def __post_init__(self) -> None:
        least = {"rounds": 1, "clusters": 1, "edits": 1, "least_cluster": 1, "most_words": 1, "resamples": 1,
                 "least_pairs": 1, "synthesize": 0, "p": 0, "epsilon": 0, "seed": 0}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {bound}")
        if self.proposer == "language_model":
            self.chat.check()
            if self.synthesize:
                raise ValueError("synthesize: examples are made for mined rules; a language model's are in free words")
        if self.proposer == "mined" and (self.chat.base_url or self.chat.model):
            raise ValueError("proposer: mined rules ask no language model, but one is given: base_url or its name")

    @property
    def size(self) -> Size:
        return Size(self.rounds, self.clusters, self.edits, self.least_cluster)

    @property
    def rule(self) -> recheck.Rule:
        return recheck.Rule(self.p, self.epsilon, self.least_pairs, self.most_words, self.resamples)


def evolve_instruction(
    judge: Judge,
    base: Instruction,
    sets: Mapping[str, Sequence[Judgment]],
    settings: EvolutionSettings,
    folder: Path,
    *,
    references: Mapping[str, Instruction] | None = None,
    second: Labeller | None = None,
    rule_frequency: Mapping[int, float] | None = None,
    title: str = "Instruction evolution",
) -> dict[str, list[Round]]:
    """Run both arms from wherever they stand, test every round, write report and instruction; returns rounds by arm.

    Args:
        sets: judgments by name: dev_new, dev_replay, and optionally test, which is graded after the last round only.
        folder: gets probes/, mined/ or language_model/, random/, synthesized/, report/ and instruction.json.
        references: instructions that are tested beside those of the rounds, such as the full rulebook.
        second: the labeller who must agree with synthesized examples; needed where settings ask for them.
        rule_frequency: puts rules into head, torso and tail; by default their frequency among the test pairs.

    Raises:
        ValueError: an unknown proposer, or a set or labeller that is missing.
    """
    if settings.proposer not in PROPOSERS:
        raise ValueError(f"proposer: {settings.proposer!r} is unknown; it is one of {', '.join(PROPOSERS)}")
    if missing := {NEW, REPLAY} - set(sets):
        raise ValueError(f"the sets lack {', '.join(sorted(missing))}")
    for one, other in itertools.combinations(sets, 2):
        if shared := queries_of(sets[one]) & queries_of(sets[other]):
            raise ValueError(f"{one} shares {len(shared)} queries with {other}, such as {min(shared)[1]!r}")
    if settings.synthesize and second is None:
        raise ValueError("synthesize needs a second labeller")
    probe = Probe(judge, dict(sets), folder / "probes")
    table = Table(sets[NEW], settings.least_cluster)
    proposer = _proposer(settings, table, sets[NEW], folder)
    calibrated = len(getattr(judge, "calibration", ()))
    run_log.say(plan(settings, sets, proposer, base, len(references or {}), calibrated))

    def arm(name: str, proposer: Proposer, **options: Any) -> list[Round]:
        fixed = {"rule": settings.rule, "folder": folder / name, "seed": settings.seed}
        return Evolution(probe, proposer, table, **({"size": settings.size} | fixed | options))(base)

    def examples(before: Instruction, after: Instruction, number: int) -> dict[str, float]:
        known = {rule.text for rule in before.rules}
        new = [rule.number for rule in after.rules if rule.text not in known]
        queries = [judgment.query.text for some in sets.values() for judgment in some]
        made = synthesize(
            after, settings.synthesize, seed=settings.seed, second=second, rules=new, evaluation_queries=queries
        )
        if not made.examples:
            return made.figures
        facts = {"rules": f"round {number} of an instruction evolution", "catalogue": "clips", "seed": settings.seed}
        return write_synthesized(folder / "synthesized" / f"round_{number:02d}", made, after, facts)

    main = arm(settings.proposer, proposer, synthesize=examples if settings.synthesize else None)
    arms = {settings.proposer: main}
    if settings.control:
        control = RandomEdits(table, group_sizes(main), settings.seed)
        # It has no round that the main arm has yet to finish: how many edits it must draw is not known.
        size = dataclasses.replace(settings.size, rounds=len(main) - 2) if main[-1].unfinished else settings.size
        arms["random"] = arm("random", control, size=size)
    tested = _tested(probe, arms, references or {}) if TEST in sets else {}
    last = main[-1].instruction
    write_atomically(folder / "instruction.json", json.dumps(dataclasses.asdict(last), indent=1) + "\n")
    facts = {"pairs": ", ".join(f"{name} {len(some):,}" for name, some in sets.items())}
    facts |= {"rules": f"{len(base.rules)} to {len(last.rules)}", "words": f"{words(base)} to {words(last)}"}
    if isinstance(proposer, LanguageModelEdits):
        facts["malformed edits"] = str(sum(done.malformed for done in main))
    options = {"seed": settings.seed, "resamples": settings.resamples, "rule_frequency": rule_frequency}
    ruled = all(judgment.deciding_rule for judgment in sets.get(TEST, ()))
    grades = () if ruled else base.scale.labels
    fixed = fixed_rows(probe, table, main)
    report.write_report(
        folder / "report", arms, tested, title=title, facts=facts, fixed=fixed, grades=grades, **options
    )
    run_log.say(f"report: {folder / 'report' / 'report.html'}")
    return arms


def fixed_rows(probe: Probe, table: Table, rounds: Sequence[Round]) -> Rows:
    """One row a new rule that can be read: the pairs of dev_new that it decides among those that can, and how many of
    them were graded wrongly before its round and after it."""
    rows: Rows = []
    for number, (before, after) in enumerate(itertools.pairwise(rounds), start=1):
        wrong = [probe(NEW, one.instruction) for one in (before, after)]
        wrong_before, wrong_after = (found.predicted != found.grade for found in wrong)
        known, left = {rule.text for rule in before.instruction.rules}, np.ones(len(table.cases), bool)
        for rule in after.instruction.rules:
            holds = parse(condition_of(rule, after.instruction))
            decides = left & np.array([holds(case) for case in table.cases])
            left &= ~decides
            if rule.text not in known and decides.any():
                counts = {"wrong before": wrong_before, "wrong after": wrong_after}
                rows.append({"round": number, "rule": rule.text, "pairs": int(decides.sum())}
                            | {name: int(which[decides].sum()) for name, which in counts.items()})  # fmt: skip
    return rows


def plan(
    settings: EvolutionSettings,
    sets: Mapping[str, Sequence[Judgment]],
    proposer: Proposer,
    base: Instruction,
    references: int = 0,
    calibrated: int = 0,
) -> str:
    """What a run may cost at most, told before it begins.

    Args:
        references: so many instructions are tested beside those of the rounds.
        calibrated: so many pairs are graded besides under each instruction.
    """
    arms = 2 if settings.control else 1
    probes, pairs = settings.size.probes * arms, len(sets[NEW]) + len(sets[REPLAY]) + calibrated
    tested = (settings.rounds + 1 + settings.control) * len(sets.get(TEST, ()))
    tested += references * (len(sets.get(TEST, ())) + calibrated)
    lines = [f"at most {probes:,} instructions to probe, {probes * pairs:,} pairs to grade ({pairs:,} each)"]
    if tested:
        lines.append(f"at most {tested:,} test pairs to grade")
    if isinstance(proposer, LanguageModelEdits):
        chat, calls = settings.chat, settings.rounds * settings.clusters
        tokens = calls * (proposer.longest_prompt(base) + proposer.max_tokens)
        lines.append(f"at most {calls:,} calls and {tokens:,} tokens of {chat.model}, if none fails")
        if isinstance(proposer.model, ChatClient):
            lines.append(f"budget: {proposer.model.budget.describe()}")
    return "\n".join(lines)


def _proposer(settings: EvolutionSettings, table: Table, judgments: Sequence[Judgment], folder: Path) -> Proposer:
    if settings.proposer == "mined":
        return MinedRules(table)
    return LanguageModelEdits(settings.chat.client(folder / "language_model_calls"), judgments)


def _tested(
    probe: Probe, arms: Mapping[str, Sequence[Round]], references: Mapping[str, Instruction]
) -> dict[str, Predictions]:
    """Test predictions of every round of the main arm, of the control's last, and of the references."""
    (main, rounds), *others = arms.items()
    named = {f"{main} round {number}": done.instruction for number, done in enumerate(rounds)}
    named |= {f"{name} round {len(others_rounds) - 1}": others_rounds[-1].instruction for name, others_rounds in others}
    return {name: probe(TEST, instruction) for name, instruction in (named | dict(references)).items()}
