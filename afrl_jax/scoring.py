"""Scoring: the grade of each pair from one prefill.

`label_logprobs` is what everything else reads: batch scoring, evaluation, distillation, the reward of the rewriter. Documents of
one query share its instruction and query in a row, only label rows of the head are read, and there is one host sync a batch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afrl_jax import relevance_file
from afrl_jax.answer_format import AnswerFormat, PromptTokens
from afrl_jax.calibration import Calibration, decide
from afrl_jax.ranking_metrics import expected_grade
from afrl_jax.schema import Document, Query
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder, contract
from lm_jax.parameters import Parameters
from lm_jax.rows import Branch, Group, RowShape, plan_rows, render_row, stack
from lm_jax.sample import sample
from lm_jax.tokenizer import Tokenizer
from lm_jax.weights import read_weights

ROW_TOKENS = (256, 512, 1024, 2048, 4096, 8192)  # a row is as long as the smallest of these that holds the longest pair
ROWS = 8  # a batch
_NOTHING = np.zeros(0, np.int32)


@functools.partial(jax.jit, static_argnames=("config", "label_ids", "dtype"))
def _label_logprobs(parameters: Parameters, batch, *, config: DecoderConfig, label_ids: tuple[int, ...], dtype: str):
    decoder = Decoder(config, parameters, dtype=dtype)
    hidden_BTD = decoder(batch["tokens"], batch["positions"], batch["groups"], batch["branches"])
    hidden_BQD = jnp.take_along_axis(hidden_BTD, batch["label_at"][..., None], axis=1)
    logits_BQC = contract("bqd,cd->bqc", hidden_BQD, decoder.output_embedding[jnp.array(label_ids)])
    return jax.nn.log_softmax(logits_BQC, axis=-1)


def label_logprobs(
    parameters: Parameters,
    config: DecoderConfig,
    prompts: Sequence[PromptTokens],
    label_ids: tuple[int, ...],
    *,
    dtype: str = "float32",
    progress: Callable[..., Iterable] | None = None,
) -> np.ndarray:
    """Log-softmax over the label tokens, float32 [N, C], at the first answer position of each prompt.

    Prompts that share their prefix array are computed in rows that hold the prefix once. The numbers do not depend on which
    prompts come together, beyond the rounding of `dtype`.
    """
    by_prefix: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prefix.setdefault(prompt.prefix.tobytes(), []).append(index)
    members = list(by_prefix.values())
    groups = [
        Group(
            prompts[indices[0]].prefix,
            [Branch(prompts[i].document, _NOTHING, _NOTHING, label_values={"number": float(i + 1)}) for i in indices],
        )
        for indices in members
    ]
    longest = max(len(prompt.prefix) + len(prompt.document) for prompt in prompts)
    tokens = next((size for size in ROW_TOKENS if size >= longest), -(-longest // 1024) * 1024)
    shape = RowShape(tokens, 0, tokens // 8, label_values=(("number", ()),))
    plan = plan_rows(groups, shape, branches_together=tokens, seed=0)
    plan += [[]] * (-len(plan) % ROWS)
    found = np.zeros((len(prompts), len(label_ids)), np.float32)
    batches: Iterable[int] = range(0, len(plan), ROWS)
    for start in progress(batches) if progress else batches:
        batch = stack([render_row(groups, row, shape) for row in plan[start : start + ROWS]])
        number_BQ = batch.pop("number").astype(np.int64)
        inputs = {name: batch[name] for name in ("tokens", "positions", "groups", "branches", "label_at")}
        logprobs_BQC = _label_logprobs(parameters, inputs, config=config, label_ids=label_ids, dtype=dtype)
        used_BQ = number_BQ > 0
        found[number_BQ[used_BQ] - 1] = np.asarray(logprobs_BQC)[used_BQ]
    return found


class RelevanceModel:
    """A relevance model: grades pairs, ranks documents, explains a grade.

    The argument names and return shapes are those of sentence-transformers' CrossEncoder.

        model = RelevanceModel.load("runs/quickstart/export")
        model.predict([("chess for kids", "Chess openings, explained to children")])       # calibrated expected grade in [0, 1]
        model.rank("chess for kids", ["Chess openings", "Sourdough at home"])

    Attributes:
        format: the answer format. calibration, threshold: fitted at export, the identity for a model without relevance.json.
        version: of the model folder: the digest of its weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Parameters,
        format: AnswerFormat,
        *,
        calibration: Calibration | None = None,
        threshold: float | None = None,
        dtype: str = "float32",
    ):
        self.config, self.parameters, self.format, self.dtype = config, parameters, format, dtype
        self.calibration = calibration or Calibration.identity(len(format.labels))
        self.threshold = threshold

    @classmethod
    def load(cls, source: str | Path, *, dtype: str = "float32", check: bool = True) -> RelevanceModel:
        """Read a model folder (with relevance.json), or any Hugging Face causal model, zero-shot with the default template.

        Raises:
            relevance_file.GoldenMismatch: the folder's golden pairs do not get the scores they were exported with.
        """
        description = relevance_file.read(source)
        config, parameters = read_weights(source)
        format = relevance_file.make_format(description, Tokenizer.load(source))
        model = cls(
            config,
            parameters,
            format,
            calibration=Calibration.from_json(json.dumps(description["calibration"])) if description else None,
            threshold=description["threshold"] if description else None,
            dtype=dtype,
        )
        if description and check:
            relevance_file.check_golden(description, model, source)
        return model

    def label_logprobs(self, pairs: Sequence[tuple[Query, Document]], *, show_progress_bar: bool = False) -> np.ndarray:
        """Uncalibrated log-probs over the grades, float32 [N, C]."""
        if not pairs:
            return np.zeros((0, len(self.format.labels)), np.float32)
        return label_logprobs(
            self.parameters,
            self.config,
            self.format.encode_prompts(pairs),
            self.format.label_ids,
            dtype=self.dtype,
            progress=(lambda b: run_log.progress(b, "scoring", len(b))) if show_progress_bar else None,
        )

    def predict_proba(self, inputs: Sequence[Any], *, show_progress_bar: bool = False) -> np.ndarray:
        """Calibrated probabilities of the grades, float64 [N, C], in the order of the scale.

        Args:
            inputs: pairs (query, document), each a string or a schema object.
        """
        pairs = [(_query(query), _document(document)) for query, document in inputs]
        return self.calibration.apply(self.label_logprobs(pairs, show_progress_bar=show_progress_bar))

    def predict(self, inputs: Any, *, show_progress_bar: bool = False) -> np.ndarray:
        """Calibrated expected grade in [0, 1] of each pair, float64 [N]; of one pair (two strings), a scalar."""
        single = len(inputs) == 2 and all(isinstance(part, str | Query | Document) for part in inputs)
        scores = expected_grade(self.predict_proba([inputs] if single else inputs, show_progress_bar=show_progress_bar))
        return scores[0] if single else scores

    def grades(self, probabilities: np.ndarray) -> np.ndarray:
        """Decided grade (index on the scale) of calibrated probabilities [N, C]."""
        return decide(probabilities, self.threshold)

    def rank(
        self, query: str | Query, documents: Sequence[Any], *, top_k: int | None = None, return_documents: bool = False
    ) -> list[dict[str, Any]]:
        """Documents by falling score: [{"corpus_id": index, "score": expected grade, ("text": document)}]."""
        scores = self.predict([(query, document) for document in documents]) if documents else []
        order = sorted(range(len(documents)), key=lambda i: -scores[i])[:top_k]
        return [
            {"corpus_id": i, "score": float(scores[i])} | ({"text": documents[i]} if return_documents else {})
            for i in order
        ]

    def explain(self, query: str | Query, document: Any, *, max_new_tokens: int = 128) -> str:
        """The greedy answer, grade first, as text. Its grade is the most probable label before calibration."""
        return self.answers([(_query(query), _document(document))], max_new_tokens=max_new_tokens)[0]

    def answers(self, pairs: Sequence[tuple[Query, Document]], *, max_new_tokens: int = 128) -> list[str]:
        """Greedy answers as text, end-of-text removed; an answer cut off at `max_new_tokens` is as long as it got."""
        tokens, lengths = self.answer_tokens(pairs, max_new_tokens=max_new_tokens)
        eos = self.format.tokenizer.eos
        return [
            self.format.tokenizer.decode([token for token in row[:length].tolist() if token != eos])
            for row, length in zip(tokens, lengths, strict=True)
        ]

    def answer_tokens(
        self, pairs: Sequence[tuple[Query, Document]], *, max_new_tokens: int, rows: int = 16
    ) -> tuple[np.ndarray, np.ndarray]:
        """Greedy answers: tokens int32 [N, A] and lengths int32 [N], end-of-text included."""
        prompts = [prompt.tokens for prompt in self.format.encode_prompts(pairs)]
        width = -(-max(map(len, prompts)) // 32) * 32
        tokens, lengths = [], []
        for start in range(0, len(prompts), rows):
            chosen = prompts[start : start + rows]
            padded = np.zeros((rows, width), np.int32)
            for row, prompt in zip(padded, chosen, strict=False):
                row[: len(prompt)] = prompt
            size = np.array([len(p) for p in chosen] + [1] * (rows - len(chosen)), np.int32)
            drawn = jax.device_get(
                sample(
                    self.parameters, padded, size, np.arange(rows, dtype=np.uint32), jax.random.key(0), config=self.config,
                    group=1, max_new_tokens=max_new_tokens, eos=self.format.tokenizer.eos, temperature=0.0, dtype=self.dtype,
                )
            )  # fmt: skip
            tokens.append(drawn.tokens[: len(chosen), 0])
            lengths.append(drawn.lengths[: len(chosen), 0])
        return np.concatenate(tokens), np.concatenate(lengths)


def _query(query: str | Query) -> Query:
    return query if isinstance(query, Query) else Query("", query)


def _document(document: Any) -> Document:
    if isinstance(document, Document):
        return document
    if isinstance(document, dict):
        fields = {name: str(value) for name, value in document.items() if name not in ("title", "text")}
        return Document("", document.get("title", ""), document.get("text", ""), fields)
    return Document("", document)
