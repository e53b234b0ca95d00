"""The one place where the service touches a RelevanceModel. Prompts go in, probabilities and words come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from afrl_jax.answer_format import PromptTokens
from afrl_jax.calibration import Calibration
from afrl_jax.explanations import explanations
from afrl_jax.ranking_metrics import expected_grade
from afrl_jax.schema import Document, Query
from afrl_jax.scoring import RelevanceModel


@dataclasses.dataclass(frozen=True)
class Graded:
    """What a row of probabilities says."""

    grade: str
    grade_probs: dict[str, float]
    score: float


class Scorer:
    """A loaded model as the service uses it. `encode` may be called from any thread, the rest from one at a time."""

    def __init__(self, model: RelevanceModel, max_explanation_tokens: int):
        self.model, self.max_explanation_tokens = model, max_explanation_tokens
        self.labels = model.format.labels

    @property
    def calibrated(self) -> bool:
        """Whether a fitted calibration came with the model: without one, probabilities are what the softmax says."""
        return self.model.calibration != Calibration.identity(len(self.labels))

    def encode(
        self, pairs: Sequence[tuple[Query, Document]], max_document_tokens: int | None, salt: bytes = b""
    ) -> list[PromptTokens]:
        """Prompts of the pairs; documents are cut to the model's limit or `max_document_tokens` of their own."""
        prompts = self.model.format.encode_prompts(pairs, salt)
        if max_document_tokens is None:
            return prompts
        return [self._shortened(prompt, max_document_tokens) for prompt in prompts]

    def _shortened(self, prompt: PromptTokens, limit: int) -> PromptTokens:
        document, slot = np.split(prompt.document, [len(prompt.document) - self.model.format.slot_size])
        document = document[: self.model.format.document_head_size + limit]
        return dataclasses.replace(prompt, document=np.concatenate([document, slot]))

    def probabilities(self, prompts: Sequence[PromptTokens], salts: Sequence[bytes]) -> np.ndarray:
        """Calibrated probabilities [N, C] of the grades. Prompts share a prefix only with those of the same salt.

        Raises:
            FloatingPointError: a probability is no number.
        """
        return self.model.probabilities(self.model.scorer.label_logprobs(prompts, salts=salts))

    def graded(self, probabilities: np.ndarray) -> list[Graded]:
        """Rows [N, C] read: the decided grade, the probability of each, the expected grade in [0, 1]."""
        grades, scores = self.model.grades(probabilities), expected_grade(probabilities)
        return [
            Graded(self.labels[grade], dict(zip(self.labels, row, strict=True)), score)
            for grade, row, score in zip(grades.tolist(), probabilities.tolist(), scores.tolist(), strict=True)
        ]

    def explanation(
        self, prompt: PromptTokens, grade: str, max_new_tokens: int, salt: bytes = b""
    ) -> Iterator[tuple[str, bool]]:
        """The answer as it is decoded: (text so far, label included; whether it is complete), again and again.

        It begins with `grade`, and its verdict can be no other: see `afrl_jax.explanations`.
        """
        model = self.model
        _, prompts = model.scorer.prefill([prompt], salts=[salt])
        grades = [self.labels.index(grade)]
        # Room for the longest: every room is compiled.
        fixed = {"max_new_tokens": max_new_tokens, "room": self.max_explanation_tokens}
        for (told,) in explanations(model.scorer, model.format, prompts, grades, **fixed):
            yield told

    def warm_up(self, pairs: int, query_tokens: int) -> None:
        """Compile what batches of up to `pairs` pairs and explanations need, for queries of up to `query_tokens`."""
        self.model.warm_up(pairs=pairs, query_tokens=query_tokens, explanation_tokens=self.max_explanation_tokens)

    def describe(self) -> dict[str, Any]:
        """What /info tells of the model."""
        format, config = self.model.format, self.model.config
        scale = format.instruction.scale
        return {
            "model_version": self.model.version,
            "calibrated": self.calibrated,
            "parameters": config.parameter_count,
            "family": config.family,
            "dtype": self.model.dtype,
            "task": format.instruction.task,
            "labels": list(scale.labels),
            "meanings": list(scale.meanings),
            "label_token_ids": list(format.label_ids),
            "rules": {str(rule.number): rule.text for rule in format.instruction.rules},
            "max_document_tokens": format.max_document_tokens,
        }
