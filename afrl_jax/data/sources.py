"""Data by name: a config's `data` maps names to sources, and this opens them.

    {"format": "clips", "split": "train", "queries": 4000, "documents_per_query": 8, "rule_balance": 0.3}
    {"format": "clips_contrasts", "split": "train", "queries": 1000, "documents_per_query": 8}
    {"format": "clips_rulebooks", "split": "train", "queries": 4000, "documents_per_query": 8, "most_rules": 16}
    {"format": "clips_text", "split": "train", "texts": 20000, "size": 3}
    {"format": "folder" | "trec" | "esci" | "dataset", ...}          a real data set, see afrl_jax.data.readers

Judgments of any of them take `keep`: (0.0, 0.9) keeps the queries whose hash falls into that part of [0, 1), so one
folder gives disjoint parts; and `explained`: False leaves the explanation out, so that twice the pairs fit into a row
(what clips ask a field's end for stays).
"""

from __future__ import annotations

import dataclasses
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afrl_jax.data import clips, clips_contrasts, clips_rulebooks
from afrl_jax.data.readers import read_judgments
from afrl_jax.schema import DomainText, Instruction, Judgment
from lm_jax.typed_config import typed_value


def open_judgments(source: Mapping[str, Any], instruction: Instruction, seed: int) -> list[Judgment]:
    """The judgments of a source.

    Raises:
        ValueError: an explanation names a rule that the instruction does not have, or that allows other grades.
    """
    arguments = dict(source)
    low, high = keep = typed_value(arguments.pop("keep", (0.0, 1.0)), tuple[float, float], "keep")
    if not 0 <= low < high <= 1:
        raise ValueError(f"keep: {keep} must be two numbers from 0 to 1, the lower first")
    explained = typed_value(arguments.pop("explained", True), bool, "explained")
    generator = GENERATORS.get(arguments.get("format"))
    if generator:
        del arguments["format"]
        judgments = list(generator(seed, **_typed(generator, arguments)))
    else:
        judgments = read_judgments(arguments, instruction.scale)
        if instruction.rules:
            _check_rules(judgments, instruction)
    kept = [judgment for judgment in judgments if low <= _place(judgment.query.query_id) < high]
    return kept if explained else [dataclasses.replace(judgment, explanation=None) for judgment in kept]


def open_texts(source: Mapping[str, Any], seed: int) -> list[DomainText]:
    """The domain texts of a source; only clips has a generator of its own."""
    arguments = dict(source)
    if arguments.pop("format", None) != TEXTS:
        raise ValueError(f"a text stage reads a source of format {TEXTS!r}; got {dict(source)}")
    if "texts" not in arguments:
        raise ValueError(f"a source of format {TEXTS!r} needs texts: how many")
    count = typed_value(arguments.pop("texts"), int, "texts")
    return list(clips.domain_texts(seed, count=count, **_typed(clips.domain_texts, arguments)))


TEXTS = "clips_text"  # the format that has texts; all others have judgments
GENERATORS = {
    "clips": clips.judgments,
    "clips_contrasts": clips_contrasts.judgments,
    "clips_rulebooks": clips_rulebooks.judgments,
}


def _typed(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, those that the function declares of its types, else ValueError; calling it tells of any other."""
    hints = typing.get_type_hints(function)
    return {key: typed_value(value, hints.get(key, Any), key) for key, value in arguments.items()}


def _check_rules(judgments: Sequence[Judgment], instruction: Instruction) -> None:
    numbers = {rule.number for rule in instruction.rules}
    for judgment in judgments:
        if unknown := set(judgment.rules) - numbers:
            raise ValueError(
                f"query_id {judgment.query.query_id!r}, doc_id {judgment.document.doc_id!r}: rules: {min(unknown)} is "
                f"none of the instruction's, {', '.join(map(str, sorted(numbers)))}"
            )
        if judgment.explanation and judgment.grade is not None:
            rule = instruction.rule(judgment.explanation.rule)
            if rule is None or judgment.grade not in rule.grades:
                pair = f"query_id {judgment.query.query_id!r}, doc_id {judgment.document.doc_id!r}: explanation"
                labels = instruction.scale.labels
                if rule is None:
                    wrong = f"the instruction has rules {', '.join(str(rule.number) for rule in instruction.rules)}"
                else:
                    wrong = f"that rule leads to {', '.join(labels[grade] for grade in rule.grades)}"
                said = f"rule {judgment.explanation.rule} for grade {labels[judgment.grade]}"
                raise ValueError(f"{pair}: {said}, but {wrong}")


def _place(query_id: str) -> float:
    return zlib.crc32(query_id.encode()) / 2**32
