"""Scoring: the grade of each pair from one prefill, behind the names of sentence-transformers' CrossEncoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from afrl_jax import relevance_file
from afrl_jax.answer_format import AnswerFormat
from afrl_jax.calibration import Calibration
from afrl_jax.data.judgment_rows import document_of
from afrl_jax.data.tables import Row
from afrl_jax.decision import MOST_PROBABLE, Decision
from afrl_jax.explanations import explanations
from afrl_jax.label_scorer import LabelScorer
from afrl_jax.ranking_metrics import expected_grade
from afrl_jax.schema import Document, Instruction, Query
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters
from lm_jax.sample import sample
from lm_jax.stream import STEPS
from lm_jax.tokenizer import Tokenizer
from lm_jax.weights import read_weights
from sharding.distributed import fetch

ANSWERS = 16  # written together
ANSWER_TOKENS = 128  # where an answer is cut off unless told otherwise


class RelevanceModel:
    """A relevance model: grades pairs, ranks documents, explains a grade.

    The argument names and return shapes are those of sentence-transformers' CrossEncoder. Not taken are `activation_fn`
    and `apply_softmax`, for scores are calibrated probabilities already (all of them: `predict_proba`), and what is of
    PyTorch: `convert_to_tensor`, `num_workers`.

        model = RelevanceModel.load("runs/quickstart/export")
        model.predict([("chess for kids", "Chess openings, explained to children")])  # expected grade in [0, 1]
        model.rank("chess for kids", ["Chess openings", "Sourdough at home"])
        model.explain("chess for kids", "Chess openings, explained to children")      # grade first, then why

    Attributes:
        format: the answer format.
        scorer: what computes; it keeps the keys and values of queries for the next call.
        parameters: in the dtype of the computation.
        calibration, decision: fitted at export; without relevance.json the identity, and the most probable grade.
        version: digest of the exported weights, empty for a model without relevance.json.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Parameters,
        format: AnswerFormat,
        *,
        calibration: Calibration | None = None,
        decision: Decision = MOST_PROBABLE,
        version: str = "",
        dtype: str = "float32",
        cache_bytes: int | None = None,
    ):
        self.scorer = LabelScorer(
            parameters, config, format.label_ids, head=format.head_tokens, dtype=dtype, cache_bytes=cache_bytes
        )
        self.config, self.parameters, self.format, self.dtype = config, self.scorer.parameters, format, dtype
        self.calibration = calibration or Calibration.identity(len(format.labels))
        self.decision, self.version = decision, version

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        instruction: Instruction | None = None,
        dtype: str = "float32",
        check: bool = True,
        mesh: Mesh | None = None,
        cache_bytes: int | None = None,
    ) -> RelevanceModel:
        """Read a model folder, a hub id or a .gguf file.

        Args:
            source: with a relevance.json, a relevance model; without, any causal model, zero-shot with the default
                template.
            instruction: of a zero-shot model; `relevance_file.DEFAULT_INSTRUCTION` where none is given.
            dtype: of the computation, "float32" or "bfloat16".
            check: whether to score the golden pairs again, and to compare the weights with their digest.
            mesh: where the parameters live; it must be set (`jax.set_mesh`) here and whenever the model is used.
            cache_bytes: of keys and values of queries, kept for the next call; 2 GiB by default, on a CPU 256 MiB.

        Raises:
            relevance_file.GoldenMismatch: the folder's golden pairs do not get the scores they were exported with.
            ValueError: an instruction for a model that brings its own, or a folder that does not fit together.
            FileNotFoundError, ConnectionError: see `lm_jax.source.locate`.
        """
        description = relevance_file.read(source)
        asked = relevance_file.instruction_of(description, instruction)
        format = relevance_file.make_format(description, Tokenizer.load(source), asked)
        config, parameters = read_weights(source, mesh=mesh)
        model = cls(
            config,
            parameters,
            format,
            calibration=Calibration.from_json(json.dumps(description["calibration"])) if description else None,
            decision=Decision.from_json(json.dumps(description["decision"])) if description else MOST_PROBABLE,
            version=description["weights_digest"] if description else "",
            dtype=dtype,
            cache_bytes=cache_bytes,
        )
        if description and check:
            relevance_file.check_golden(description, model, source)
            relevance_file.check_weights(description, source)
        return model

    def warm_up(
        self, *, query_tokens: int = 32, pairs: int | None = None, explanation_tokens: int | None = None
    ) -> None:
        """Compile now what scoring needs, and explaining one pair at a time, so that no later call waits for it.

        Args:
            query_tokens: of the longest query to be prepared for; a longer one compiles what it needs when it comes.
            pairs: of a call at most; None for any number.
            explanation_tokens: the room of explanations; None prepares none.
        """
        document_tokens = self.format.max_document_tokens + self.format.slot_size
        longest = {"document_tokens": document_tokens, "query_tokens": query_tokens}
        self.scorer.warm_up(**longest, prompts=pairs)
        if explanation_tokens:
            # To a second call of the decoder: on several devices it is compiled again for what the first one returned.
            some = {"max_new_tokens": min(STEPS + 2, explanation_tokens), "room": explanation_tokens}
            for prompt in self.scorer.warm_up_prefill(**longest):
                list(explanations(self.scorer, self.format, [prompt], [0], **some))

    def label_logprobs(
        self,
        pairs: Sequence[tuple[Query, Document]],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Uncalibrated log-probs over the grades, float32 [N, C]."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        prompts = self.format.encode_prompts(pairs)
        bar = (lambda batches: run_log.progress(batches, "scoring", len(batches))) if show_progress_bar else None
        size = batch_size or max(1, len(prompts))
        parts = [self.scorer.label_logprobs(prompts[i : i + size], progress=bar) for i in range(0, len(prompts), size)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.format.labels)), np.float32)

    def predict_proba(
        self, inputs: Sequence[Any], *, batch_size: int | None = None, show_progress_bar: bool | None = None
    ) -> np.ndarray:
        """Calibrated probabilities of the grades, float64 [N, C], in the order of the scale. Arguments of `predict`.

        Raises:
            FloatingPointError: see `probabilities`; so do all that read a grade or a score from them.
        """
        pairs = [(_query(query), _document(document)) for query, document in inputs]
        logprobs = self.label_logprobs(pairs, batch_size=batch_size, show_progress_bar=show_progress_bar)
        return self.probabilities(logprobs)

    def probabilities(self, logprobs: np.ndarray) -> np.ndarray:
        """Calibrated probabilities float64 [N, C] of uncalibrated log-probs [N, C].

        Raises:
            FloatingPointError: some are no numbers, of damaged weights or an overflow; names the first pair. Better no
                grade than one made up of it.
        """
        found = self.calibration.apply(logprobs)
        wrong = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if wrong.size:
            told = f"of {len(wrong)} of {len(found)} pairs, the first of them pair {wrong[0]}"
            raise FloatingPointError(f"the model gave probabilities that are not numbers, {told}")
        return found

    def predict(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
    ) -> np.ndarray | list[float] | float:
        """Calibrated expected grade in [0, 1] of each pair, float64 [N]; of one pair alone, a scalar.

        Args:
            inputs: pairs (query, document), each a string, a schema object, or for a document a dictionary {title,
                text, further fields}.
            batch_size: pairs scored together at most. By default all of them: a batch of the computation has a number
                of tokens, whatever this says, and the more come together the less is padding.
            show_progress_bar: whether to show one, with the time left.
            convert_to_numpy: False gives a list of floats.
        """
        single = len(inputs) == 2 and all(isinstance(part, str | Query | Document | dict) for part in inputs)
        probabilities = self.predict_proba(
            [inputs] if single else inputs, batch_size=batch_size, show_progress_bar=show_progress_bar
        )
        scores = expected_grade(probabilities)
        scores = scores if convert_to_numpy else scores.tolist()
        return scores[0] if single else scores

    def grades(self, probabilities: np.ndarray) -> np.ndarray:
        """Decided grade (index on the scale) of calibrated probabilities [N, C]."""
        return self.decision(probabilities)

    def rank(
        self,
        query: str | Query,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by falling score: [{"corpus_id": index, "score": expected grade, ("text": document)}]."""
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, batch_size=batch_size, show_progress_bar=show_progress_bar)
        order = np.argsort(-scores, kind="stable")[:top_k].tolist()
        return [
            {"corpus_id": i, "score": float(scores[i])} | ({"text": documents[i]} if return_documents else {})
            for i in order
        ]

    def explain(self, query: str | Query, document: Any, *, max_new_tokens: int = ANSWER_TOKENS) -> str:
        """The grade and its explanation as text, whose verdict is that grade: see `answers`."""
        return self.answers([(_query(query), _document(document))], max_new_tokens=max_new_tokens)[0]

    def answers(
        self,
        pairs: Sequence[tuple[Query, Document]],
        *,
        max_new_tokens: int = ANSWER_TOKENS,
        grades: Sequence[int] | None = None,
    ) -> list[str]:
        """An answer to each pair as text; one cut off at `max_new_tokens` is as long as it got.

        The first token is the label of the decided grade, after calibration, of the prefill whose keys and values the
        explanation continues from greedily; the verdict at its end is held to the same grade. `grades`, where they were
        decided before, are explained as they are.
        """
        written: list[str] = []
        for start in range(0, len(pairs), ANSWERS):
            prompts = self.format.encode_prompts(pairs[start : start + ANSWERS])
            logprobs, prefixes = self.scorer.prefill(prompts)
            decided = grades[start : start + ANSWERS] if grades else self.grades(self.probabilities(logprobs)).tolist()
            *_, last = explanations(self.scorer, self.format, prefixes, decided, max_new_tokens=max_new_tokens)
            written += [text for text, _ in last]
        return written

    def answer_tokens(
        self,
        pairs: Sequence[tuple[Query, Document]],
        *,
        max_new_tokens: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the model writes when nothing is decided for it, not even that an answer begins with a label: to measure
        whether it keeps the format and agrees with itself.

        Returns:
            Greedy answers, tokens int32 [N, A] and lengths int32 [N], end-of-text included.
        """
        if not pairs:
            return np.zeros((0, max_new_tokens), np.int32), np.zeros(0, np.int32)
        eos = self.format.tokenizer.eos
        prompts = [prompt.tokens for prompt in self.format.encode_prompts(pairs)]
        width = -(-max(map(len, prompts)) // 32) * 32
        tokens, lengths = [], []
        for start in range(0, len(prompts), ANSWERS):
            chosen = prompts[start : start + ANSWERS]
            padded = np.zeros((ANSWERS, width), np.int32)
            for row, prompt in zip(padded, chosen, strict=False):
                row[: len(prompt)] = prompt
            size = np.array([len(p) for p in chosen] + [1] * (ANSWERS - len(chosen)), np.int32)
            drawn = fetch(
                sample(
                    self.parameters,
                    padded,
                    size,
                    np.arange(ANSWERS, dtype=np.uint32),
                    jax.random.key(0),
                    config=self.config,
                    group=1,
                    max_new_tokens=max_new_tokens,
                    eos=-1 if eos is None else eos,  # without one, every answer is as long as it may be
                    temperature=0.0,
                    dtype=self.dtype,
                )
            )
            tokens.append(drawn.tokens[: len(chosen), 0])
            lengths.append(drawn.lengths[: len(chosen), 0])
        return np.concatenate(tokens), np.concatenate(lengths)


def _query(query: str | Query) -> Query:
    return query if isinstance(query, Query) else Query("", query)


def _document(document: Any) -> Document:
    if isinstance(document, Document):
        return document
    if isinstance(document, dict):
        given = {name: value for name, value in document.items() if value is not None}
        return document_of(Row("document", 1, {"title": ""} | given))
    return Document("", document)
