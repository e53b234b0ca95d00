"""A model on judged pairs: its label distributions, its decoded explanations, its calibration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afrl_jax.answer_format import CONSISTENCY, RULE, AnswerFormat
from afrl_jax.calibration import Calibration, fit_calibration, fit_threshold
from afrl_jax.evaluation import Predictions
from afrl_jax.rewards import segment_rewards
from afrl_jax.schema import Judgment
from afrl_jax.scoring import RelevanceModel
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters

SAMPLES = 16  # label tokens drawn a pair, for pass@8


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Predictions on the test pairs with the calibration and threshold that made them."""

    predictions: Predictions
    calibration: Calibration
    threshold: float

    def save(self, folder: Path) -> None:
        """Write predictions.npz and calibration.json."""
        predictions = self.predictions
        arrays = {f"explanation/{name}": values for name, values in predictions.explanation.items()}
        for field in ("query_index", "grade", "probabilities", "uncalibrated", "rule", "label_samples"):
            if (values := getattr(predictions, field)) is not None:
                arrays[field] = values
        np.savez_compressed(folder / "predictions.npz", **arrays)
        fitted = {"calibration": json.loads(self.calibration.to_json()), "threshold": self.threshold}
        (folder / "calibration.json").write_text(json.dumps(fitted, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Evaluated:
        """Read what `save` wrote."""
        fitted = json.loads((folder / "calibration.json").read_text())
        with np.load(folder / "predictions.npz") as file:
            arrays = dict(file)
        explanation = {k.partition("/")[2]: arrays.pop(k) for k in list(arrays) if k.startswith("explanation/")}
        predictions = Predictions(**arrays, explanation=explanation, threshold=fitted["threshold"])
        return cls(predictions, Calibration.from_json(json.dumps(fitted["calibration"])), fitted["threshold"])


def evaluate_model(
    parameters: Parameters,
    config: DecoderConfig,
    format: AnswerFormat,
    *,
    test: Sequence[Judgment],
    calibration: Sequence[Judgment],
    explained_pairs: int,
    max_new_tokens: int,
    seed: int,
    dtype: str = "float32",
    title: str = "evaluation",
) -> Evaluated:
    """Score `test`, with calibration and threshold fitted on `calibration` (other queries); decode some explanations.

    Explanations are decoded for the first `explained_pairs` test pairs that have a gold one.
    """
    model = RelevanceModel(config, parameters, format, dtype=dtype)
    model.calibration, model.threshold = calibrate(model, calibration)
    predictions = predict_judgments(
        model, test, explained_pairs=explained_pairs, max_new_tokens=max_new_tokens, seed=seed, title=title
    )
    return Evaluated(predictions, model.calibration, model.threshold)


def calibrate(model: RelevanceModel, judgments: Sequence[Judgment]) -> tuple[Calibration, float]:
    """Calibration and threshold fitted on judgments, whatever the model's own are."""
    logprobs = _label_logprobs(model, judgments)
    gold = np.array([judgment.grade for judgment in judgments])
    fitted = fit_calibration(logprobs, gold)
    return fitted, fit_threshold(fitted.apply(logprobs), gold)


def predict_judgments(
    model: RelevanceModel,
    judgments: Sequence[Judgment],
    *,
    explained_pairs: int,
    max_new_tokens: int,
    seed: int,
    title: str = "evaluation",
) -> Predictions:
    """What the model, with its calibration and threshold, says of judged pairs; arguments as in `evaluate_model`."""
    found = _label_logprobs(model, judgments)
    uncalibrated = Calibration.identity(found.shape[1]).apply(found)
    query_ids = {query_id: number for number, query_id in enumerate(dict.fromkeys(j.query.query_id for j in judgments))}
    rules = [judgment.rules[0] if judgment.rules else -1 for judgment in judgments]
    return Predictions(
        query_index=np.array([query_ids[judgment.query.query_id] for judgment in judgments]),
        grade=np.array([judgment.grade for judgment in judgments]),
        probabilities=model.calibration.apply(found),
        threshold=model.threshold,
        uncalibrated=uncalibrated,
        rule=np.array(rules) if min(rules) >= 0 else None,
        label_samples=np.random.default_rng(seed).multinomial(SAMPLES, uncalibrated),
        explanation=_explanations(model, judgments, explained_pairs, max_new_tokens, title),
    )


def _label_logprobs(model: RelevanceModel, judgments: Sequence[Judgment]) -> np.ndarray:
    return model.label_logprobs([(j.query, j.document) for j in judgments], show_progress_bar=True)


def _explanations(
    model: RelevanceModel, judgments: Sequence[Judgment], pairs: int, max_new_tokens: int, title: str
) -> dict[str, np.ndarray]:
    """format, consistency, rule_accuracy: float [N], NaN where no explanation was decoded."""
    chosen = [number for number, judgment in enumerate(judgments) if judgment.explanation][:pairs]
    if not chosen:
        return {}
    checks = {name: np.full(len(judgments), np.nan) for name in ("format", "consistency", "rule_accuracy")}
    starts = range(0, len(chosen), 16)
    for start in run_log.progress(starts, f"{title}: explanations", len(starts)):
        some = chosen[start : start + 16]
        asked = [(judgments[i].query, judgments[i].document) for i in some]
        tokens, lengths = model.answer_tokens(asked, max_new_tokens=max_new_tokens)
        for number, row, length in zip(some, tokens, lengths, strict=True):
            parsed = model.format.parse(row[:length])
            rewards = segment_rewards(parsed, judgments[number], model.format.instruction)
            checks["format"][number] = parsed is not None
            checks["consistency"][number] = rewards[CONSISTENCY]
            checks["rule_accuracy"][number] = rewards[RULE]
    return checks
