"""relevance.json: what makes a model folder a relevance model, and the golden pairs that prove it is still the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afrl_jax.answer_format import AnswerFormat, Template
from afrl_jax.schema import Document, Instruction, Query, Rule, Scale
from lm_jax.source import locate
from lm_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from afrl_jax.scoring import RelevanceModel

NAME = "relevance.json"
FORMAT_VERSION = 1
# Of a probability: float32 sums taken in another order differ by less than 1e-5, another model by more.
GOLDEN_TOLERANCE = 1e-3

REQUIRED = (
    "template",
    "template_checksum",
    "instruction",
    "show_rules",
    "max_document_tokens",
    "label_token_ids",
    "calibration",
    "decision",
    "weights_digest",
    "golden",
)

# For a causal model that was never trained to grade.
DEFAULT_INSTRUCTION = Instruction(
    "Judge how well the document answers the query.",
    Scale(("0", "1", "2", "3"), ("irrelevant", "related", "relevant", "perfectly relevant")),
)


class GoldenMismatch(ValueError):
    """A model folder does not score its golden pairs as it did when it was exported."""


def describe(
    model: RelevanceModel, golden: list[tuple[Query, Document]], *, figures: Mapping[str, float], **extra: Any
) -> dict[str, Any]:
    """The contents of relevance.json; `extra` is recorded as it is (digests, library versions)."""
    format = model.format
    probabilities = model.predict_proba(golden)
    return {
        "format_version": FORMAT_VERSION,
        "template": dataclasses.asdict(format.template),
        "template_checksum": format.template.checksum,
        "prompt_head": format.prefix_text(Query("", "")),  # all that stands before the query's text, for other programs
        "instruction": dataclasses.asdict(format.instruction),
        "show_rules": format.show_rules,
        "max_document_tokens": format.max_document_tokens,
        "label_token_ids": list(format.label_ids),
        "calibration": dataclasses.asdict(model.calibration),
        "decision": dataclasses.asdict(model.decision),
        "figures": dict(figures),
        "golden": [
            {"query": dataclasses.asdict(q), "document": dataclasses.asdict(d), "probabilities": p.tolist()}
            for (q, d), p in zip(golden, probabilities, strict=True)
        ],
        **extra,
    }


def model_version(source: str | Path) -> str:
    """Digest of the weights of a model folder, a hub id or a .gguf file, as it stands there or computed."""
    from lm_jax.weights import PATTERNS, weights_digest  # imports jax

    if described := read(source):
        return described["weights_digest"]
    path = locate(source, PATTERNS)
    if path.is_dir():
        return weights_digest(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(source: str | Path) -> dict[str, Any] | None:
    """The relevance.json of a model folder or hub id, None where it has none.

    Raises:
        ValueError: it is no relevance.json of this version, or its template does not have the checksum it was written
            with.
    """
    folder = locate(source, (NAME,))
    file = folder / NAME
    if folder.is_file() or not file.exists():
        return None
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if description.get("format_version") != FORMAT_VERSION:
        version = description.get("format_version")
        raise ValueError(f"{file}: format_version is {version!r}, this program reads {FORMAT_VERSION}")
    if "threshold" in description:  # as written before there were several rules to decide by
        description["decision"] = {"threshold": description.pop("threshold"), "divisor": None}
    if missing := [key for key in REQUIRED if key not in description]:
        raise ValueError(f"{file}: {', '.join(missing)} is missing")
    try:
        checksum = Template(**description["template"]).checksum
    except TypeError as error:
        raise ValueError(f"{file}: template: {error}") from error
    if checksum != description["template_checksum"]:
        raise ValueError(
            f"{file}: template_checksum is {description['template_checksum']}, but the template gives {checksum}: "
            "prompts would not be those the model was trained on"
        )
    return description


def instruction_of(description: Mapping[str, Any] | None, given: Instruction | None = None) -> Instruction:
    """The instruction of a relevance.json; of a model without one, what is given, or the default.

    Raises:
        ValueError: both are there. A trained model is asked as it was trained.
    """
    if description is None:
        return given or DEFAULT_INSTRUCTION
    fields = description["instruction"]
    if given is not None:
        raise ValueError(
            f"the model has a {NAME} with its own task and scale {', '.join(fields['scale']['labels'])}; "
            "a scale can only be given to a model without one"
        )
    return instruction_from(fields)


def instruction_from(fields: Mapping[str, Any]) -> Instruction:
    """The instruction that `dataclasses.asdict` took apart."""
    return Instruction(
        fields["task"],
        Scale(tuple(fields["scale"]["labels"]), tuple(fields["scale"]["meanings"])),
        tuple(Rule(rule["number"], rule["text"], tuple(rule["grades"])) for rule in fields["rules"]),
    )


def make_format(description: Mapping[str, Any] | None, tokenizer: Tokenizer, instruction: Instruction) -> AnswerFormat:
    """The answer format of a relevance.json, or the default template, with the instruction of `instruction_of`.

    Raises:
        ValueError: a label is no single token, or the tokenizer does not give the label token ids that were recorded.
    """
    if description is None:
        return AnswerFormat(tokenizer, instruction)
    format = AnswerFormat(
        tokenizer,
        instruction,
        template=Template(**description["template"]),
        max_document_tokens=description["max_document_tokens"],
        show_rules=description["show_rules"],
    )
    if list(format.label_ids) != description["label_token_ids"]:
        raise ValueError(
            f"the tokenizer gives label token ids {list(format.label_ids)}, "
            f"{NAME} records {description['label_token_ids']}"
        )
    return format


def _query(fields: Mapping[str, Any]) -> Query:
    own = fields.get("instruction")
    return Query(**{**fields, "instruction": instruction_from(own) if own else None})


def check_weights(description: Mapping[str, Any], source: str | Path) -> None:
    """The weights are those that `weights_digest` names: scores are kept, and jobs resumed, under that name.

    Raises:
        GoldenMismatch: they are others.
    """
    from lm_jax.weights import PATTERNS, weights_digest  # imports jax

    if (found := weights_digest(locate(source, PATTERNS))) != description["weights_digest"]:
        raise GoldenMismatch(f"{source}: weights_digest is {description['weights_digest']}, the weights' is {found}")


def check_golden(description: Mapping[str, Any], model: RelevanceModel, source: str | Path) -> None:
    """Re-score the golden pairs; bf16 compute is allowed its rounding.

    Raises:
        GoldenMismatch: a probability is off by more than the tolerance; names the pair and both values.
    """
    golden = description["golden"]
    if not golden:
        return
    pairs = [(_query(row["query"]), Document(**row["document"])) for row in golden]
    expected = np.array([row["probabilities"] for row in golden])
    try:
        error = np.abs(model.predict_proba(pairs) - expected)
    except FloatingPointError as wrong:
        raise GoldenMismatch(f"{source}: golden pairs cannot be scored: {wrong}") from wrong
    tolerance = GOLDEN_TOLERANCE if model.dtype == "float32" else 0.05
    if error.max() > tolerance:
        worst = int(error.max(axis=1).argmax())
        raise GoldenMismatch(
            f"{source}: golden pair {worst} (query {pairs[worst][0].text!r}) scores off by {error[worst].max():.2g} in "
            f"probability, more than {tolerance}: weights, tokenizer or template are not those that were exported"
        )
