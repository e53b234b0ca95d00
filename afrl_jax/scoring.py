"""Scoring: the grade of each pair from one prefill.

`label_logprobs` is what everything else reads: batch scoring, evaluation, distillation, the reward of the rewriter.
Documents of one query share its instruction and query in a row, only label rows of the head are read, and there is one
host sync a batch.
"""

from __future__ import annotations

import functools
import json
import math
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
from afrl_jax.schema import Document, Instruction, Query
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder, contract
from lm_jax.parameters import Parameters
from lm_jax.rows import Branch, Group, RowShape, plan_rows, render_row, stack
from lm_jax.sample import sample
from lm_jax.tokenizer import Tokenizer
from lm_jax.weights import read_weights
from sharding.rules import RULES, constrain

ROW_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)  # a row has the least of these that holds the longest pair
BATCH_TOKENS = 4096  # at most, in the rows of a batch: memory does not grow with the longest pair
_NOTHING = np.zeros(0, np.int32)


@functools.partial(jax.jit, static_argnames=("config", "label_ids", "dtype"))
def _label_logprobs(parameters: Parameters, batch, *, config: DecoderConfig, label_ids: tuple[int, ...], dtype: str):
    decoder = Decoder(config, parameters, dtype=dtype)
    hidden_BTD = decoder(batch["tokens"], batch["positions"], batch["groups"], batch["branches"])
    hidden_BQD = jnp.take_along_axis(hidden_BTD, batch["label_at"][..., None], axis=1)
    logits_BQC = contract("bqd,cd->bqc", hidden_BQD, decoder.output_embedding[jnp.array(label_ids)])
    return constrain(jax.nn.log_softmax(logits_BQC, axis=-1), (None, None, None))  # every process reads all of it


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

    Prompts of the same prefix are computed in rows that hold the prefix once. The numbers do not depend on which
    prompts come together, beyond the rounding of `dtype`. There must be at least one prompt.
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
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])  # that share the rows of a batch
    # A power of two, so that one pair does not pay for a full batch and few shapes are ever compiled.
    rows = min(1 << (len(plan) - 1).bit_length(), max(1, BATCH_TOKENS // tokens))
    rows = -(-rows // devices) * devices
    plan += [[]] * (-len(plan) % rows)
    found = np.zeros((len(prompts), len(label_ids)), np.float32)
    batches: Iterable[int] = range(0, len(plan), rows)
    for start in progress(batches) if progress else batches:
        batch = stack([render_row(groups, row, shape) for row in plan[start : start + rows]])
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
        model.predict([("chess for kids", "Chess openings, explained to children")])  # expected grade in [0, 1]
        model.rank("chess for kids", ["Chess openings", "Sourdough at home"])
        model.explain("chess for kids", "Chess openings, explained to children")      # grade first, then why

    Attributes:
        format: the answer format.
        calibration, threshold: fitted at export; without relevance.json the identity, and the most probable grade.
        version: digest of the exported weights, empty for a model without relevance.json.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Parameters,
        format: AnswerFormat,
        *,
        calibration: Calibration | None = None,
        threshold: float | None = None,
        version: str = "",
        dtype: str = "float32",
    ):
        self.config, self.parameters, self.format, self.dtype = config, parameters, format, dtype
        self.calibration = calibration or Calibration.identity(len(format.labels))
        self.threshold, self.version = threshold, version

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        instruction: Instruction | None = None,
        dtype: str = "float32",
        check: bool = True,
    ) -> RelevanceModel:
        """Read a model folder, a hub id or a .gguf file.

        Args:
            source: with a relevance.json, a relevance model; without, any causal model, zero-shot with the default
                template.
            instruction: of a zero-shot model; `relevance_file.DEFAULT_INSTRUCTION` where none is given.
            dtype: of the computation, "float32" or "bfloat16".
            check: whether to score the golden pairs again.

        Raises:
            relevance_file.GoldenMismatch: the folder's golden pairs do not get the scores they were exported with.
            ValueError: an instruction for a model that brings its own, or a folder that does not fit together.
            FileNotFoundError, ConnectionError: see `lm_jax.source.locate`.
        """
        description = relevance_file.read(source)
        asked = relevance_file.instruction_of(description, instruction)
        format = relevance_file.make_format(description, Tokenizer.load(source), asked)
        config, parameters = read_weights(source)
        model = cls(
            config,
            parameters,
            format,
            calibration=Calibration.from_json(json.dumps(description["calibration"])) if description else None,
            threshold=description["threshold"] if description else None,
            version=description["weights_digest"] if description else "",
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
        """The grade and its explanation as text. It cannot contradict the score: see `answers`."""
        return self.answers([(_query(query), _document(document))], max_new_tokens=max_new_tokens)[0]

    def answers(self, pairs: Sequence[tuple[Query, Document]], *, max_new_tokens: int = 128) -> list[str]:
        """An answer to each pair as text, end-of-text removed; one cut off at `max_new_tokens` is as long as it got.

        The first token is the label of the decided grade, what `grades(predict_proba(pairs))` says, after calibration;
        the explanation continues from it greedily.
        """
        grades = self.grades(self.predict_proba(pairs))
        labels = np.array(self.format.label_ids, np.int32)[grades]
        tokens, lengths = self.answer_tokens(pairs, max_new_tokens=max_new_tokens, first=labels)
        eos = self.format.tokenizer.eos
        return [
            self.format.tokenizer.decode([token for token in row[:length].tolist() if token != eos])
            for row, length in zip(tokens, lengths, strict=True)
        ]

    def answer_tokens(
        self,
        pairs: Sequence[tuple[Query, Document]],
        *,
        max_new_tokens: int,
        first: np.ndarray | None = None,
        rows: int = 16,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Greedy answers: tokens int32 [N, A] and lengths int32 [N], end-of-text included.

        `first` int [N] are the tokens that the answers begin with; by default they too are the model's choice, of the
        whole vocabulary.
        """
        if not pairs:
            return np.zeros((0, max_new_tokens), np.int32), np.zeros(0, np.int32)
        eos = self.format.tokenizer.eos
        prompts = [prompt.tokens for prompt in self.format.encode_prompts(pairs)]
        width = -(-max(map(len, prompts)) // 32) * 32
        tokens, lengths = [], []
        for start in range(0, len(prompts), rows):
            chosen = prompts[start : start + rows]
            padded = np.zeros((rows, width), np.int32)
            for row, prompt in zip(padded, chosen, strict=False):
                row[: len(prompt)] = prompt
            size = np.array([len(p) for p in chosen] + [1] * (rows - len(chosen)), np.int32)
            begin = None
            if first is not None:
                begin = np.zeros((rows, 1), np.int32)
                begin[: len(chosen), 0] = first[start : start + rows]
            drawn = jax.device_get(
                sample(
                    self.parameters,
                    padded,
                    size,
                    np.arange(rows, dtype=np.uint32),
                    jax.random.key(0),
                    begin,
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
        fields = {name: str(value) for name, value in document.items() if name not in ("title", "text")}
        return Document("", document.get("title", ""), document.get("text", ""), fields)
    return Document("", document)
