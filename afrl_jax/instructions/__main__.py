"""Improve an instruction, make examples for its rules, explain human grades.

  python -m afrl_jax.instructions evolve --workdir=runs/evolve
      The built-in world, the base instruction without its rare rules, a judge that follows every word: what the loop
      finds by mining, beside as many random edits. Needs no model.

  python -m afrl_jax.instructions evolve --workdir=runs/mine --model=runs/quickstart/export \\
      --dev_new=data/dev_new --dev_replay=data/dev_replay --calibration=data/held --test=data/test \\
      --instruction=guideline.json
      Your judgments, your model. An instruction is JSON: {"task": ..., "scale": {"labels": [...], "meanings": [...]},
      "rules": [{"number": 1, "text": "another brand: 1", "grades": [0]}]}; grades are indices on the scale. The same
      folder for dev_new and dev_replay is split by query. --calibration is of other judged queries, on which the
      model's label probabilities are set right for each instruction: without, an edit may stand for shifting them.
      A pretrained model, which is asked zero-shot, needs it.

  ... --proposer=language_model --base_url=https://host/v1 --language_model=NAME --calls=200 --tokens=400000
      A language model proposes the edits. Its key is read from OPENAI_API_KEY (--key_variable names another); every
      answer is kept in the workdir, so running again costs nothing. Without --base_url a model folder or .gguf file is
      run in process.

  python -m afrl_jax.instructions synthesize --output=data/synthetic --per_rule=20 [--instruction=FILE]
      Judged, explained examples for every rule, from the catalogue of clips; two labellers agree on each.

  python -m afrl_jax.instructions explain --judgments=data/train --instruction=FILE --output=data/explained \\
      --base_url=... --language_model=NAME
      Explanations for human grades, each checked against query, document, grade and rules.

Running a command again continues where it stopped, and may have a larger budget. Exit status: 0 done; 1 a language
model failed or the budget is spent; 2 the command or the data are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afrl_jax.command_line import told_plainly
from afrl_jax.instructions import BUDGET, CONNECTION
from lm_jax.program import before_jax

if TYPE_CHECKING:
    from afrl_jax.instructions.run import ChatSettings
    from afrl_jax.schema import Instruction, Judgment

CLIPS_PAIRS = 8  # documents a query in the built-in world
CLIPS_QUERIES = 300  # of dev_new there


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m afrl_jax.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="evolve | synthesize | explain")
    evolve, make, explain = (commands.add_parser(name) for name in ("evolve", "synthesize", "explain"))
    for command in (evolve, make, explain):
        command.add_argument("--instruction", type=Path, help="JSON file of the instruction")
    for command in (evolve, make):
        command.add_argument("--model", help="relevance model: the judge, or the second labeller of a synthesis")
        command.add_argument("--seed", type=int, default=0)
    for command in (evolve, explain):
        command.add_argument("--base_url", default="", help="of an OpenAI-compatible server, such as https://host/v1")
        command.add_argument("--language_model", default="", help="its model; or a folder or .gguf file")
        command.add_argument("--key_variable", default="OPENAI_API_KEY", help="environment variable with the key")
        command.add_argument("--calls", type=int, default=500, help="budget: calls of the language model")
        command.add_argument("--tokens", type=int, default=1_000_000, help="budget: tokens of prompts and answers")
        command.add_argument("--money", type=float, default=float("inf"), help="budget: at the prices given")
        command.add_argument("--prompt_price", type=float, default=0.0, help="of a million prompt tokens")
        command.add_argument("--completion_price", type=float, default=0.0, help="of a million answer tokens")
    evolve.add_argument("--workdir", type=Path, required=True)
    for name in ("dev_new", "dev_replay", "test", "calibration"):
        evolve.add_argument(f"--{name}", type=Path, help="judgments folder; without any, the built-in world")
    evolve.add_argument("--pairs", type=int, default=0, help="at most so many pairs of each, whole queries; 0: all")
    evolve.add_argument("--queries", type=int, help=f"of dev_new in the built-in world ({CLIPS_QUERIES})")
    evolve.add_argument("--proposer", default="mined", help="mined or language_model")
    for name, value in (("rounds", 4), ("clusters", 8), ("edits", 4), ("most_words", 400), ("synthesize", 0)):
        evolve.add_argument(f"--{name}", type=int, default=value)
    evolve.add_argument("--p", type=float, default=0.1, help="of the bootstrap, two-sided, for an edit to stand")
    evolve.add_argument("--epsilon", type=float, default=0.1, help="recall that a rule may lose on dev_replay")
    make.add_argument("--output", type=Path, required=True)
    make.add_argument("--per_rule", type=int, default=10, help="examples of each kind")
    make.add_argument("--evaluation", type=Path, help="judgments folder whose queries no example may come near")
    explain.add_argument("--output", type=Path, required=True)
    explain.add_argument("--judgments", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    before_jax()
    from afrl_jax.instructions.budget import BudgetExceeded
    from afrl_jax.instructions.client import LanguageModelError

    with told_plainly(parser):
        try:
            {"evolve": _evolve, "synthesize": _synthesize, "explain": _explain}[parsed.command](parsed)
        except (BudgetExceeded, LanguageModelError) as error:
            parser.exit(1, f"{parser.prog}: {error}\n")


def _evolve(parsed: argparse.Namespace) -> None:
    from afrl_jax import relevance_file
    from afrl_jax.answer_format import query_texts
    from afrl_jax.data import clips_rulebooks
    from afrl_jax.data.readers import read_judgments
    from afrl_jax.instructions.budget import BudgetExceeded
    from afrl_jax.instructions.evolution import first_queries, split_by_query
    from afrl_jax.instructions.ideal_reader import IdealReader
    from afrl_jax.instructions.probe import ModelJudge, digest
    from afrl_jax.instructions.run import EvolutionSettings, evolve_instruction
    from afrl_jax.instructions.synthesis import read_the_words
    from afrl_jax.scoring import RelevanceModel
    from lm_jax import run_log
    from lm_jax.run_folder import RunFolder

    chat = _chat(parsed)
    keys = ("proposer", "rounds", "clusters", "edits", "most_words", "synthesize", "p", "epsilon", "seed")
    settings = EvolutionSettings(**{key: getattr(parsed, key) for key in keys}, chat=chat)
    folders = {name: getattr(parsed, name) for name in ("dev_new", "dev_replay", "test")}
    given = {name: folder for name, folder in folders.items() if folder}
    if given and not {"dev_new", "dev_replay"} <= set(given):
        raise ValueError("give both --dev_new and --dev_replay, or neither for the built-in world")
    if given and not (parsed.model and parsed.instruction):
        raise ValueError("your own judgments need --model and --instruction")
    if given and parsed.synthesize:
        raise ValueError("--synthesize makes examples from the catalogue of clips: it goes with the built-in world")
    if given and parsed.queries is not None:
        raise ValueError("--queries is the size of the built-in world; --pairs bounds your own judgments")
    if not given and (parsed.calibration or parsed.pairs):
        raise ValueError("--calibration and --pairs go with your own judgments: give --dev_new and --dev_replay too")
    # A wrong path is told before any work.
    zero_shot = bool(parsed.model) and relevance_file.read(parsed.model) is None
    if zero_shot and not parsed.calibration:
        told = "to judge zero-shot it needs --calibration, which goes with your own judgments"
        raise ValueError(f"{parsed.model} is no relevance model: {told}")
    base = _instruction(parsed.instruction) if parsed.instruction else clips_rulebooks.base_instruction()
    if given:
        sets = {name: read_judgments({"path": folder}, base.scale) for name, folder in given.items()}
        if parsed.dev_new == parsed.dev_replay:
            sets["dev_new"], sets["dev_replay"] = split_by_query(sets["dev_new"], 0.6)
        if parsed.pairs:
            sets = {name: first_queries(some, parsed.pairs) for name, some in sets.items()}
        held = read_judgments({"path": parsed.calibration}, base.scale) if parsed.calibration else []
        held = first_queries(held, parsed.pairs) if parsed.pairs else held
        named = {"calibration": held} | sets
        for one, other in itertools.combinations(named, 2):  # by text: folders of one log may number queries anew
            if shared := query_texts(named[one]) & query_texts(named[other]):
                raise ValueError(f"--{one} shares {len(shared)} queries with --{other}, such as {min(shared)!r}")
        model = RelevanceModel.load(parsed.model, instruction=base if zero_shot else None)
        judge, references, frequency = ModelJudge(model, held), {}, None
    else:
        held, queries = [], CLIPS_QUERIES if parsed.queries is None else parsed.queries
        counts = {"dev_new": queries, "dev_replay": queries // 2, "test": queries}
        decided = {
            name: clips_rulebooks.decided_groups(
                parsed.seed * 3 + place, "test" if name == "test" else "dev", count, CLIPS_PAIRS, rule_balance=0.5
            )
            for place, (name, count) in enumerate(counts.items())
        }
        sets = {name: [one.judgment for one in some] for name, some in decided.items()}
        references = {
            "full rulebook": clips_rulebooks.full_rulebook(),
            "full rulebook, held-out wording": clips_rulebooks.full_rulebook(held_out_wording=True),
        }
        frequency = clips_rulebooks.natural_frequencies()
        ideal = IdealReader(one for some in decided.values() for one in some)
        judge = ModelJudge(RelevanceModel.load(parsed.model)) if parsed.model else ideal
        if not parsed.model and settings.proposer == "language_model":
            run_log.say("the judge without --model reads conditions alone: an edit in free words cannot stand")
    free = ("workdir", *CONNECTION, *BUDGET)
    config = {name: None if value is None else str(value) for name, value in vars(parsed).items() if name not in free}
    # What lies under these paths may have become another.
    config["model_version"] = relevance_file.model_version(parsed.model) if parsed.model else None
    config["instruction_digest"] = digest(base)
    config["judgments"] = {name: _digest_of(some) for name, some in (sets | {"calibration": held}).items()}
    RunFolder(parsed.workdir, config)
    options = {"references": references, "second": read_the_words, "rule_frequency": frequency}
    arms = evolve_instruction(judge, base, sets, settings, parsed.workdir / "evolution", **options)
    last = arms[settings.proposer][-1]
    if last.unfinished:
        raise BudgetExceeded(f"{last.stopped}; run again with a larger budget to go on from here")


def _digest_of(judgments: Sequence[Judgment]) -> str:
    return hashlib.sha256(json.dumps([dataclasses.asdict(one) for one in judgments]).encode()).hexdigest()[:16]


def _synthesize(parsed: argparse.Namespace) -> None:
    from afrl_jax import relevance_file
    from afrl_jax.data import clips_rulebooks
    from afrl_jax.data.readers import read_judgments
    from afrl_jax.instructions.dataset_folder import refuse_others_judgments, write_synthesized
    from afrl_jax.instructions.probe import ModelJudge
    from afrl_jax.instructions.synthesis import as_labeller, read_the_words, synthesize
    from afrl_jax.scoring import RelevanceModel
    from lm_jax import run_log

    if parsed.model and relevance_file.read(parsed.model) is None:
        raise ValueError(f"{parsed.model} is no relevance model: a second labeller is asked without calibration")
    refuse_others_judgments(parsed.output)
    instruction = _instruction(parsed.instruction) if parsed.instruction else clips_rulebooks.full_rulebook()
    second = as_labeller(ModelJudge(RelevanceModel.load(parsed.model))) if parsed.model else read_the_words
    if parsed.evaluation:
        dev = [one.query.text for one in read_judgments({"path": parsed.evaluation}, instruction.scale)]
    else:
        dev = [one.judgment.query.text for one in clips_rulebooks.decided_groups(0, "test", 300, 1)]
    made = synthesize(instruction, parsed.per_rule, seed=parsed.seed, second=second, evaluation_queries=dev)
    facts = {"catalogue": "clips", "seed": parsed.seed, "second labeller": parsed.model or "reads the words alone"}
    figures = write_synthesized(parsed.output, made, instruction, facts)
    run_log.say("\n".join(f"{name}: {value:.4g}" for name, value in figures.items()))


def _explain(parsed: argparse.Namespace) -> None:
    from afrl_jax.data.readers import read_judgments
    from afrl_jax.instructions.budget import BudgetExceeded
    from afrl_jax.instructions.client import ChatClient
    from afrl_jax.instructions.dataset_folder import refuse_others_judgments, write_explained
    from afrl_jax.instructions.explanations import explain, most
    from afrl_jax.relevance_file import DEFAULT_INSTRUCTION
    from lm_jax import run_log

    if parsed.output.exists() and parsed.judgments.exists() and parsed.output.samefile(parsed.judgments):
        raise ValueError(f"--output: {parsed.output} holds the judgments themselves; give another folder")
    refuse_others_judgments(parsed.output)
    chat = _chat(parsed)
    instruction = _instruction(parsed.instruction) if parsed.instruction else DEFAULT_INSTRUCTION
    client = chat.client(parsed.output / "language_model_calls")
    judgments = read_judgments({"path": parsed.judgments}, instruction.scale)
    run_log.say(f"{len(judgments):,} pairs to explain")
    if isinstance(client, ChatClient):
        needed, left = most(client, judgments, instruction), chat.calls - client.budget.spent.calls
        told = f"at most {needed.calls:,} calls and {needed.tokens:,} tokens of {chat.model}, if none fails"
        run_log.say(f"{told}; budget: {client.budget.describe()}")
        if needed.calls > left:
            raise BudgetExceeded(f"budget of calls: {needed.calls:,} are needed and {left:,} are left; raise --calls")
    kept, set_aside = explain(client, judgments, instruction)
    spent = f"; {client.budget.describe()}" if isinstance(client, ChatClient) else ""
    run_log.say(f"{len(kept):,} of {len(judgments):,} explanations pass{spent}")
    facts = {"judgments": parsed.judgments.name, "language model": chat.model}
    write_explained(parsed.output, kept, set_aside, instruction, facts)


def _chat(parsed: argparse.Namespace) -> ChatSettings:
    from afrl_jax.instructions.run import ChatSettings

    keys = {key: value for key, value in vars(parsed).items() if key in (*CONNECTION, *BUDGET)}
    return ChatSettings(model=parsed.language_model, **keys)


def _instruction(file: Path) -> Instruction:
    from afrl_jax.relevance_file import instruction_from

    try:
        return instruction_from(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: no instruction: {type(error).__name__} {error}") from error


if __name__ == "__main__":
    main()
