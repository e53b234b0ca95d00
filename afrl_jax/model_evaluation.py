"""A model on judged pairs: its label distributions, its decoded explanations, its calibration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afrl_jax.answer_format import CONSISTENCY, RULE, AnswerFormat
from afrl_jax.calibration import Calibration, fit_calibration
from afrl_jax.decision import Decision, fit_decision
from afrl_jax.evaluation import NO_RULE, Predictions, query_numbers
from afrl_jax.rewards import segment_rewards
from afrl_jax.schema import Judgment
from afrl_jax.scoring import RelevanceModel
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Predictions on the test pairs with the calibration and decision that made them."""

    predictions: Predictions
    calibration: Calibration
    decision: Decision

    def save(self, folder: Path) -> None:
        """Write predictions.npz and calibration.json."""
        predictions = self.predictions
        arrays = {f"explanation/{name}": values for name, values in predictions.explanation.items()}
        for field in ("query_index", "grade", "probabilities", "uncalibrated", "rule", "document"):
            if (values := getattr(predictions, field)) is not None:
                arrays[field] = values
        np.savez_compressed(folder / "predictions.npz", **arrays)
        fitted = {name: dataclasses.asdict(getattr(self, name)) for name in ("calibration", "decision")}
        (folder / "calibration.json").write_text(json.dumps(fitted, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Evaluated:
        """Read what `save` wrote."""
        fitted = json.loads((folder / "calibration.json").read_text())
        with np.load(folder / "predictions.npz") as file:
            arrays = dict(file)
        explanation = {k.partition("/")[2]: arrays.pop(k) for k in list(arrays) if k.startswith("explanation/")}
        calibration = Calibration.from_json(json.dumps(fitted["calibration"]))
        decision = Decision.from_json(json.dumps(fitted["decision"]))
        return cls(Predictions(**arrays, explanation=explanation, decision=decision), calibration, decision)


def evaluate_model(
    parameters: Parameters,
    config: DecoderConfig,
    format: AnswerFormat,
    *,
    test: Sequence[Judgment],
    calibration: Sequence[Judgment],
    explained_pairs: int,
    max_new_tokens: int,
    dtype: str = "float32",
    title: str = "evaluation",
) -> Evaluated:
    """Score `test`, with calibration and decision fitted on `calibration` (other queries); decode some explanations.

    Explanations are decoded for `explained_pairs` of the test pairs that have a gold one, evenly spread: pairs of one
    query fare alike, so that those of few queries say little.
    """
    model = RelevanceModel(config, parameters, format, dtype=dtype)
    model.calibration, model.decision = calibrate(model, calibration)
    predictions = predict_judgments(
        model, test, explained_pairs=explained_pairs, max_new_tokens=max_new_tokens, title=title
    )
    return Evaluated(predictions, model.calibration, model.decision)


def calibrate(model: RelevanceModel, judgments: Sequence[Judgment]) -> tuple[Calibration, Decision]:
    """Calibration and decision fitted on judgments, whatever the model's own are."""
    logprobs = _label_logprobs(model, judgments)
    gold = np.array([judgment.grade for judgment in judgments])
    fitted = fit_calibration(logprobs, gold)
    return fitted, fit_decision(fitted.apply(logprobs), gold, query_numbers(judgments))


def predict_judgments(
    model: RelevanceModel,
    judgments: Sequence[Judgment],
    *,
    explained_pairs: int,
    max_new_tokens: int,
    title: str = "evaluation",
) -> Predictions:
    """What the model, with its calibration and decision, says of judged pairs; arguments as in `evaluate_model`."""
    found = _label_logprobs(model, judgments)
    uncalibrated = Calibration.identity(found.shape[1]).apply(found)
    known = [judgment.deciding_rule for judgment in judgments]
    rules = np.array([NO_RULE if rule is None else rule for rule in known])
    return Predictions(
        query_index=query_numbers(judgments),
        grade=np.array([judgment.grade for judgment in judgments]),
        probabilities=model.probabilities(found),
        decision=model.decision,
        uncalibrated=uncalibrated,
        rule=rules if (rules != NO_RULE).any() else None,
        document=np.unique([judgment.document.doc_id for judgment in judgments], return_inverse=True)[1],
        explanation=_explanations(model, judgments, explained_pairs, max_new_tokens, title),
    )


def _label_logprobs(model: RelevanceModel, judgments: Sequence[Judgment]) -> np.ndarray:
    return model.label_logprobs([(j.query, j.document) for j in judgments], show_progress_bar=True)


def _explanations(
    model: RelevanceModel, judgments: Sequence[Judgment], pairs: int, max_new_tokens: int, title: str
) -> dict[str, np.ndarray]:
    """format, consistency, rule_accuracy: float [N], NaN where no explanation was decoded."""
    explained = [number for number, judgment in enumerate(judgments) if judgment.explanation]
    pairs = min(pairs, len(explained))
    if not pairs:
        return {}
    chosen = [explained[i * len(explained) // pairs] for i in range(pairs)]
    checks = {name: np.full(len(judgments), np.nan) for name in ("format", "consistency", "rule_accuracy")}
    starts = range(0, len(chosen), 16)
    for start in run_log.progress(starts, f"{title}: explanations", len(starts)):
        some = chosen[start : start + 16]
        asked = [(judgments[i].query, judgments[i].document) for i in some]
        tokens, lengths = model.answer_tokens(asked, max_new_tokens=max_new_tokens)
        for number, row, length in zip(some, tokens, lengths, strict=True):
            parsed = model.format.parse(row[:length])
            instruction = judgments[number].query.instruction or model.format.instruction
            rewards = segment_rewards(parsed, judgments[number], instruction)
            checks["format"][number] = parsed is not None
            checks["consistency"][number] = rewards[CONSISTENCY]
            checks["rule_accuracy"][number] = rewards[RULE]
    return checks
