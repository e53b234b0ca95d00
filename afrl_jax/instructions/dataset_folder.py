"""What a synthesis leaves: a judgments folder that the readers accept, what was set aside, and a data card."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afrl_jax.data.judgment_rows import judgment_row, query_row
from afrl_jax.data.readers import write_judgments
from afrl_jax.instructions.synthesis import DIFFICULTIES, KINDS, Synthesized
from afrl_jax.schema import Instruction, Judgment
from lm_jax.run_folder import write_atomically

_CARD = "# Data card"


def refuse_others_judgments(folder: Path) -> None:
    """ValueError where the folder holds judgments that came from elsewhere: they would be overwritten."""
    card = folder / "README.md"
    ours = card.exists() and card.read_text(encoding="utf-8").startswith(f"{_CARD}\n")
    if not ours and any(folder.glob("judgments.*")):
        raise ValueError(f"--output: {folder} holds judgments that were not made here; give another folder")


def write_synthesized(
    folder: Path, synthesized: Synthesized, instruction: Instruction, facts: Mapping[str, Any]
) -> dict[str, float]:
    """Write queries, documents and judgments .jsonl, set_aside.jsonl, instruction.json and README.md, the data card.

    Returns the figures of the card. `facts` head it: where the catalogue and the rules come from, the seed.

    Raises:
        ValueError: nothing was accepted; set_aside.jsonl, which tells why, is written.
    """
    rows = [(aside.example.judgment, aside.reason) for aside in synthesized.set_aside]
    body = _shares(synthesized, instruction)
    judgments = [example.judgment for example in synthesized.examples]
    title = "Synthesized judgments: made by rules from a catalogue; no person judged these pairs."
    return _write(folder, judgments, rows, instruction, title, {**facts, **synthesized.figures}, body)


def write_explained(
    folder: Path,
    kept: Sequence[Judgment],
    set_aside: Sequence[tuple[Judgment, str]],
    instruction: Instruction,
    facts: Mapping[str, Any],
) -> dict[str, float]:
    """The same for human judgments whose explanations were synthesized; those without an accepted one are set aside."""
    tried = len(kept) + len(set_aside)
    reasons = Counter(reason.split(":")[0] for _, reason in set_aside)
    figures = {"tried": tried, "accepted": len(kept), "acceptance_rate": len(kept) / max(1, tried)}
    figures |= {f"set_aside/{reason}": count / tried for reason, count in sorted(reasons.items())}
    title = "Human grades; the explanations were written by a language model and passed a strict check."
    return _write(folder, kept, set_aside, instruction, title, {**facts, **figures}, [])


def _write(
    folder: Path,
    judgments: Sequence[Judgment],
    set_aside: Iterable[tuple[Judgment, str]],
    instruction: Instruction,
    title: str,
    facts: Mapping[str, Any],
    body: Sequence[str],
) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"reason": reason, **query_row(plain.query), **judgment_row(plain, instruction.scale)})
        for judgment, reason in set_aside
        for plain in (_without_instruction(judgment),)
    )
    # First: where nothing is left to write, it tells why.
    write_atomically(folder / "set_aside.jsonl", "".join(line + "\n" for line in lines))
    write_judgments(folder, map(_without_instruction, judgments), instruction.scale)
    write_atomically(folder / "instruction.json", json.dumps(dataclasses.asdict(instruction), indent=1) + "\n")
    grades = Counter(instruction.scale.labels[judgment.grade] for judgment in judgments)
    listed = [
        f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}" for name, value in facts.items()
    ]
    listed.append("- grades: " + ", ".join(f"{label} {grades[label]}" for label in instruction.scale.labels))
    write_atomically(folder / "README.md", "\n".join([_CARD, "", title, "", *listed, *body]) + "\n")
    return {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}


def _shares(synthesized: Synthesized, instruction: Instruction) -> list[str]:
    """Examples by rule and kind, wanted and made."""
    made, difficulty = synthesized.made, Counter(example.difficulty for example in synthesized.examples)
    lines = ["- difficulty: " + ", ".join(f"{name} {difficulty[name]}" for name in DIFFICULTIES), ""]
    lines += ["| rule | " + " | ".join(f"{kind} (of wanted)" for kind in KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for rule in instruction.rules:
        keys = [(rule.number, kind) for kind in KINDS]
        if keys[0] in synthesized.wanted:
            cells = " | ".join(f"{made[key]} of {synthesized.wanted[key]}" for key in keys)
            lines.append(f"| {rule.number}. {rule.text} | {cells} |")
    return lines


def _without_instruction(judgment: Judgment) -> Judgment:
    """The folder has one instruction, in instruction.json."""
    return dataclasses.replace(judgment, query=dataclasses.replace(judgment.query, instruction=None))
